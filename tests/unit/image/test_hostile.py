"""What somebody who may write to a disk at rest would try, beyond a flipped byte: told of, and never a crash."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

import pytest

from appliance.cli import run_cli
from appliance.image.disk import open_device_to_read, open_to_read, open_to_write
from appliance.image.manifest import Manifest
from appliance.image.model import SECTOR, Bytes, Damaged, ImageError
from appliance.image.pe import parse_program
from appliance.image.signing import NotTrusted, check_program
from appliance.image.verify import Wanted, verify_image
from tests.support.disk_images import flipped, make_kernel, make_root, run
from tests.support.rule_pipelines import rule
from tests.unit.image.conftest import Image, quiet
from tests.unit.image.test_refresh import build


@pytest.fixture
def disk(image: Image, tmp_path: Path) -> Path:
    copy = tmp_path / "disk.raw"
    run("cp", "--sparse=always", image.disk, copy)
    return copy


def find_bad(
    image: Image, disk: Path, manifest: Manifest | None, *, ran: bool = False
) -> list[tuple[str, str, str]]:
    with open_device_to_read(disk) as opened:
        verdict = verify_image(opened, Wanted(image.trusted, manifest, ran), quiet)
    return [(one.place, str(one.status), one.detail) for one in verdict.findings if not one.good]


def put(image: Image, disk: Path, source: Path, path: str) -> None:
    at = f"{disk}@@{image.partition('esp').offset}"
    folder = path.rpartition("/")[0]
    if folder not in ("/EFI/BOOT", "/EFI/Linux", "/loader"):
        # All that were missing so far.
        for name in ("/EFI/systemd", folder) if folder.startswith("/EFI/systemd") else (folder,):
            run("mmd", "-i", at, f"::{name}")
    run("mcopy", "-o", "-i", at, source, f"::{path}")


def test_every_changed_byte_of_a_program_s_signature_is_an_answer(image: Image) -> None:
    """The certificate in it is read lazily: a torn one was a crash, and no finding."""
    data = image.root.kernel.read_bytes()
    start = len(data) - len(parse_program(Bytes(data)).signatures[0]) - 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at in range(8 * start, 8 * len(data)):
            changed = bytearray(data)
            changed[at // 8] ^= 1 << at % 8
            try:
                for signature in parse_program(Bytes(bytes(changed))).signatures:
                    check_program(signature, image.trusted)
            except (Damaged, NotTrusted):
                continue


# Bytes that no signature and no checksum covers


def test_bytes_of_the_table_that_no_checksum_covers_are_told(image: Image) -> None:
    for at in range(446, 462):
        with flipped(image.disk, at):
            assert "partition table" in {place for place, _, _ in image.find_bad()}, at


def test_the_number_in_a_superblock_is_told(image: Image) -> None:
    """No digest of the tree covers it, and nothing asks for it."""
    at = image.partition("hairpin_0.1.0_verity").offset + 16
    with flipped(image.disk, at):
        for ran in (False, True):
            assert [one[:2] for one in image.find_bad(ran=ran)] == [("root A signature", "changed")]


def test_another_way_to_write_the_same_signature_is_told(image: Image) -> None:
    """As upper case: signed all the same, and not what was there when the image was signed."""
    text = image.root.signature.read_bytes()
    fingerprint = json.loads(text.rstrip(b"\0"))["certificateFingerprint"].encode()
    letter = next(at for at, one in enumerate(fingerprint) if chr(one).isalpha())
    at = image.partition("hairpin_0.1.0_sig").offset + text.find(fingerprint) + letter
    with flipped(image.disk, at, 0x20):
        assert [one[:2] for one in image.find_bad()] == [("root A signature", "changed")]


def test_partitions_of_one_number_are_told(image: Image, disk: Path) -> None:
    """An "empty" root of the other's number: which of the two the initrd takes would be chance."""
    number = uuid.UUID(image.root.root_hash[:32])
    run("sgdisk", "-u", f"5:{number}", disk)
    assert ("partition table", "changed", "partitions 2 and 5 have the same GUID") in find_bad(
        image, disk, image.manifest, ran=True
    )


# Programs that are signed, and yet not of this image


@pytest.mark.parametrize(
    "path",
    [
        "/EFI/Linux/hairpin_0.1.0+3.efi.extra.d/debug.addon.efi",
        "/EFI/Linux/debug.addon.efi",
        "/loader/addons/debug.addon.efi",
        "/EFI/systemd/drivers/driverx64.efi",
    ],
)
@pytest.mark.parametrize("ran", [False, True])
def test_a_signed_program_where_none_belongs_is_told(
    image: Image, disk: Path, path: str, ran: bool
) -> None:
    """systemd-stub takes addons, which change the kernel's command line; systemd-boot loads drivers."""
    put(image, disk, image.root.kernel.parent.parent / "loader.efi", path)
    for manifest in (image.manifest, None):
        bad = find_bad(image, disk, manifest, ran=ran)
        assert (f"esp {path}", "unexpected") in [one[:2] for one in bad]


@pytest.mark.parametrize("ran", [False, True])
def test_another_signed_boot_loader_than_the_manifest_s_is_told(
    image: Image, disk: Path, tmp_path: Path, ran: bool
) -> None:
    """An old one of ours, with old faults, is signed too."""
    other = tmp_path / "other.efi"
    other.write_bytes((image.root.kernel.parent.parent / "loader.efi").read_bytes())
    bare = tmp_path / "bare.efi"
    run("objcopy", "--add-section", f".old={image.keys.certificate}", "--change-section-vma", ".old=0x2000000",
        "/usr/lib/systemd/boot/efi/systemd-bootx64.efi", bare)  # fmt: skip
    run(
        "sbsign", "--key", image.keys.key, "--cert", image.keys.certificate, "--output", other, bare
    )
    put(image, disk, other, "/EFI/BOOT/BOOTX64.EFI")
    assert ("esp /EFI/BOOT/BOOTX64.EFI", "changed", "signed, but not what the manifest says") in (
        find_bad(image, disk, image.manifest, ran=ran)
    )


def test_a_kernel_of_the_same_root_that_came_later_is_told_before_the_image_has_run(
    image: Image, disk: Path, tmp_path: Path
) -> None:
    other = make_kernel(tmp_path, image.keys, "0.2.0", image.root.root_hash)
    put(image, disk, other, "/EFI/Linux/hairpin_0.2.0.efi")
    bad = find_bad(image, disk, image.manifest)
    assert ("esp /EFI/Linux/hairpin_0.2.0.efi", "unexpected") in [one[:2] for one in bad]


def test_a_kernel_where_the_boot_loader_does_not_look_is_no_kernel_to_boot(
    image: Image, disk: Path
) -> None:
    at = f"{disk}@@{image.partition('esp').offset}"
    run("mren", "-i", at, "::/EFI/Linux/hairpin_0.1.0+3.efi", "::/loader/hairpin_0.1.0.efi")
    bad = [one[:2] for one in find_bad(image, disk, None, ran=True)]
    assert ("esp /EFI/LINUX/", "missing") in bad
    assert ("esp /loader/hairpin_0.1.0.efi", "unexpected") in bad


def test_only_a_kernel_s_name_has_a_count_of_tries(image: Image, disk: Path) -> None:
    """The settings under another name are settings that the boot loader does not read."""
    at = f"{disk}@@{image.partition('esp').offset}"
    run("mren", "-i", at, "::/loader/loader.conf", "loader+3.conf")
    bad = [one[:2] for one in find_bad(image, disk, image.manifest, ran=True)]
    assert ("esp /loader/loader.conf", "missing") in bad
    assert ("esp /loader/loader+3.conf", "unexpected") in bad


def test_an_old_release_of_ours_in_the_other_root_is_told_before_the_image_has_run(
    image: Image, disk: Path, tmp_path: Path
) -> None:
    old = make_root(tmp_path, image.keys, "0.0.9")
    halves = [str(uuid.UUID(half)) for half in (old.root_hash[:32], old.root_hash[-32:])]
    run("sgdisk", "-u", f"5:{halves[0]}", "-u", f"6:{halves[1]}", "-c", "5:hairpin_0.0.9", disk)
    with open_device_to_read(disk) as opened:
        starts = [opened.read(2 * SECTOR + 128 * number + 32, 8) for number in (4, 5, 6)]
    with open(disk, "r+b") as changed:
        for start, path in zip(starts, (old.data, old.tree, old.signature), strict=True):
            changed.seek(int.from_bytes(start, "little") * SECTOR)
            changed.write(path.read_bytes())
    put(image, disk, old.kernel, "/EFI/Linux/hairpin_0.0.9.efi")
    bad = [one[:2] for one in find_bad(image, disk, image.manifest)]
    assert {("root B signature", "changed"), ("partition table", "changed")} <= set(bad)
    assert ("esp /EFI/Linux/hairpin_0.0.9.efi", "unexpected") in bad


# A file system that drivers read in more than one way


def change_entry(disk: Path, name: bytes, changes: dict[int, bytes]) -> None:
    """Of the one directory entry with this short name."""
    data = disk.read_bytes()
    at = data.find(name)
    assert data.count(name) == 1
    with open(disk, "r+b") as opened:
        for offset, new in changes.items():
            opened.seek(at + offset)
            opened.write(new)


@pytest.mark.parametrize("ran", [False, True])
def test_a_label_that_may_be_a_file_is_told(
    image: Image, disk: Path, tmp_path: Path, ran: bool
) -> None:
    """The flag of a label hides a file from those who heed it, and its clusters may count as free."""
    cred = tmp_path / "x"
    cred.write_bytes(b"x" * 100)
    put(image, disk, cred, "/loader/OTHER.CRE")
    change_entry(disk, b"OTHER   CRE", {11: b"\x28"})
    bad = find_bad(image, disk, image.manifest, ran=ran)
    assert ("esp", "changed", "/loader has a label that may be a file") in bad


# Rules


def test_two_bundles_of_one_serial_are_told(image: Image, disk: Path) -> None:
    partition = image.partition("hairpin-rules")
    with open(disk, "r+b") as opened:
        for number, size in enumerate((100, 2000)):
            opened.seek(partition.offset + number * partition.size // 2)
            opened.write(build(image, 7, size))
    assert [one[:2] for one in find_bad(image, disk, image.manifest)] == [("rules", "changed")]


# What is no plain disk


def test_a_qcow2_with_another_file_behind_it_is_refused_before_qemu_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`qemu-img info` itself opens a data file, by any description that the header has of it."""
    base, data = tmp_path / "base.qcow2", tmp_path / "data.raw"
    run("qemu-img", "create", "-f", "qcow2", base, "1M")
    over, apart = tmp_path / "over.qcow2", tmp_path / "apart.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", over)
    run("qemu-img", "create", "-f", "qcow2", "-o", f"data_file={data}", apart, "1M")
    secret = ["--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s"]
    run("qemu-img", "create", "-f", "qcow2", *secret, tmp_path / "sealed.qcow2", "1M")
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no QEMU
    for path in (over, apart, tmp_path / "sealed.qcow2"):
        for opening in (open_to_write(path), open_to_read(path, quiet)):
            with pytest.raises(ImageError, match="another file behind it"), opening:
                pass


def test_a_qcow2_of_any_size_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "large.qcow2"
    run("qemu-img", "create", "-f", "qcow2", path, "1M")
    with open(path, "r+b") as opened:
        opened.seek(24)
        opened.write((2**60).to_bytes(8, "big"))
    with pytest.raises(ImageError, match="more than"), open_to_read(path, quiet):
        pass


def test_a_torn_qcow2_is_told_with_what_to_do(tmp_path: Path) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(b"hairpin\n" * 2**17)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    raw.unlink()
    # Cut among the compressed clusters, then in the header.
    for size in (path.stat().st_size - 2**11, 70):
        os.truncate(path, size)
        opening = open_to_read(path, quiet)
        with pytest.raises(ImageError, match="is no whole qcow2") as told, opening:
            pass
        assert "take a whole copy" in told.value.mend
    assert [one.name for one in tmp_path.iterdir()] == ["disk.qcow2"]


def test_a_place_too_small_to_unpack_in_is_told(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=3m", "small", small)
    try:
        run("qemu-img", "create", "-f", "qcow2", small / "disk.qcow2", "2M")
        run("qemu-io", "-f", "qcow2", "-c", "write 0 2M", small / "disk.qcow2")
        opening = open_to_read(small / "disk.qcow2", quiet)
        with pytest.raises(ImageError, match="no space left") as told, opening:
            pass
        assert "free some" in told.value.mend
        assert [one.name for one in small.iterdir()] == ["disk.qcow2"]
    finally:
        run("umount", small)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_is_ended_while_it_unpacks_leaves_nothing(
    image: Image, tmp_path: Path, number: signal.Signals
) -> None:
    """The real one is done too soon to be met at work: this `qemu-img` writes a byte and waits."""
    folder, programs = tmp_path / "folder", tmp_path / "programs"
    folder.mkdir()
    programs.mkdir()
    run("qemu-img", "create", "-f", "qcow2", folder / "disk.qcow2", "1M")
    slow = programs / "qemu-img"
    slow.write_text(
        "#!/bin/sh\ncase $1 in info) echo '{\"virtual-size\": 1048576}' ;; *) shift $(($# - 1));"
        f' echo x >"$1"; echo $$ >{tmp_path}/pid; exec sleep 60 ;; esac\n'
    )
    slow.chmod(0o755)
    argv = [sys.executable, "-m", "appliance.cli", "image", "verify", str(folder / "disk.qcow2")]
    child = subprocess.Popen(
        [*argv, "--certificate", str(image.keys.certificate)],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
    )
    deadline = time.monotonic() + 20
    while not list(folder.glob(".hairpin-*/disk.raw")) or not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(number)
    assert child.wait(10) == 128 + number
    assert [one.name for one in folder.iterdir()] == ["disk.qcow2"]
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_a_place_where_nothing_can_be_unpacked_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    run("qemu-img", "create", "-f", "qcow2", folder / "disk.qcow2", "1M")
    run("mount", "--bind", folder, folder)
    try:
        run("mount", "-o", "remount,ro,bind", folder)
        opening = open_to_read(folder / "disk.qcow2", quiet)
        with pytest.raises(ImageError, match="can't be unpacked"), opening:
            pass
    finally:
        run("umount", folder)


def test_a_name_is_no_protocol_and_no_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("nbd:x", "-x", "json:{}"):
        run("qemu-img", "create", "-f", "qcow2", tmp_path / name, "1M")
        with open_to_read(Path(name), quiet) as disk:
            assert disk.size == 2**20
        with open_to_write(Path(name)) as disk:
            assert disk.read(0, 1) == b"\0"


# Wrong input


def test_a_serial_that_can_t_be_is_wrong_input(
    image: Image, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "own.rules"
    rules.write_text(rule(77) + "\n")
    argv = ["image", "refresh", str(disk), "--rules", str(rules), "--key", str(image.keys.key)]
    argv += ["--certificate", str(image.keys.certificate)]
    assert run_cli([*argv, "--serial", str(2**53)]) == 2
    assert run_cli([*argv, "--serial", str(2**53 - 1)]) == 0
    capsys.readouterr()
    assert run_cli(argv) == 1
    assert "no serial number is left" in capsys.readouterr().err


def test_what_is_damaged_is_told_with_a_mend(
    image: Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    certificate = ["--certificate", str(image.keys.certificate)]
    for argv in (
        ["rules", str(empty), *certificate],
        ["extract", str(empty), "--output", str(tmp_path / "out"), *certificate],
    ):
        assert run_cli(["image", *argv]) == 1
        assert "what to do:" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_no_manifest_is_wrong_input(
    image: Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["image", "verify", str(image.disk), "--certificate", str(image.keys.certificate)]
    other = tmp_path / "other"
    for content in (b"", b"Debian 13", b" " * (4 * 2**20 + 1)):
        other.write_bytes(content)
        assert run_cli([*argv, "--manifest", str(other)]) == 2
        said = capsys.readouterr().err
        assert f"{other}: the manifest" in said
        assert "name what `hairpin image sign` made" in said


def sign_command(image: Image, disk: Path, output: Path) -> int:
    argv = ["image", "sign", str(disk), "--key", str(image.keys.key), "--output", str(output)]
    return run_cli([*argv, "--certificate", str(image.keys.certificate)])


def test_a_place_where_no_manifest_can_be_written_is_told_before_the_image_is_measured(
    image: Image, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By an image that would be refused when it is measured."""
    wrong = tmp_path / "wrong.raw"
    wrong.write_bytes(bytes(2**20))
    places = (
        (tmp_path, "directory"),
        (tmp_path / "no" / "x", "No such file"),
        (wrong, "the image"),
    )
    for output, reason in places:
        assert sign_command(image, wrong, output) == 2
        assert reason in capsys.readouterr().err
    assert wrong.read_bytes() == bytes(2**20)
    # And of one that can be, nothing stays where the image is refused.
    output = tmp_path / "here"
    before = sorted(tmp_path.iterdir())
    assert sign_command(image, wrong, output) == 1
    assert sorted(tmp_path.iterdir()) == before
    assert sign_command(image, disk, output) == 0
    assert sorted(tmp_path.iterdir()) == sorted([*before, output])


def test_a_manifest_for_which_there_is_no_room_leaves_nothing(
    image: Image, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit on a file's size stands for a full disk, which takes root to make: the write ends the same way."""
    output = tmp_path / "here"
    output.write_text("the one before")
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        status = sign_command(image, disk, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert status == 1
    assert f"{output} can't be written: File too large" in said
    assert "make room" in said
    assert sorted(tmp_path.iterdir()) == before
    assert output.read_text() == "the one before"


def test_parts_are_written_into_an_empty_directory_alone(
    image: Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["image", "extract", str(image.disk), "--certificate", str(image.keys.certificate)]
    out = tmp_path / "out"
    out.mkdir()
    mine = out / "notes.txt"
    mine.write_text("mine")
    assert run_cli([*argv, "--output", str(out)]) == 2
    assert f"{out}: not empty: notes.txt is in it" in capsys.readouterr().err
    assert list(out.iterdir()) == [mine]
    assert run_cli([*argv, "--output", str(mine)]) == 2
    assert f"{mine}: no directory" in capsys.readouterr().err
    mine.unlink()
    assert run_cli([*argv, "--output", str(out)]) == 0
    assert len(list(out.iterdir())) == 4
