"""A new version beside the one that runs: checked, written by the real systemd-sysupdate, kept or sent back."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.api.coverage import LaneProofs
from appliance.api.documents import Health
from appliance.cli import run_cli
from appliance.image import bootcheck, update
from appliance.image.bootcheck import judge_faults, judge_lanes, judge_proofs, wait_until_good
from appliance.image.disk import open_device_to_read
from appliance.image.fat import read_tree
from appliance.image.gpt import Partition, read_table
from appliance.image.model import Damaged, ImageError
from appliance.image.signing import NotTrusted, read_certificates
from appliance.image.update import (
    PARTS,
    Release,
    check_newer,
    check_release,
    check_written,
    find_parts,
    forget_cached,
    name_for_sysupdate,
    stage,
    withdraw,
)
from appliance.image.verify import Wanted, verify_image
from steering.errors import HairpinError, WrongInput
from tests.support.disk_images import Root, flipped, make_keys, make_root, run
from tests.unit.image.conftest import Image, quiet

ROOT = Path(__file__).resolve().parents[3]
TRANSFERS = ROOT / "image-build/mkosi.extra/usr/lib/hairpin/sysupdate.d"
UNITS = ROOT / "image-build/mkosi.extra/usr/lib/systemd/system"
# Debian 12 has no systemd-sysupdate: that of the image's own tools (image-build/tools.sh), or one that is named.
TOOLS = Path(os.environ.get("HAIRPIN_TOOLS_TREE", ROOT / "image-build" / "cache" / "tools"))


@pytest.fixture(scope="session")
def newer(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Root:
    return make_root(tmp_path_factory.mktemp("newer"), image.keys, "0.2.0")


def lay_out(root: Root, directory: Path) -> Path:
    """As mkosi names the parts of a version."""
    directory.mkdir(exist_ok=True)
    sources = {
        "root": root.data,
        "tree": root.tree,
        "signature": root.signature,
        "kernel": root.kernel,
    }
    for name, source in sources.items():
        shutil.copyfile(source, directory / f"hairpin_{root.version}.{PARTS[name]}")
    return directory


@pytest.fixture
def release(newer: Root, tmp_path: Path) -> Path:
    return lay_out(newer, tmp_path / "release")


def test_a_release_is_checked_by_its_own_signatures(
    image: Image, newer: Root, release: Path
) -> None:
    found = check_release(find_parts(release), image.trusted, quiet)
    assert (found.version, found.root_hash) == ("0.2.0", newer.root_hash)
    numbers = found.numbers
    assert numbers["root"].replace("-", "") == newer.root_hash[:32]
    assert numbers["tree"].replace("-", "") == newer.root_hash[-32:]


@pytest.mark.parametrize(
    ("part", "at", "told"),
    [
        ("root", 8192, "block 2: changed"),
        ("tree", 4096, "not what was signed"),
        ("signature", 20, "root hash|does not fit|can't be read"),
        ("kernel", 100_000, "not the program that was signed|signature"),
    ],
)
def test_a_release_with_a_flipped_byte_is_refused(
    image: Image, release: Path, part: str, at: int, told: str
) -> None:
    files = find_parts(release)
    with flipped(files[part], at), pytest.raises(ImageError, match=told):
        check_release(files, image.trusted, quiet)
    check_release(files, image.trusted, quiet)


def test_a_release_of_somebody_else_is_refused(
    image: Image, release: Path, tmp_path: Path, newer: Root
) -> None:
    other = make_keys(tmp_path, "other")
    with pytest.raises(NotTrusted):
        check_release(find_parts(release), read_certificates(other.certificate), quiet)
    # Our kernel with another root of ours: each is signed, and they do not belong together.
    shutil.copyfile(image.root.kernel, find_parts(release)["kernel"])
    with pytest.raises(Damaged, match="signed for another root"):
        check_release(find_parts(release), image.trusted, quiet)


def test_a_release_is_one_and_whole(release: Path, tmp_path: Path) -> None:
    find_parts(release)["tree"].unlink()
    with pytest.raises(WrongInput, match=r"0 files hairpin_VERSION\.root-x86-64-verity\.raw"):
        find_parts(release)
    with pytest.raises(WrongInput):
        find_parts(tmp_path)


def test_a_release_is_taken_out_of_an_image(
    image: Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["image", "extract", str(image.disk), "--output", str(out), "--json"]
    assert run_cli([*argv, "--certificate", str(image.keys.certificate)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["version"] == "0.1.0"
    assert sorted(told["files"]) == sorted(one.name for one in out.iterdir())
    assert find_parts(out)["root"].read_bytes() == image.root.data.read_bytes()
    assert update.find_named_version(out) == "0.1.0"
    assert update.find_named_version(image.disk) is None
    with stage(image.disk, tmp_path / "staged", quiet) as files:
        assert check_release(files, image.trusted, quiet).version == "0.1.0"
    assert not (tmp_path / "staged").exists()


# A release comes from outside


def test_a_part_that_is_a_packed_image_is_not_unpacked(
    image: Image, release: Path, tmp_path: Path
) -> None:
    """What is written is the file: a qcow2 in it would be checked as one thing and written as another."""
    kernel = find_parts(release)["kernel"]
    packed = tmp_path / "packed"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", kernel, packed)
    shutil.copyfile(packed, kernel)
    with stage(release, tmp_path / "staged", quiet) as files:
        assert files["kernel"].read_bytes() == packed.read_bytes()
        with pytest.raises(Damaged, match="no EFI program"):
            check_release(files, image.trusted, quiet)


@pytest.mark.parametrize("what", ["link", "directory", "pipe"])
def test_a_part_that_is_no_file_is_refused(release: Path, tmp_path: Path, what: str) -> None:
    """A link on a disk that was attached may lead to any other disk, and fill /var with it."""
    root = find_parts(release)["root"]
    moved = root.rename(tmp_path / "moved")
    if what == "link":
        root.symlink_to(moved)
    elif what == "directory":
        root.mkdir()
    else:
        os.mkfifo(root)
    with pytest.raises(WrongInput), stage(release, tmp_path / "staged", quiet):
        pass
    assert not (tmp_path / "staged").exists()


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_too_large_is_not_staged(release: Path, tmp_path: Path, name: str) -> None:
    with open(find_parts(release)[name], "r+b") as opened:
        opened.truncate(2**40)
    with (
        pytest.raises(ImageError, match="1099511627776 bytes, more than"),
        stage(release, tmp_path / "staged", quiet),
    ):
        pass


def test_staging_leaves_room_for_alerts(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A whole disk as the reserve: one that is nearly full is not to be had without mounting.
    monkeypatch.setattr(update, "FREE_SHARE", 1)
    with (
        pytest.raises(ImageError, match="would be nearly full"),
        stage(release, tmp_path / "staged", quiet),
    ):
        pass
    assert not (tmp_path / "staged").exists()


def test_a_place_that_can_t_be_made_is_told(release: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ImageError, match="can't be staged"),
        stage(release, tmp_path / "file" / "staged", quiet),
    ):
        pass


def test_a_directory_that_can_t_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="No such file"):
        find_parts(tmp_path / "none")


def test_parts_that_are_not_what_was_signed_do_not_stay(image: Image, tmp_path: Path) -> None:
    """Who does not look at the status would put them on a disk for updates."""
    out = tmp_path / "out"
    argv = ["image", "extract", str(image.disk), "--output", str(out)]
    with flipped(image.disk, image.partition("hairpin_0.1.0").offset + 9000):
        assert run_cli([*argv, "--certificate", str(image.keys.certificate)]) == 1
    assert list(out.iterdir()) == []
    (out / f"hairpin_0.1.0.{PARTS['kernel']}").write_text("of somebody")
    assert run_cli([*argv, "--certificate", str(image.keys.certificate)]) == 2
    assert [one.read_text() for one in out.iterdir()] == ["of somebody"]


@pytest.mark.parametrize(
    ("version", "running", "newer"),
    [
        ("0.2.0", "0.1.0", True), ("0.10.0", "0.9.0", True), ("1.0", "1.0~rc1", True),
        ("0.1.0", "0.1.0", False), ("0.1.0", "0.2.0", False), ("1.0~rc1", "1.0", False),
    ],
)  # fmt: skip
def test_only_a_newer_version_is_taken(version: str, running: str, newer: bool) -> None:
    one = Release(version, "0" * 64, "", {}, "0" * 64)
    if newer:
        check_newer(one, running)
        return
    with pytest.raises(ImageError, match="is not newer"):
        check_newer(one, running)


def test_the_command_is_for_the_appliance(
    image: Image, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["image", "update", str(release), "--certificate", str(image.keys.certificate)]
    assert run_cli(argv) == 1
    assert "no appliance image" in capsys.readouterr().err


# The real systemd-sysupdate, on a disk that is a file


@pytest.fixture
def tree() -> Path:
    """A Debian 13, with a place that it sees under the same name."""
    if not (TOOLS / "usr/lib/systemd/systemd-sysupdate").exists():
        pytest.fail(f"no systemd-sysupdate in {TOOLS}: `make image` makes it")
    return TOOLS


def update_disk(tree: Path, directory: Path, disk: Path, found: Release, running: str) -> Path:
    """Run our transfer files, with other places: gives where the kernels are."""
    kernels, definitions = directory / "kernels", directory / "definitions"
    kernels.mkdir(exist_ok=True)
    shutil.rmtree(definitions, ignore_errors=True)
    definitions.mkdir()
    for path in TRANSFERS.glob("*.transfer"):
        text = path.read_text()
        changes = [
            (f"Path={update.STAGING}", f"Path={directory}/staging"),
            ("Path=auto", f"Path={disk}"),
            ("Path=/EFI/Linux\nPathRelativeTo=boot", f"Path={kernels}"),
            ("%A", running),
        ]
        for old, new in changes:
            assert old in text or old not in path.read_text()
            text = text.replace(old, new)
        (definitions / path.name).write_text(text)
    # Its own mounts: gone with the command.
    script = 'mount --rbind "$2" "$1/mnt" && mount -t proc proc "$1/proc" && shift 2 && exec "$@"'
    inside = str(directory)
    command = [
        "chroot",
        str(tree),
        "/bin/sh",
        "-ec",
        'mkdir -p "$1"; mount --bind /mnt "$1"; shift; exec "$@"',
        "x",
        inside,
    ]
    command += [str(update.SYSUPDATE), f"--definitions={definitions}", "--verify=no", "--no-pager"]
    command += ["update", found.version]
    run("unshare", "--mount", "sh", "-ec", script, "x", tree, directory, *command)
    return kernels


def read_partitions(disk: Path) -> tuple[Partition, ...]:
    with open_device_to_read(disk) as opened:
        return read_table(opened).partitions


@pytest.mark.vm
def test_sysupdate_writes_the_release_beside_the_running_one(
    image: Image, newer: Root, tree: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.raw"
    run("cp", "--sparse=always", image.disk, disk)
    # What a version before may have left there: nothing of it may stay behind the new one.
    empty = [one for one in read_partitions(disk) if one.name == "_empty"]
    with open(disk, "r+b") as opened_disk:
        for one in empty:
            opened_disk.seek(one.offset)
            opened_disk.write(b"left" * (one.size // 4))
    lay_out(newer, tmp_path / "staging")
    found = check_release(find_parts(tmp_path / "staging"), image.trusted, quiet)
    name_for_sysupdate(found)
    kernels = update_disk(tree, tmp_path, disk, found, "0.1.0")
    assert [one.name for one in kernels.iterdir()] == ["hairpin_0.2.0+3-0.efi"]
    # Its kernel belongs on the boot partition: then the whole disk is as signed, with both versions.
    with (
        open_device_to_read(disk) as opened,
        pytest.raises(ImageError, match="the new kernel is 0 times"),
    ):
        check_written(opened, found, image.trusted, quiet)
    at = f"{disk}@@{image.partition('esp').offset}"
    run("mcopy", "-i", at, kernels / "hairpin_0.2.0+3-0.efi", "::/EFI/Linux/")
    with open_device_to_read(disk) as opened:
        check_written(opened, found, image.trusted, quiet)
        verdict = verify_image(opened, Wanted(image.trusted, image.manifest, ran=True), quiet)
    assert [one for one in verdict.findings if not one.good] == []
    assert set(verdict.versions) == {"0.1.0", "0.2.0"}
    # And the next one takes the place of the one that does not run.
    third = make_root(tmp_path, image.keys, "0.3.0")
    shutil.rmtree(tmp_path / "staging")
    lay_out(third, tmp_path / "staging")
    again = check_release(find_parts(tmp_path / "staging"), image.trusted, quiet)
    name_for_sysupdate(again)
    update_disk(tree, tmp_path, disk, again, "0.2.0")
    run("mcopy", "-i", at, kernels / "hairpin_0.3.0+3-0.efi", "::/EFI/Linux/")
    with open_device_to_read(disk) as opened:
        check_written(opened, found, image.trusted, quiet)
        check_written(opened, again, image.trusted, quiet)


def test_what_was_written_badly_is_told(
    image: Image, newer: Root, tmp_path: Path, release: Path
) -> None:
    found = check_release(find_parts(release), image.trusted, quiet)
    with (
        open_device_to_read(image.disk) as opened,
        pytest.raises(ImageError, match="the new root is not there"),
    ):
        check_written(opened, found, image.trusted, quiet)
    old = replace(
        found,
        version="0.1.0",
        root_hash=image.root.root_hash,
        kernel_sha256=hashlib.sha256(image.root.kernel.read_bytes()).hexdigest(),
    )
    with open_device_to_read(image.disk) as opened:
        check_written(opened, old, image.trusted, quiet)
    root = image.partition("hairpin_0.1.0")
    with (
        flipped(image.disk, root.offset + 4096 * 9),
        open_device_to_read(image.disk) as opened,
        pytest.raises(ImageError, match="not written well: block 9"),
    ):
        check_written(opened, old, image.trusted, quiet)
    with open_device_to_read(image.disk) as opened:
        esp = image.partition("esp")
        kernel = next(one for one in read_tree(esp.of(opened)).files if "hairpin" in one.path)
    start = esp.offset + kernel.data_at
    places = [start + (one - 2) * kernel.cluster_size for one in kernel.clusters]
    # First and last byte, and those between: the padding behind its signature counts as well.
    last = places[-1] + (kernel.size - 1) % kernel.cluster_size
    for at in (places[0], *random.Random(1).sample(places, 20), last):
        with (
            flipped(image.disk, at),
            open_device_to_read(image.disk) as opened,
            pytest.raises(ImageError, match="the new kernel was not written well") as caught,
        ):
            check_written(opened, old, image.trusted, quiet)
        assert "update again" in caught.value.mend


def test_a_version_that_was_not_written_well_is_not_tried(tmp_path: Path) -> None:
    names = ("hairpin_0.2.0+3-0.efi", "hairpin_0.2.0.efi", "hairpin_0.2.0+2.efi")
    others = ("hairpin_0.1.0.efi", "hairpin_0.2.0.1+3.efi", "loader.efi")
    for name in (*names, *others):
        (tmp_path / name).touch()
    withdraw("0.2.0", [tmp_path, tmp_path / "none"])
    assert {one.name for one in tmp_path.iterdir()} == set(others)
    forget_cached(tmp_path / others[0])
    with pytest.raises(ImageError, match="No such file"):
        forget_cached(tmp_path / "none")


# The check after a boot


def build_health(*lanes: tuple[str, bool, str], switch: str = "ok") -> Health:
    return Health.model_validate(
        {
            "status": "ok",
            "version": "1",
            "startedAt": "2026-01-01T00:00:00Z",
            "components": {
                "switch": {"status": switch},
                "store": {"status": "ok"},
                "rules": {"status": "ok"},
                "lanes": [
                    {
                        "name": name, "profile": name, "inspecting": inspecting, "engine": "running",
                        "bfd": bfd,
                    }
                    for name, inspecting, bfd in lanes
                ],
            },
        }
    )  # fmt: skip


GOOD = (("prevent", True, "up"), ("detect", True, "up"))


def build_proofs(*passed: bool | None) -> LaneProofs:
    from unittest.mock import Mock

    lanes = [
        Mock(lane=f"lane{number}", canary=None if one is None else Mock(passed=one, detail="lost"))
        for number, one in enumerate(passed)
    ]
    return Mock(lanes=lanes)  # type: ignore[no-any-return]


def test_a_version_is_kept_when_every_lane_forwards_and_inspects() -> None:
    assert judge_lanes(build_health(*GOOD)).passed
    assert not judge_lanes(build_health()).passed
    assert not judge_lanes(build_health(*GOOD, switch="failing")).passed
    one = judge_lanes(build_health(GOOD[0], ("detect", True, "down")))
    assert one.lacking == ("lane detect: nothing is forwarded (down)",)
    two = judge_lanes(build_health(("prevent", False, "up"), GOOD[1]))
    assert two.lacking == ("lane prevent: not inspecting (running)",)


def test_a_canary_that_was_not_blocked_or_not_sent_is_lacking() -> None:
    assert judge_proofs(build_proofs(True, True)).passed
    assert len(judge_proofs(build_proofs(True, False, None)).lacking) == 2
    assert judge_faults(["api.token: must be given"]).lacking == (
        "not set up: api.token: must be given",
    )


class Service:
    """One that gets well after a while. A real one can't be made to do so at a given question."""

    def __init__(self, healths: list[Health | None], proofs: list[LaneProofs]) -> None:
        self.healths, self.proofs = healths, proofs
        self.now = 0.0

    def read_health(self) -> Health:
        health = self.healths.pop(0) if len(self.healths) > 1 else self.healths[0]
        if health is None:
            raise HairpinError("it does not answer")
        return health

    def prove(self) -> LaneProofs:
        return self.proofs.pop(0) if len(self.proofs) > 1 else self.proofs[0]

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, seconds: float = 60.0) -> bootcheck.Verdict:
        return wait_until_good(self.read_health, self.prove, seconds, lambda: self.now, self.pause)


def test_it_waits_until_all_is_well_but_not_for_ever() -> None:
    bad = build_health(GOOD[0], ("detect", False, "up"))
    service = Service([None, bad, build_health(*GOOD)], [build_proofs(False), build_proofs(True)])
    assert service.wait().passed
    assert service.now == 3 * bootcheck.PAUSE_SECONDS
    silent = Service([None], [build_proofs(True)])
    assert silent.wait(60.0).lacking == ("the management service: it does not answer",)
    assert 60.0 <= silent.now <= 64.0
    passed = Service([build_health(*GOOD)], [build_proofs(False)])
    assert not passed.wait(10.0).passed


def make_variable(path: Path, kernel: str) -> Path:
    """As systemd-boot writes it: attributes, then UTF-16."""
    path.write_bytes(b"\x06\0\0\0" + f"\\EFI\\Linux\\{kernel}\0".encode("utf-16-le"))
    return path


def test_only_a_version_on_trial_with_another_to_go_back_to_is_turned_out(tmp_path: Path) -> None:
    kernels = tmp_path / "Linux"
    kernels.mkdir()
    trial = make_variable(tmp_path / "counted", "hairpin_0.2.0+2-1.efi")
    with pytest.raises(HairpinError, match="not seen"):
        bootcheck.read_boot(trial, (kernels,))
    (kernels / "hairpin_0.2.0+2-1.efi").touch()
    assert bootcheck.read_boot(tmp_path / "none", (kernels,)) == bootcheck.Boot(False, 0)
    assert bootcheck.read_boot(trial, (kernels,)) == bootcheck.Boot(True, 0)
    (kernels / "hairpin_0.1.0.efi").touch()
    assert bootcheck.read_boot(trial, (kernels, kernels)) == bootcheck.Boot(True, 1)
    (kernels / "hairpin_0.2.0+2-1.efi").rename(kernels / "hairpin_0.2.0.efi")
    assert bootcheck.read_boot(trial, (kernels,)) == bootcheck.Boot(False, 1)
    trial.write_bytes(b"\x06\0\0\0\0\0")
    with pytest.raises(HairpinError, match="can't be read"):
        bootcheck.read_boot(trial, (kernels,))


def test_what_the_boot_loader_counts_is_not_passed_over_when_nobody_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> bootcheck.Boot:
        raise HairpinError("the boot partition is not seen")

    monkeypatch.setattr(bootcheck, "read_boot", refuse)
    token = tmp_path / "token"
    token.write_text("x")
    argv = ["image", "check", "--seconds", "1", "--url", "http://127.0.0.1:1"]
    assert run_cli([*argv, "--token-file", str(token)]) == 1
    assert "lacking:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("boot", "status"),
    [
        (bootcheck.Boot(True, 1), 1),
        (bootcheck.Boot(True, 0), 0),
        (bootcheck.Boot(False, 1), 0),
    ],
)
def test_the_command_ends_with_1_only_when_that_helps(
    boot: bootcheck.Boot,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bootcheck, "read_boot", lambda: boot)
    token = tmp_path / "token"
    token.write_text("x")
    argv = ["image", "check", "--seconds", "1", "--json", "--url", "http://127.0.0.1:1"]
    assert run_cli([*argv, "--token-file", str(token)]) == status
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["passed"] is (status == 0)
    assert bool(told["lacking"]) is (status == 1)


def test_a_setup_with_faults_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootcheck, "read_boot", lambda: bootcheck.Boot(True, 1))
    faults = tmp_path / "faults.json"
    faults.write_text(
        json.dumps({"faults": [{"path": "lanes", "reason": "must be given", "mend": ""}]})
    )
    assert run_cli(["image", "check", "--faults", str(faults)]) == 1
    assert "lanes: must be given" in capsys.readouterr().out


def test_the_unit_is_well_formed_and_hardened(tmp_path: Path) -> None:
    unit = tmp_path / "hairpin-boot-check.service"
    text = (UNITS / unit.name).read_text()
    # Its program is in the image alone.
    unit.write_text(text.replace("/usr/bin/hairpin", "/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (verified.returncode, verified.stderr) == (0, "")
    told = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--json=short", "--threshold=25", str(unit)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout
    assert "FailureAction=reboot" in text
    assert "RequiredBy=boot-complete.target" in text
