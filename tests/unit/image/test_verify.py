"""Every byte of an image that was signed is told of when it changes, by the name of its part."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from appliance.cli import run_cli
from appliance.image.disk import open_device_to_read
from appliance.image.fat import read_tree
from appliance.image.gpt import Partition, read_table
from appliance.image.minimum import Minimum, require_minimum
from appliance.image.model import SECTOR, Kernel, Status, Verdict
from appliance.image.signing import read_certificates
from appliance.image.verify import Wanted, strip_tries, verify_image
from tests.support.disk_images import (
    BLOCK,
    find_in,
    flipped,
    make_keys,
    make_root,
    run,
)
from tests.unit.image.conftest import Image, quiet

KERNEL = "esp /EFI/Linux/hairpin_0.1.0+3.efi"


def find_file(image: Image, path: str) -> int:
    """Where a file of the boot partition begins on the disk."""
    esp = image.partition("esp")
    with open_device_to_read(image.disk) as opened:
        tree = read_tree(esp.of(opened))
    file = next(one for one in tree.files if one.path == path)
    return esp.offset + file.data_at + (file.clusters[0] - 2) * file.cluster_size


def test_an_image_as_it_was_built_is_as_it_was_signed(image: Image) -> None:
    verdict = image.verify()
    assert [one for one in verdict.findings if not one.good] == []
    assert verdict.versions == ("0.1.0",)
    signed = {one.place for one in verdict.findings if one.signer}
    assert {KERNEL, "esp /EFI/BOOT/BOOTX64.EFI", "root A data", "root A tree"} <= signed


def test_without_a_manifest_what_has_no_signature_is_told(image: Image) -> None:
    assert [(place, status) for place, status, _ in image.find_bad(manifest=False)] == [
        ("esp /loader/loader.conf", "unsigned"),
        ("var", "unsigned"),
    ]


def places(image: Image) -> dict[str, tuple[int, str, str, str]]:
    """name -> offset of a byte, and place, status and words that tell of it."""
    root, tree = image.partition("hairpin_0.1.0"), image.partition("hairpin_0.1.0_verity")
    signature, esp = image.partition("hairpin_0.1.0_sig"), image.partition("esp")
    kernel = find_file(image, "/EFI/Linux/hairpin_0.1.0+3.efi")
    loader = find_file(image, "/EFI/BOOT/BOOTX64.EFI")
    told = json.loads(Path(image.root.signature).read_bytes().rstrip(b"\0"))
    text = image.root.signature.read_bytes()
    program = image.root.kernel.read_bytes()
    end = image.disk.stat().st_size
    table = "partition table"
    return {
        "root, its 300th block": (root.offset + 300 * BLOCK + 7, "root A data", "changed", "block 300:"),
        "root, its last block": (root.offset + root.size - 1, "root A data", "changed", "block 1023:"),
        "a leaf of the tree": (tree.offset + 4 * BLOCK, "root A tree", "changed", "the data under it are"),
        "the top of the tree": (tree.offset + BLOCK, "root A tree", "changed", "block 1:"),
        "the tree's salt": (tree.offset + 90, "root A tree", "changed", ""),
        "after the tree": (tree.offset + tree.size - 5, "root A tree", "changed", "belong to nothing"),
        "the superblock's filling": (tree.offset + 600, "root A tree", "changed", "belong to nothing"),
        "the root hash": (
            signature.offset + text.find(told["rootHash"].encode()), "root A signature", "", "",
        ),
        "the root hash's signature": (
            signature.offset + text.find(told["signature"].encode()) + 600, "root A signature", "", "",
        ),
        "after the root hash's signature": (
            signature.offset + signature.size - 1, "root A signature", "changed", "",
        ),
        "kernel": (kernel + program.find(b"no kernel"), KERNEL, "changed", "not the program that was signed"),
        "initrd": (kernel + program.find(b"no initrd"), KERNEL, "changed", "not the program that was signed"),
        "command line": (kernel + program.find(b"console="), KERNEL, "changed", "not the program"),
        "kernel's signature": (kernel + len(program) - 100, KERNEL, "", ""),
        "kernel's checksum": (kernel + int.from_bytes(program[60:64], "little") + 88, KERNEL, "changed", "checksum"),
        "boot loader": (loader + 40_000, "esp /EFI/BOOT/BOOTX64.EFI", "changed", "not the program"),
        "the boot loader's settings": (
            find_file(image, "/loader/loader.conf") + 8, "esp /loader/loader.conf", "changed", "manifest",
        ),
        "a file's time": (
            find_in(image.disk, b"LOADER~1CON") + 14, "esp", "changed", "not what the file system says",
        ),
        "a table of clusters": (esp.offset + 32 * SECTOR + 4 * 30_000, "esp", "changed", "tables of clusters differ"),
        "first header": (SECTOR + 60, table, "changed", "first partition table is damaged"),
        "first entries": (2 * SECTOR + 130, table, "changed", "first partition table is damaged"),
        "second header": (end - SECTOR + 60, table, "changed", "second partition table is damaged"),
        "MBR": (100, table, "changed", "boot code"),
        "between partitions": (signature.offset + signature.size + 9, "between partitions", "unexpected", ""),
        "empty root": (image.partition("esp").offset, "", "", ""),
        "empty rules": (image.partition("hairpin-rules").offset + 5, "rules copy 1", "changed", ""),
        "empty rules, far in": (
            image.partition("hairpin-rules").offset + 300_000, "rules copy 1", "unexpected", "",
        ),
        "var": (image.partition("hairpin-var").offset + 5000, "var", "changed", "manifest"),
    }  # fmt: skip


NAMES = [
    "root, its 300th block", "root, its last block", "a leaf of the tree", "the top of the tree", "the tree's salt",
    "after the tree", "the superblock's filling", "the root hash", "the root hash's signature",
    "after the root hash's signature", "kernel", "initrd", "command line", "kernel's signature", "kernel's checksum",
    "boot loader", "the boot loader's settings", "a file's time", "a table of clusters", "first header",
    "first entries", "second header", "MBR", "between partitions", "empty root", "empty rules",
    "empty rules, far in", "var",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_byte_is_detected_and_its_part_is_named(image: Image, name: str) -> None:
    found = places(image)
    assert set(found) == set(NAMES)
    offset, place, status, words = found[name]
    if name == "empty root":
        empty = [one for one in _partitions(image) if one.name == "_empty"]
        offset, place, status = empty[0].offset + 1000, "root B", "unexpected"
    with flipped(image.disk, offset):
        bad = image.find_bad()
    assert any(
        one[0] == place and (not status or one[1] == status) and words in one[2] for one in bad
    ), bad


def _partitions(image: Image) -> Sequence[Partition]:
    with open_device_to_read(image.disk) as opened:
        return read_table(opened).partitions


@pytest.mark.slow
def test_any_flipped_byte_anywhere_is_detected(image: Image) -> None:
    """Bytes by chance, as many in each part; with the manifest no byte of the disk is left out."""
    chance = random.Random(20261128)
    spans = [("gaps", 0, 34 * SECTOR)]
    spans += [(one.name + str(one.number), one.offset, one.size) for one in _partitions(image)]
    kernel = find_file(image, "/EFI/Linux/hairpin_0.1.0+3.efi")
    spans.append(("kernel", kernel, image.root.kernel.stat().st_size))
    spans.append(("signature", kernel + image.root.kernel.stat().st_size - 1500, 1500))
    missed = []
    for name, start, size in spans:
        for _ in range(12):
            offset = start + chance.randrange(size)
            with flipped(image.disk, offset, 1 << chance.randrange(8)):
                if not image.find_bad():
                    missed.append((name, offset - start))
    assert missed == []


def test_a_block_range_is_told_as_one(image: Image) -> None:
    root = image.partition("hairpin_0.1.0")
    with (
        flipped(image.disk, root.offset + 10 * BLOCK),
        flipped(image.disk, root.offset + 11 * BLOCK),
        flipped(image.disk, root.offset + 50 * BLOCK),
    ):
        details = [detail for place, _, detail in image.find_bad() if place == "root A data"]
    assert details == ["blocks 10 to 11: changed", "block 50: changed"]


def test_another_key_is_not_trusted(image: Image, tmp_path: Path) -> None:
    other = read_certificates(make_keys(tmp_path, "other").certificate)
    with open_device_to_read(image.disk) as opened:
        verdict = verify_image(opened, Wanted(other), quiet)
    unsigned = {one.place for one in verdict.findings if one.status == "unsigned"}
    assert {KERNEL, "esp /EFI/BOOT/BOOTX64.EFI", "root A signature"} <= unsigned


@pytest.fixture
def changed(image: Image, tmp_path: Path) -> Path:
    """A copy to be changed by mtools, and the place of its boot partition as they want it."""
    copy = tmp_path / "disk.raw"
    run("cp", "--sparse=always", image.disk, copy)
    return copy


def find_bad(image: Image, disk: Path, **how: bool) -> list[tuple[str, str, str]]:
    wanted = Wanted(image.trusted, image.manifest, **how)
    with open_device_to_read(disk) as opened:
        verdict = verify_image(opened, wanted, quiet)
    return [(one.place, str(one.status), one.detail) for one in verdict.findings if not one.good]


def put(image: Image, disk: Path, path: str, content: bytes) -> None:
    piece = disk.with_name("piece")
    piece.write_bytes(content)
    run("mcopy", "-o", "-i", f"{disk}@@{image.partition('esp').offset}", piece, f"::{path}")


@pytest.mark.parametrize("path", ["/loader/credentials.cred", "/EFI/Linux/hairpin.addon.efi"])
def test_a_file_that_was_put_there_is_unexpected(image: Image, changed: Path, path: str) -> None:
    put(image, changed, path, b"x" * 700)
    bad = find_bad(image, changed)
    # A program is measured by its signature, wherever it is.
    assert (f"esp {path}", "changed" if path.endswith(".efi") else "unexpected") in [
        one[:2] for one in bad
    ]


def test_a_kernel_that_nobody_signed_is_told(image: Image, changed: Path) -> None:
    put(
        image,
        changed,
        "/EFI/Linux/hairpin_0.2.0.efi",
        (image.root.kernel.parent / "bare.efi").read_bytes(),
    )
    assert ("esp /EFI/Linux/hairpin_0.2.0.efi", "unsigned", "a program that nobody signed") in (
        find_bad(image, changed)
    )


def test_an_old_kernel_of_ours_whose_root_is_gone_is_told(
    image: Image, changed: Path, tmp_path: Path
) -> None:
    """Signed, and yet not of this image: an attacker may have kept an old release."""
    old = make_root(tmp_path, image.keys, "0.0.9")
    put(image, changed, "/EFI/Linux/hairpin_0.0.9.efi", old.kernel.read_bytes())
    bad = find_bad(image, changed, ran=True)
    assert next(one for one in bad if "hairpin_0.0.9" in one[0])[1:] == (
        "changed",
        "the root that it starts is not there, or nobody signed it",
    )


def test_what_is_missing_is_told(image: Image, changed: Path) -> None:
    at = f"{changed}@@{image.partition('esp').offset}"
    for path in ("EFI/BOOT/BOOTX64.EFI", "EFI/Linux/hairpin_0.1.0+3.efi", "loader/loader.conf"):
        run("mdel", "-i", at, f"::/{path}")
    missing = {place for place, status, _ in find_bad(image, changed) if status == "missing"}
    assert missing >= {"esp /EFI/BOOT/BOOTX64.EFI", "esp /loader/loader.conf", "esp /EFI/LINUX/"}


def test_a_further_partition_is_unexpected(image: Image, tmp_path: Path) -> None:
    copy = tmp_path / "disk.raw"
    run("cp", "--sparse=always", image.disk, copy)
    run("sgdisk", "-n", "20:0:0", "-c", "20:more", copy)
    bad = find_bad(image, copy)
    assert ("partition 20", "unexpected") in [one[:2] for one in bad]
    assert ("partition table", "changed") in [one[:2] for one in bad]


def test_an_appliance_that_ran_may_count_tries_and_write_its_state(
    image: Image, changed: Path
) -> None:
    at = f"{changed}@@{image.partition('esp').offset}"
    run("mren", "-i", at, "::/EFI/Linux/hairpin_0.1.0+3.efi", "hairpin_0.1.0.efi")
    put(image, changed, "/loader/random-seed", b"r" * 32)
    with open(changed, "r+b") as opened:
        opened.seek(image.partition("hairpin-var").offset + 5000)
        opened.write(b"state")
    assert find_bad(image, changed, ran=True) == []
    assert {place for place, _, _ in find_bad(image, changed)} >= {"esp /loader/random-seed", "var"}


@pytest.mark.parametrize(
    ("path", "stripped"),
    [
        ("/EFI/Linux/hairpin_0.1.0+3.efi", "/EFI/Linux/hairpin_0.1.0.efi"),
        ("/EFI/Linux/hairpin_0.1.0+2-1.efi", "/EFI/Linux/hairpin_0.1.0.efi"),
        ("/EFI/Linux/hairpin_0.1.0.efi", "/EFI/Linux/hairpin_0.1.0.efi"),
        ("/EFI/Linux/hairpin_0.1.0+x.efi", "/EFI/Linux/hairpin_0.1.0+x.efi"),
        ("/EFI/Linux+3/b.efi", "/EFI/Linux+3/b.efi"),
        ("/loader/loader+3.conf", "/loader/loader+3.conf"),
    ],
)
def test_counts_of_tries_are_no_part_of_a_name(path: str, stripped: str) -> None:
    assert strip_tries(path) == stripped


# The command


def test_the_command_tells_and_ends_with_1(
    image: Image, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["image", "verify", str(image.disk), "--certificate", str(image.keys.certificate)]
    assert run_cli([*argv, "--manifest", str(image.manifest_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["good"] is True
    with flipped(image.disk, image.partition("hairpin_0.1.0").offset + 5 * BLOCK):
        assert run_cli([*argv, "--manifest", str(image.manifest_file)]) == 1
    said = capsys.readouterr()
    assert "block 5: changed" in said.out
    assert "1 differences" in said.out
    assert "checking root A" in said.err


def test_a_manifest_of_somebody_else_is_refused(
    image: Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "manifest"
    document = json.loads(image.manifest_file.read_text())
    document["signed"]["var_sha256"] = "0" * 64
    torn.write_text(json.dumps(document))
    argv = ["image", "verify", str(image.disk), "--certificate", str(image.keys.certificate)]
    assert run_cli([*argv, "--manifest", str(torn)]) == 1
    assert "does not fit" in capsys.readouterr().err


def test_a_damaged_image_is_not_signed(
    image: Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["image", "sign", str(image.disk), "--key", str(image.keys.key)]
    argv += ["--certificate", str(image.keys.certificate), "--output", str(tmp_path / "m")]
    with flipped(image.disk, image.partition("hairpin_0.1.0").offset):
        assert run_cli(argv) == 1
    assert "root A data is changed" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_a_qcow2_is_verified_too(
    image: Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", image.disk, disk)
    argv = ["image", "verify", str(disk), "--certificate", str(image.keys.certificate)]
    assert run_cli([*argv, "--manifest", str(image.manifest_file)]) == 0
    assert [one.name for one in tmp_path.iterdir()] == ["disk.qcow2"]
    over = tmp_path / "over.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-b", disk, "-F", "qcow2", over)
    capsys.readouterr()
    assert run_cli(["image", "verify", str(over), *argv[3:]]) == 1
    assert "another file behind it" in capsys.readouterr().err


def test_what_is_no_image_is_told(tmp_path: Path, image: Image) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    cut = tmp_path / "cut"
    shutil.copyfile(image.disk, cut)
    with open(cut, "r+b") as opened:
        opened.truncate(3 * 2**20)
    for path in (empty, cut):
        argv = ["image", "verify", str(path), "--certificate", str(image.keys.certificate)]
        assert run_cli(argv) == 1
    assert run_cli(["image", "verify", str(tmp_path / "none"), *argv[3:]]) == 2


def test_what_was_not_compared_is_said(image: Image, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["image", "verify", str(image.disk), "--certificate", str(image.keys.certificate)]
    assert run_cli([*argv, "--manifest", str(image.manifest_file)]) == 0
    assert [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("not compared")
    ] == ["not compared: how old the rules are: no bundle (--minimum-serial)"]
    assert run_cli([*argv, "--ran", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["notCompared"] == [
        "how old the version is: 0.1.0 (--minimum-version)",
        "how old the rules are: no bundle (--minimum-serial)",
        "whether signed programs are those of this image (--manifest)",
        "what an appliance writes: /var, unused space, labels, counts of tries (without --ran)",
    ]


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        (["--minimum-version", "0.1.0"], 0, []),
        (["--minimum-version", "0.0.9"], 0, []),
        (["--minimum-version", "0.1.1"], 1, [(KERNEL, "version 0.1.0 can boot, 0.1.1 is wanted")]),
        (["--minimum-version", "0.10.0"], 1, [(KERNEL, "version 0.1.0 can boot, 0.10.0 is wanted")]),
        (["--minimum-serial", "1"], 1, [("rules", "no bundle that can be used, serial 1 is wanted")]),
    ],
)  # fmt: skip
def test_an_older_version_than_the_wanted_one_is_a_difference(
    image: Image,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    told: list[tuple[str, str]],
) -> None:
    argv = ["image", "verify", str(image.disk), "--certificate", str(image.keys.certificate)]
    argv += ["--ran", "--manifest", str(image.manifest_file), "--json", *options]
    assert run_cli(argv) == status
    report = json.loads(capsys.readouterr().out)
    older = [one for one in report["findings"] if one["status"] == "older"]
    assert [(one["place"], one["detail"]) for one in older] == told
    assert report["good"] is (status == 0)
    signature = next(one for one in report["findings"] if one["place"] == "root A signature")
    assert signature["detail"].startswith("version 0.1.0, root hash")


def test_each_kernel_and_each_copy_of_the_rules_may_be_too_old() -> None:
    kernels = (Kernel("/a", "0.1.0", "x"), Kernel("/b", "0.2.0", "y"), Kernel("/c", "", "z"))
    verdict = Verdict((), kernels, (7, 9))
    # Never asked about what is no version: it may come from a file.
    found = require_minimum(
        verdict, Minimum("0.2.0", 8), lambda one, other: (one > other) - (one < other)
    )
    assert [(one.place, one.status) for one in found.findings] == [
        ("esp /a", Status.OLDER), ("esp /c", Status.OLDER), ("rules", Status.OLDER),
    ]  # fmt: skip
    assert not found.good
    assert require_minimum(verdict, Minimum(), compare_nothing) == verdict


def compare_nothing(one: str, other: str) -> int:
    raise AssertionError("not asked for")


def test_a_version_is_given_as_one(image: Image, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["image", "verify", str(image.disk), "--certificate", str(image.keys.certificate)]
    assert run_cli([*argv, "--minimum-version", "--root"]) == 2
    assert run_cli([*argv, "--minimum-version", "latest"]) == 2
    assert "'latest' is no version" in capsys.readouterr().err
