"""First boot by its real doors: devices of a namespace, a disk, the product's user, systemd-networkd."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from appliance.firstboot import door
from appliance.firstboot.faults import read_report
from appliance.settings import read_settings
from tests.support.seed import TOKEN, build_seed, change

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]
ROOT = Path(__file__).resolve().parents[2]
MACS = (
    "52:54:00:10:00:01",
    "52:54:00:10:01:0a",
    "52:54:00:10:01:0b",
    "52:54:00:10:02:01",
    "52:54:00:10:03:01",
)


class Namespace:
    """Devices en0 to en4 with the seed's addresses; their other ends are up."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        # Names of its own: first boot sets the host's.
        command = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount", *argv]
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **more
        )

    def hairpin(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "appliance.cli", *words]
        return self.run(*argv, env={**os.environ, **env})


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    name = f"firstboot-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for number, mac in enumerate(MACS):
            argv = ["ip", "-n", name, "link", "add", f"en{number}", "address", mac, "type", "veth"]
            subprocess.run([*argv, "peer", "name", f"peer{number}"], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", f"peer{number}", "up"], check=True)
        yield Namespace(name)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    path = tmp_path / "credentials"
    path.mkdir()
    seed = change("visibility", {"mac": MACS[4]})
    (path / "hairpin.seed").write_text(yaml.safe_dump(seed))
    return path


def test_a_boot_with_the_real_devices_and_users(
    tmp_path: Path, credentials: Path, namespace: Namespace
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    script = 'umask 077; "$@" && hostname'
    argv = [sys.executable, "-m", "appliance.cli", "firstboot", "--root", str(root)]
    env = {**os.environ, "CREDENTIALS_DIRECTORY": str(credentials)}
    done = namespace.run("sh", "-c", script, "sh", *argv, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "rack-12"
    assert os.uname().nodename != "rack-12"
    config = root / "run/hairpin-config"
    (lane,) = read_settings(config / "settings.yaml").build_lanes(2)
    assert (lane.leg_a.device, lane.leg_b.device) == ("en1", "en2")
    user = pwd.getpwnam("hairpin")
    for path in (config / "api.key", config / "switch.key", root / "var/lib/hairpin/token"):
        seen = path.stat()
        assert (seen.st_uid, seen.st_gid, seen.st_mode & 0o777) == (user.pw_uid, user.pw_gid, 0o600)
    # Whatever its umask: networkd and the product's users look into these.
    for path in (config, root / "run/systemd/network", root / "var/lib/hairpin"):
        assert path.stat().st_mode & 0o777 == 0o755
    assert (root / "var/lib/hairpin-firstboot").stat().st_mode & 0o777 == 0o700
    shown = namespace.hairpin("console-status", "--root", str(root)).stdout
    assert "=== Hairpin rack-12, version" in shown
    assert "the API does not answer" in shown


def test_a_bridge_with_a_legs_address_is_not_taken_for_the_leg(
    tmp_path: Path, credentials: Path, namespace: Namespace
) -> None:
    for words in (
        ["link", "add", "lane", "address", MACS[1], "type", "bridge"],
        ["link", "set", "en1", "master", "lane"],
    ):
        subprocess.run(["ip", "-n", namespace.name, *words], check=True)
    where = {"CREDENTIALS_DIRECTORY": str(credentials)}
    done = namespace.hairpin("firstboot", "--root", str(tmp_path), **where)
    assert done.returncode == 0, done.stderr


def test_a_device_that_is_missing_is_waited_for_and_told(
    tmp_path: Path, credentials: Path, namespace: Namespace
) -> None:
    subprocess.run(["ip", "-n", namespace.name, "link", "del", "en2"], check=True)
    root = tmp_path / "root"
    root.mkdir()
    where = {"CREDENTIALS_DIRECTORY": str(credentials)}
    done = namespace.hairpin("firstboot", "--root", str(root), **where)
    assert done.returncode == 2
    assert f"lanes[0].legB.mac: no device has {MACS[2]}" in done.stderr
    assert TOKEN not in done.stderr
    report = read_report(root / "run/hairpin-config/faults.json")
    assert report is not None
    assert report.reachable
    assert not (root / "run/hairpin-config/settings.yaml").exists()


def test_networkd_does_what_the_files_say(
    tmp_path: Path, credentials: Path, namespace: Namespace
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    where = {"CREDENTIALS_DIRECTORY": str(credentials)}
    assert namespace.hairpin("firstboot", "--root", str(root), **where).returncode == 0
    files = root / "run/systemd/network"
    done = namespace.run(sys.executable, "-m", "tests.support.networkd", str(files), "en1")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert "Unknown" not in told["log"], told["log"]
    before = {link["ifname"]: link for link in told["before"]}
    after = {link["ifname"]: link for link in told["after"]}
    links = {link["ifname"]: link for link in told["links"]}

    def addresses(link: Any) -> list[str]:
        return [f"{one['local']}/{one['prefixlen']}" for one in link["addr_info"]]

    assert addresses(after["en0"]) == ["192.0.2.10/24"]
    assert [one["gateway"] for one in told["routes"] if one["dst"] == "default"] == ["192.0.2.1"]
    for name in ("en1", "en2", "en3", "en4"):
        assert addresses(after[name]) == []
        assert "NOARP" in after[name]["flags"]
        assert links[name]["inet6_addr_gen_mode"] == "none"
        assert ("UP" in before[name]["flags"]) == (name == "en4")
    # What `inspect` does with a leg stays done.
    assert after["en1"]["master"] == "lane"
    assert "UP" in after["en1"]["flags"]


# A NoCloud disk


def find_file_system() -> tuple[str, Callable[[Path, Path], list[list[str]]]]:
    """vfat where this kernel has it, else ext4: what differs is the kernel's part alone. `tests/vm` has both."""
    if "\tvfat\n" in Path("/proc/filesystems").read_text() and shutil.which("mcopy"):
        return "vfat", lambda image, files: [
            ["mkfs.vfat", "-n", "CIDATA", "-C", str(image), "4096"],
            ["mcopy", "-i", str(image), *map(str, sorted(files.iterdir())), "::/"],
        ]
    return "ext4", lambda image, files: [
        ["mkfs.ext4", "-q", "-L", "CIDATA", "-d", str(files), str(image), "4096k"]
    ]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name, build = find_file_system()
    monkeypatch.setattr(door, "FILE_SYSTEMS", ("iso9660", name))
    files, image = tmp_path / "files", tmp_path / "disk.img"
    files.mkdir()
    (files / "user-data").write_text("#cloud-config\n" + yaml.safe_dump({"hairpin": build_seed()}))
    (files / "meta-data").write_text("instance-id: rack-12\n")
    for argv in build(image, files):
        subprocess.run(argv, check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/sbin"})
    made = subprocess.run(
        ["losetup", "--read-only", "--find", "--show", str(image)],
        check=True,
        capture_output=True,
        text=True,
    )
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_disk_is_found_by_its_label_and_read(disk: str) -> None:
    assert door.find_disks() == (disk,)
    files, faults = door.read_disk()
    assert faults == ()
    assert files is not None
    assert sorted(files) == ["meta-data", "user-data"]
    assert b"hairpin:" in files["user-data"]
    assert "hairpin-seed-" not in Path("/proc/self/mounts").read_text()


def test_a_disk_that_can_not_be_mounted_is_a_fault_and_not_no_seed(
    disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "FILE_SYSTEMS", ("iso9660",))
    files, faults = door.read_disk()
    assert files is None
    assert "can't be read: `mount -t iso9660" in faults[0].reason
