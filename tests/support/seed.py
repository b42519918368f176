"""A seed with real certificates, and a machine's root directory to boot it in."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from appliance.commands.seed_reference import EXAMPLE
from appliance.firstboot.faults import Fault, FaultReport, SeedRefused, read_report
from appliance.firstboot.main import Doors, run_firstboot
from appliance.firstboot.network import Device
from appliance.firstboot.offer import Offered
from appliance.firstboot.places import Places
from appliance.firstboot.plan import Plan
from tests.support.certificates import NOW, Issued, issue

TOKEN = "7d1f6ad0c2b94e5f8a3c6b0e9d2f4a71"
DEVICES = (
    Device("ens3", "52:54:00:10:00:01"),
    Device("ens4", "52:54:00:10:01:0a"),
    Device("ens5", "52:54:00:10:01:0b"),
    Device("ens6", "52:54:00:10:02:01"),
    Device("ens7", "52:54:00:10:03:01"),
)


@cache
def find_authority() -> Issued:
    return issue("authority")


@cache
def find_switch_pair() -> Issued:
    return issue("appliance", find_authority())


def build_seed() -> dict[str, Any]:
    """The example of the page, with certificates that are some."""
    seed: dict[str, Any] = yaml.safe_load(EXAMPLE)
    seed["switch"]["ca"] = find_authority().certificate
    seed["switch"]["certificate"] = find_switch_pair().certificate
    seed["switch"]["key"] = find_switch_pair().key
    return seed


def change(path: str, value: object, seed: dict[str, Any] | None = None) -> dict[str, Any]:
    """A seed with ``value`` at a dotted path, numbers are places in a list; `...` takes it away."""
    document = copy.deepcopy(build_seed() if seed is None else seed)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at: Any = document
    for part in way:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return document


def offer(seed: Mapping[str, Any] | None, **credentials: str) -> Offered:
    """A seed as a credential, and others by their names with `_` for `.`, `-` as it is."""
    given = {
        f"hairpin.{name.replace('_', '-')}": text.encode() for name, text in credentials.items()
    }
    if seed is not None:
        given["hairpin.seed"] = json.dumps(seed).encode()
    return Offered(given)


@dataclass
class Machine:
    """An appliance whose files are below ``root``; its own user owns what the product's user would."""

    root: Path
    offered: Offered = field(default_factory=lambda: Offered({}))
    devices: tuple[Device, ...] = DEVICES
    now: float = NOW.timestamp()
    names: list[str] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    find_owner: Callable[[str], tuple[int, int]] | None = None

    @property
    def places(self) -> Places:
        return Places(self.root, self.root / "run/credentials/@system")

    def reboot(self) -> None:
        """What is in `/run` goes, what is in `/var` stays."""
        for path in sorted(self.root.glob("run/**/*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    def boot(self, offered: Offered | None = None) -> Plan:
        self.reboot()
        return self.run(offered)

    def run(self, offered: Offered | None = None) -> Plan:
        if offered is not None:
            self.offered = offered

        def find_owner(name: str) -> tuple[int, int]:
            self.owners.append(name)
            return os.geteuid(), os.getegid()

        doors = Doors(
            read_offered=lambda path: self.offered,
            wait_for_devices=lambda macs: (self.devices, ()),
            find_owner=self.find_owner or find_owner,
            set_host_name=self.names.append,
            clock=lambda: self.now,
        )
        return run_firstboot(self.places, doors)

    def refuse(self, offered: Offered | None = None) -> dict[str, Fault]:
        """Boot, expecting faults: by path."""
        try:
            self.boot(offered)
        except SeedRefused as refused:
            return {fault.path: fault for fault in refused.told}
        raise AssertionError("the seed was taken")

    def list_files(self) -> dict[str, str]:
        """Every file below the root with its text, paths as the appliance has them."""
        return {
            f"/{path.relative_to(self.root)}": path.read_text(errors="replace")
            for path in self.root.glob("**/*")
            if path.is_file()
        }

    def read_report(self) -> FaultReport:
        report = read_report(self.places.faults)
        assert report is not None
        return report


def with_disk(seed: Mapping[str, Any], **files: str) -> Offered:
    """A NoCloud disk; file names with `_` for `-`."""
    disk = {"user-data": "#cloud-config\n" + yaml.safe_dump({"hairpin": dict(seed)})}
    disk |= {name.replace("_", "-"): text for name, text in files.items()}
    return Offered({}, {name: text.encode() for name, text in disk.items()})


def add_fault(offered: Offered, fault: Fault) -> Offered:
    return replace(offered, faults=(*offered.faults, fault))
