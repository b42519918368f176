"""A VM of the image with a seed, and what it needs of a host: a real switch behind TLS, and a way to its API.

The switch is a dummy one on loopback, which the VM reaches at an address of QEMU's own little network. No frame
passes the lanes' legs: their other ends hear nobody.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from appliance.api.documents import Health
from appliance.client import Client, Place
from steering.errors import HairpinError
from tests.support.dummy_switch import BRIDGE
from tests.support.qemu import Nic, Vm, VmFault
from tests.support.tls_switch import NAME, TlsSwitch, find_free_ports

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "7d1f6ad0c2b94e5f8a3c6b0e9d2f4a71"
ADDRESS, SWITCH = "10.0.2.15", "10.0.2.100"
API, OVSDB, OPENFLOW = 8470, 6640, 6653
MANAGEMENT = "52:54:00:20:00:01"
LEGS = {"p101": "52:54:00:20:01:0a", "p102": "52:54:00:20:01:0b", "p103": "52:54:00:20:02:01"}
"""Ports of the switch by name, and the devices that they are in the VM: two legs, the canary's."""
OFPORTS = (101, 102, 103)
APPLIANCE = "rack-12"


@dataclass(frozen=True)
class VmHost:
    """``port``: where the VM's API is on this machine's loopback."""

    tls: TlsSwitch
    port: int
    directory: Path

    def build_seed(self) -> dict[str, Any]:
        files = self.tls.ours
        names = list(LEGS)
        return {
            "name": APPLIANCE,
            "management": {"mac": MANAGEMENT, "address": f"{ADDRESS}/24"},
            "api": {"token": TOKEN},
            "switch": {
                "ovsdb": f"ssl:{SWITCH}:{OVSDB}",
                "openflow": f"ssl:{SWITCH}:{OPENFLOW}",
                "bridge": BRIDGE,
                "serverName": NAME,
                "ca": files.ca.read_text(),
                "certificate": files.certificate.read_text(),
                "key": files.key.read_text(),
            },
            "lanes": [
                {
                    "profile": "prevent",
                    "vlan": 101,
                    "legA": {"interface": names[0], "mac": LEGS[names[0]]},
                    "legB": {"interface": names[1], "mac": LEGS[names[1]]},
                }
            ],
            "canary": {"interface": names[2], "mac": LEGS[names[2]]},
        }

    @property
    def nics(self) -> tuple[Nic, ...]:
        relay = f"{sys.executable} {ROOT / 'tests/support/relay.py'}"
        outward = {
            f"{SWITCH}:{OVSDB}": f"{relay} {self.tls.ovsdb_port}",
            f"{SWITCH}:{OPENFLOW}": f"{relay} {self.tls.openflow_port}",
        }
        management = Nic.user(MANAGEMENT, {self.port: API}, outward)
        return (management, *(Nic.user(mac, {}) for mac in LEGS.values()))

    def open_client(self) -> tuple[Client, str]:
        """With the certificate that is shown now; its SHA-256, as the console writes it. Raises OSError."""
        shown = ssl.get_server_certificate(("127.0.0.1", self.port), timeout=10)
        pinned, token = self.directory / "api.pem", self.directory / "token"
        pinned.write_text(shown)
        token.write_text(TOKEN)
        place = Place(f"https://127.0.0.1:{self.port}", token, "test", None, pinned)
        digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(shown)).hexdigest().upper()
        return Client(place), ":".join(digest[at : at + 2] for at in range(0, 64, 2))

    def wait_for_health(self, vm: Vm, wanted: Callable[[Health], object], seconds: float) -> Health:
        """Until health is as ``wanted`` has it. Raises VmFault with the last one."""
        deadline = time.monotonic() + seconds
        last: object = None
        while time.monotonic() < deadline:
            try:
                health = self.open_client()[0].read_health()
                if wanted(health):
                    return health
                last = health.model_dump_json(indent=1)
            except (OSError, HairpinError) as fault:
                last = last or fault
            time.sleep(2.0)
        raise VmFault(f"health within {seconds:.0f} s: {last}\n{vm.read_console()[-6000:]}")


def build_host(tls: TlsSwitch, directory: Path) -> VmHost:
    """The ports as `hairpin host prepare` makes them."""
    for name in LEGS:
        tls.vsctl("--if-exists", "clear", "port", name, "vlan_mode")
        tls.vsctl("set", "port", name, "tag=101")
    return VmHost(tls, find_free_ports(1)[0], directory)


def give_seed(path: Path, seed: Mapping[str, Any]) -> tuple[str, ...]:
    """QEMU's options for a seed by fw_cfg, as docs/first-boot.md has it."""
    path.write_text(json.dumps(dict(seed)))
    return ("-fw_cfg", f"name=opt/io.systemd.credentials/hairpin.seed,file={path}")


def render_user_data(seed: Mapping[str, Any]) -> str:
    return "#cloud-config\n" + yaml.safe_dump({"hairpin": dict(seed)})


def write_iso(path: Path, files: Mapping[str, str | Path], label: str = "CIDATA") -> Path:
    """By the command of docs/first-boot.md and docs/update.md; text is written first, a path is taken as it is."""
    directory = path.with_suffix(".files")
    directory.mkdir()
    argv = [
        "xorriso",
        "-as",
        "mkisofs",
        "-quiet",
        "-V",
        label,
        "-J",
        "-r",
        "-o",
        str(path),
        "-graft-points",
    ]
    for name, content in files.items():
        source = content
        if isinstance(content, str):
            source = directory / name
            source.write_text(content)
        argv.append(f"{name}={source}")
    subprocess.run(argv, check=True, capture_output=True, timeout=300)
    return path
