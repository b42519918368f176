"""Rules for an image that does not run: tried by the real Suricata, signed, written so that a cut leaves a copy."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.cli import run_cli
from appliance.image import refresh
from appliance.image.bundle import Read
from appliance.image.disk import open_device_to_read, open_to_write
from appliance.image.gpt import Partition, read_table
from appliance.image.model import ImageError
from appliance.image.refresh import RuleFiles, Tried, read_rules, sign_bundle, write_bundle
from appliance.image.signing import read_pair
from appliance.rules.model import RulesError
from steering.errors import WrongInput
from tests.support.disk_images import Keys, flipped, make_keys, run
from tests.support.rule_pipelines import rule, write_feed
from tests.unit.image.conftest import Image


@pytest.fixture
def disk(image: Image, tmp_path: Path) -> Path:
    copy = tmp_path / "disk.raw"
    run("cp", "--sparse=always", image.disk, copy)
    return copy


@pytest.fixture
def partition(image: Image) -> Partition:
    return image.partition("hairpin-rules")


def build(image: Image, serial: int, size: int = 0) -> bytes:
    """A slot with rules that nobody tried."""
    payload = refresh.pack_rules(
        [("a.rules", f"{rule(serial)}\n# {os.urandom(size).hex()}\n".encode())]
    )
    tried = Tried(payload, (), 1, (), (), 0)
    key, certificate = read_pair(image.keys.key, image.keys.certificate)
    return sign_bundle(tried, key, certificate, serial, time.time())[1]


def write(image: Image, disk: Path, partition: Partition, serial: int, size: int = 0) -> None:
    with open_to_write(disk) as opened:
        write_bundle(opened, partition, build(image, serial, size), image.trusted[0])


def read(image: Image, disk: Path) -> Read | None:
    with open_device_to_read(disk) as opened:
        return refresh.read_partition(opened, image.trusted)


def read_parts(disk: Path) -> tuple[Partition, ...]:
    with open_device_to_read(disk) as opened:
        return read_table(opened).partitions


def refresh_command(image: Image, disk: Path, rules: Path, *more: str) -> int:
    argv = ["image", "refresh", str(disk), "--rules", str(rules), "--key", str(image.keys.key)]
    return run_cli([*argv, "--certificate", str(image.keys.certificate), *more])


def test_a_refreshed_image_is_as_it_was_signed(
    image: Image, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feed = write_feed(
        tmp_path / "feed.tar.gz",
        rule(1),
        rule(2),
        "alert nonsense any (sid:3;)",
        rule(4, "http.uri;"),
    )
    assert refresh_command(image, disk, feed) == 0
    noted = capsys.readouterr().err
    assert "passed its trial" in noted
    assert "in force" not in noted  # of no engine
    assert refresh_command(image, disk, feed, "--json", "--serial", str(2**50)) == 0
    told = json.loads(capsys.readouterr().out)
    # Suricata itself finds that the last two can't be: the first two and the starter rules load.
    assert told["rules"] == 4
    assert told["leftOut"] == 2
    assert told["loaded"]["prevent"] == told["loaded"]["detect"] == 42 + 1 + 2
    argv = ["image", "verify", str(disk), "--certificate", str(image.keys.certificate)]
    assert run_cli([*argv, "--manifest", str(image.manifest_file)]) == 0
    assert "rules copy 2" in capsys.readouterr().out
    assert run_cli(["image", "rules", str(disk), *argv[3:]]) == 0
    said = capsys.readouterr().out
    assert f"serial {told['serial']}" in said
    assert "0 days old" in said
    assert "feed.tar.gz" in said


def test_a_qcow2_is_refreshed_in_place(
    image: Image, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "disk,1.qcow2"
    run("qemu-img", "convert", "-O", "qcow2", disk, packed)
    rules = tmp_path / "own.rules"
    rules.write_text(rule(77) + "\n")
    assert refresh_command(image, packed, rules) == 0
    run("qemu-img", "convert", "-O", "raw", packed, disk)
    found = read(image, disk)
    assert found is not None
    assert found.faults == ()
    assert b"content" not in found.bundle.payload  # packed
    argv = ["image", "verify", str(packed), "--certificate", str(image.keys.certificate)]
    assert run_cli([*argv, "--manifest", str(image.manifest_file)]) == 0


def test_rules_that_do_not_load_are_not_signed(
    image: Image, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = disk.read_bytes()
    rules = tmp_path / "own.rules"
    rules.write_text("pass tcp any any -> any any (sid:5;)\n# nothing\n")
    assert refresh_command(image, disk, rules) == 1
    assert "passes the checks" in capsys.readouterr().err
    assert disk.read_bytes() == before


def test_rules_of_which_suricata_takes_none_are_not_signed(
    image: Image, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They pass the checks; what would be signed then is a bundle by which nothing is inspected."""
    before = disk.read_bytes()
    rules = tmp_path / "own.rules"
    rules.write_text(
        f"{rule(4, 'http.uri;')}\n{rule(5, 'nosuchkeyword:1;')}\npass ip any any -> any any (sid:6;)\n"
    )
    assert refresh_command(image, disk, rules) == 1
    assert "none of the rules loads" in capsys.readouterr().err
    assert disk.read_bytes() == before


def test_a_key_of_another_certificate_is_refused(
    image: Image, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_keys(tmp_path, "other")
    argv = ["image", "refresh", str(disk), "--rules", str(tmp_path), "--key", str(other.key)]
    assert run_cli([*argv, "--certificate", str(image.keys.certificate)]) == 2
    assert "not the key of the certificate" in capsys.readouterr().err


def sign_by(keys: Keys, image: Image, disk: Path, tmp_path: Path, *more: str) -> int:
    """Refresh by a key, with one rule."""
    rules = tmp_path / "own.rules"
    rules.write_text(rule(77) + "\n")
    return refresh_command(replace(image, keys=keys), disk, rules, *more)


def test_a_key_that_the_image_does_not_know_is_refused(
    image: Image,
    disk: Path,
    partition: Partition,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An appliance that trusts the image's own certificate would not use its bundle, and say so at its next start."""
    other = make_keys(tmp_path, "other")
    for serial in (None, 10):
        if serial is not None:
            write(image, disk, partition, serial)
        before = disk.read_bytes()
        assert sign_by(other, image, disk, tmp_path) == 2
        said = capsys.readouterr().err
        assert "CN=other of a test" in said
        assert "signed neither the image's root nor the rules" in said
        assert "--other-signer" in said
        assert disk.read_bytes() == before


def test_another_key_signs_when_that_is_said_and_then_goes_on(
    image: Image,
    disk: Path,
    partition: Partition,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_keys(tmp_path, "other")
    write(image, disk, partition, 10)
    assert sign_by(other, image, disk, tmp_path, "--other-signer") == 0
    assert "a bundle by another key was there" in capsys.readouterr().err
    # By the key of the bundle that is there, nothing need be said.
    assert sign_by(other, image, disk, tmp_path, "--serial", str(2**50)) == 0
    assert "another key" not in capsys.readouterr().err
    # The image's own key always may; that another one stood there is told.
    assert sign_by(image.keys, image, disk, tmp_path, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert "another key" in told["faults"][0]


def test_a_renewed_certificate_of_the_images_key_is_known(
    image: Image, disk: Path, tmp_path: Path
) -> None:
    renewed = tmp_path / "renewed.crt"
    argv = ["openssl", "req", "-x509", "-new", "-key", image.keys.key, "-sha256", "-days", "30"]
    run(*argv, "-subj", "/CN=renewed", "-out", renewed)
    assert sign_by(Keys(image.keys.key, renewed), image, disk, tmp_path) == 0


def test_a_root_whose_signature_can_t_be_read_vouches_for_nobody(
    image: Image, disk: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = next(one.offset for one in read_parts(disk) if one.name.endswith("_sig"))
    with open(disk, "r+b") as opened:
        opened.seek(place)
        opened.write(b"[]" + bytes(5000))
    assert sign_by(image.keys, image, disk, tmp_path) == 2
    assert "signed neither" in capsys.readouterr().err


def test_the_image_is_looked_at_before_the_rules_are_tried(
    image: Image,
    disk: Path,
    partition: Partition,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The trial takes half a minute. With an engine that is not there it would fail, and tell of that."""
    none = ("--suricata", str(tmp_path / "no-engine"))
    assert sign_by(image.keys, image, tmp_path / "no.raw", tmp_path, *none) == 2
    assert "No such file" in capsys.readouterr().err
    alien = tmp_path / "alien.raw"
    alien.write_bytes(bytes(2**20))
    assert sign_by(image.keys, image, alien, tmp_path, *none) == 1
    assert "partition table" in capsys.readouterr().err
    write(image, disk, partition, 10)
    assert sign_by(image.keys, image, disk, tmp_path, "--serial", "10", *none) == 2
    assert "it only grows" in capsys.readouterr().err
    assert sign_by(make_keys(tmp_path, "other"), image, disk, tmp_path, *none) == 2
    assert "signed neither" in capsys.readouterr().err
    with open_to_write(disk):
        assert sign_by(image.keys, image, disk, tmp_path, *none) == 1
        assert "a virtual machine runs on" in capsys.readouterr().err


def test_what_is_no_suricata_is_told_with_a_mend(
    image: Image, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for program in ("/bin/false", "/bin/true", str(tmp_path / "none")):
        assert sign_by(image.keys, image, disk, tmp_path, "--suricata", program) == 1
        said = capsys.readouterr().err
        assert program in said
        assert "--suricata" in said.partition("what to do:")[2]


class Torn:
    """A disk whose power goes after so many writes, half of the last one done. A real one can't be cut at will."""

    def __init__(self, disk, writes: int) -> None:  # type: ignore[no-untyped-def]
        self._disk, self._left = disk, writes
        self.size = disk.size

    def read(self, offset: int, size: int) -> bytes:
        return self._disk.read(offset, size)

    def write(self, offset: int, data: bytes) -> None:
        if not self._left:
            self._disk.write(offset, data[: len(data) // 2])
            raise ImageError("the power is gone")
        self._left -= 1
        self._disk.write(offset, data)


def test_a_write_that_is_cut_anywhere_leaves_a_whole_bundle(
    image: Image, disk: Path, partition: Partition
) -> None:
    write(image, disk, partition, 10, 300_000)
    before = disk.read_bytes()
    # Smaller, so that leftovers are to be cleared too.
    encoded = build(image, 11, 9_000)
    seen = set()
    for writes in range(30):
        disk.write_bytes(before)
        with open_to_write(disk) as opened:
            try:
                write_bundle(Torn(opened, writes), partition, encoded, image.trusted[0])
            except ImageError:
                done = False
            else:
                done = True
        found = read(image, disk)
        assert found is not None
        seen.add(found.bundle.header.serial)
        if done:
            break
        # And the next refresh goes through.
        write(image, disk, partition, 12)
        again = read(image, disk)
        assert again is not None
        assert (again.bundle.header.serial, again.faults) == (12, ())
    assert done
    assert writes > 6
    assert seen == {10, 11}


def test_leftovers_of_a_longer_bundle_are_cleared(
    image: Image, disk: Path, partition: Partition
) -> None:
    write(image, disk, partition, 10, 500_000)
    write(image, disk, partition, 11)
    argv = ["image", "verify", str(disk), "--certificate", str(image.keys.certificate)]
    assert run_cli([*argv, "--manifest", str(image.manifest_file)]) == 0


def test_a_flipped_byte_in_the_rules_is_named(
    image: Image, disk: Path, partition: Partition, capsys: pytest.CaptureFixture[str]
) -> None:
    write(image, disk, partition, 10, 5_000)
    argv = ["image", "verify", str(disk), "--certificate", str(image.keys.certificate), "--json"]
    argv += ["--manifest", str(image.manifest_file)]
    for at in (2, 70, 1000, 4000):
        with flipped(disk, partition.offset + partition.size // 2 + at):
            assert run_cli(argv) == 1
            bad = [
                one
                for one in json.loads(capsys.readouterr().out)["findings"]
                if one["status"] != "ok"
            ]
            assert bad[0]["place"] == "rules copy 2"
            found = read(image, disk)
            assert found is not None
            assert found.bundle.header.serial == 10


def test_an_image_that_was_enlarged_is_refreshed_too(
    image: Image, disk: Path, partition: Partition, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for a /var that is to grow at the first boot; the second table is then not at the end."""
    run("qemu-img", "resize", "-f", "raw", disk, "+20M")
    write(image, disk, partition, 10)
    found = read(image, disk)
    assert found is not None
    argv = ["image", "verify", str(disk), "--certificate", str(image.keys.certificate)]
    argv += ["--manifest", str(image.manifest_file)]
    assert run_cli(argv) == 1
    assert "the disk is larger than the table says" in capsys.readouterr().out
    assert run_cli([*argv, "--ran"]) == 0
    # But not by a table of which one copy is gone.
    with (
        flipped(disk, 512 + 30),
        open_to_write(disk) as opened,
        pytest.raises(ImageError, match="first partition table"),
    ):
        refresh.find_rules_partition(opened)


def test_a_bundle_that_does_not_fit_is_refused(
    image: Image, disk: Path, partition: Partition
) -> None:
    with pytest.raises(ImageError, match="a copy has"):
        write(image, disk, partition, 10, partition.size // 2)
    assert read(image, disk) is None


@pytest.fixture(params=["raw", "qcow2"])
def held(request: pytest.FixtureRequest, disk: Path, tmp_path: Path) -> Iterator[Path]:
    """An image that QEMU has open, and so locked, as a machine that runs on it has."""
    kind = request.param
    path = disk
    if kind == "qcow2":
        path = tmp_path / "disk.qcow2"
        run("qemu-img", "convert", "-O", "qcow2", disk, path)
    socket = tmp_path / "nbd"
    argv = ["qemu-nbd", "-f", kind, "--socket", str(socket), "--persistent", str(path)]
    with subprocess.Popen(argv) as process:
        try:
            for _ in range(300):
                if socket.exists():
                    break
                time.sleep(0.05)
            yield path
        finally:
            process.kill()


def test_an_image_that_a_machine_runs_on_is_left_alone(
    image: Image, held: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "own.rules"
    rules.write_text(rule(77) + "\n")
    before = held.read_bytes()
    assert refresh_command(image, held, rules) == 1
    assert "a virtual machine runs on" in capsys.readouterr().err
    certificate = ["--certificate", str(image.keys.certificate)]
    assert run_cli(["image", "verify", str(held), *certificate]) == 1
    assert "a virtual machine runs on" in capsys.readouterr().err
    assert held.read_bytes() == before


def test_no_machine_starts_on_an_image_that_is_refreshed(disk: Path) -> None:
    with open_to_write(disk):
        asked = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "read 0 512", str(disk)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert asked.returncode != 0
        assert "lock" in asked.stderr
        with pytest.raises(ImageError, match="runs on"), open_to_write(disk):
            pass
    run("qemu-io", "-f", "raw", "-c", "read 0 512", disk)


# What is given


def test_a_directory_of_feeds_is_read_by_name(tmp_path: Path) -> None:
    write_feed(tmp_path / "b.tar.gz", rule(2))
    (tmp_path / "a.rules").write_text(rule(1))
    (tmp_path / "notes.txt").write_text("no rules")
    given = read_rules(tmp_path)
    assert [one.name for one in given.sources] == ["a.rules", "b.tar.gz"]
    assert [name for name, _ in given.files] == ["a.rules", "rules/feed.rules"]
    assert isinstance(given, RuleFiles)


def test_what_is_no_feed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongInput):
        read_rules(tmp_path / "none")
    with pytest.raises(WrongInput, match="0 rule files"):
        read_rules(tmp_path)
    torn = tmp_path / "feed.tar.gz"
    torn.write_bytes(b"\x1f\x8b damaged")
    with pytest.raises(RulesError, match="damaged"):
        read_rules(torn)


def test_the_same_files_make_the_same_bundle() -> None:
    files = [("x/a.rules", b"one"), ("y/a.rules", b"two")]
    assert refresh.pack_rules(files) == refresh.pack_rules(files)
