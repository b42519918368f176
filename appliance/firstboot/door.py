"""The door to what first boot looks at: credentials, a NoCloud disk, network devices. All of it bounded."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import structlog
from pyroute2 import IPRoute, NetlinkError

from appliance.firstboot.faults import Fault
from appliance.firstboot.network import Device
from appliance.firstboot.offer import (
    NOT_READ,
    PREFIX,
    SEED_LIMIT,
    Offered,
)
from steering.errors import CommandFailed
from steering.run import run

log = structlog.get_logger("firstboot")

LABELS = ("CIDATA", "cidata")
DISK_FILES = ("user-data", "meta-data", *NOT_READ)
FILE_SYSTEMS = ("iso9660", "vfat")
CREDENTIALS_LIMIT = 64
MAC_BYTES = 6
SETTLE_SECONDS = 30
DEVICE_SECONDS = 15.0
_OUR_OWN = ("bridge", "vlan", "bond", "macvlan", "ifb")
"""Kinds of devices that take another's address: a lane's bridge has that of a leg."""
_NOTHING_FOUND = 2  # blkid(8)


def read_offered(credentials: Path) -> Offered:
    """What this boot offers. Never raises: what can't be read is a fault."""
    values, faults = read_credentials(credentials)
    disk, disk_faults = read_disk()
    return Offered(values, disk, (*faults, *disk_faults))


def read_credentials(directory: Path) -> tuple[Mapping[str, bytes], tuple[Fault, ...]]:
    """The credentials that are meant for Hairpin, by name; none where there is no such directory."""
    found: dict[str, bytes] = {}
    faults: list[Fault] = []
    try:
        names = sorted(name for name in os.listdir(directory) if name.startswith(PREFIX))
    except FileNotFoundError:
        return {}, ()
    except OSError as fault:
        mend = "see `systemctl status hairpin-firstboot`"
        return {}, (Fault("credentials", f"{directory}: {fault.strerror}", mend),)
    if len(names) > CREDENTIALS_LIMIT:
        mend = f"give {CREDENTIALS_LIMIT} at most"
        return {}, (Fault("credentials", f"{len(names)} that begin with {PREFIX}", mend),)
    for name in names:
        try:
            found[name] = read_regular(directory / name)
        except OSError as fault:
            reason = f"can't be read: {fault.strerror}"
            faults.append(Fault(f"credential {name}", reason, "give it as text"))
    return found, tuple(faults)


def read_regular(path: Path, limit: int = SEED_LIMIT) -> bytes:
    """A regular file, and no more than a byte above ``limit`` of it. Raises OSError, and never waits."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(handle, "rb") as opened:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(0, "no regular file")
        return opened.read(limit + 1)


def read_disk() -> tuple[Mapping[str, bytes] | None, tuple[Fault, ...]]:
    """The files of the NoCloud disk, by name; None where no disk has its label."""
    path = "disk CIDATA"
    try:
        disks = find_disks()
        if not disks:
            return None, ()
        if len(disks) > 1:
            mend = "take all but one away"
            return None, (Fault(path, f"there are {len(disks)}: {', '.join(disks)}", mend),)
        return read_mounted(disks[0]), ()
    except CommandFailed as fault:
        mend = f"make it anew, as {' or '.join(FILE_SYSTEMS)} (docs/first-boot.md)"
        return None, (Fault(path, f"can't be read: {fault.reason}"[:1000], mend),)
    except OSError as fault:
        return None, (Fault(path, f"can't be read: {fault.strerror}", "make it anew"),)


def find_disks() -> tuple[str, ...]:
    """Devices with the label of a NoCloud disk, as blkid finds them. Raises CommandFailed."""
    if shutil.which("udevadm"):  # without udev nothing is still being named
        argv = ["udevadm", "settle", f"--timeout={SETTLE_SECONDS}"]
        run(argv, timeout=SETTLE_SECONDS + 5, check=False)
    found: dict[str, None] = {}
    for label in LABELS:
        argv = ["blkid", "-c", "/dev/null", "-t", f"LABEL={label}", "-o", "device"]
        done = run(argv, check=False)
        if done.status not in (0, _NOTHING_FOUND):
            raise CommandFailed(" ".join(argv), done.status, done.stderr)
        found |= dict.fromkeys(line for line in done.stdout.split() if line.startswith("/dev/"))
    return tuple(found)


def read_mounted(device: str) -> Mapping[str, bytes]:
    """The seed's files on a disk, mounted for as long as that takes. Raises CommandFailed, OSError."""
    with tempfile.TemporaryDirectory(prefix="hairpin-seed-") as where:
        options = "ro,nosuid,nodev,noexec"
        run(["mount", "-t", ",".join(FILE_SYSTEMS), "-o", options, "--", device, where])
        try:
            return read_directory(Path(where))
        finally:
            run(["umount", "--", where])


def read_directory(where: Path) -> Mapping[str, bytes]:
    """The files of a NoCloud disk that mean something here. Raises OSError."""
    found = {}
    for name in DISK_FILES:
        try:
            found[name] = read_regular(where / name)
        except FileNotFoundError:
            continue
    return found


def read_devices() -> tuple[Device, ...]:
    """Ethernet devices of this network namespace, without the loopback and what is made on top of others.

    Raises NetlinkError, OSError.
    """
    found = []
    with IPRoute() as netlink:
        for link in netlink.get_links():
            mac = str(link.get("IFLA_PERM_ADDRESS") or link.get("IFLA_ADDRESS") or "").lower()
            kind = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
            name = str(link.get("IFLA_IFNAME"))
            plain = mac.count(":") == MAC_BYTES - 1 and mac != "00:00:00:00:00:00"
            if plain and name != "lo" and kind not in _OUR_OWN:
                found.append(Device(name, mac))
    return tuple(found)


def wait_for_devices(
    macs: Collection[str], seconds: float = DEVICE_SECONDS
) -> tuple[tuple[Device, ...], tuple[Fault, ...]]:
    """All devices, as soon as those with ``macs`` are there, or when the time is over."""
    ends = time.monotonic() + seconds
    while True:
        try:
            devices = read_devices()
        except (NetlinkError, OSError) as fault:
            mend = "see `journalctl -u hairpin-firstboot`"
            return (), (Fault("devices", f"can't be listed: {fault}", mend),)
        missing = set(macs) - {device.mac for device in devices}
        if not missing or time.monotonic() >= ends:
            return devices, ()
        time.sleep(0.25)
