"""A real Open vSwitch with its dummy datapath: whole OpenFlow, `learn` and conntrack, no device, no privilege.

For what the switch learns and forgets by itself; frames are handed to ports and looked for at others.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scapy.layers.l2 import Ether
from scapy.packet import Packet
from scapy.utils import PcapReader

BRIDGE = "br-test"
UPCALL_SECONDS = 0.03  # nothing tells when a frame was handled; one takes less than 1 ms
SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")


@dataclass(frozen=True)
class DummySwitch:
    """Ports are called ``pN`` and have ofport N."""

    directory: Path

    @property
    def target(self) -> str:
        return f"unix:{self.directory / BRIDGE}.mgmt"

    def run(self, *argv: str, stdin: str | None = None) -> str:
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "OVS_RUNDIR": str(self.directory),
            "OVS_LOGDIR": str(self.directory),
            "OVS_DBDIR": str(self.directory),
        }
        done = subprocess.run(
            argv,
            input=stdin,
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout

    def vsctl(self, *argv: str) -> str:
        return self.run("ovs-vsctl", f"--db=unix:{self.directory}/db.sock", *argv)

    def appctl(self, *argv: str) -> str:
        return self.run("ovs-appctl", "-t", str(self._control), *argv)

    @property
    def _control(self) -> Path:
        pid = (self.directory / "ovs-vswitchd.pid").read_text().strip()
        return self.directory / f"ovs-vswitchd.{pid}.ctl"

    def send(self, ofport: int, frame: Packet) -> None:
        """Hand a frame to a port, as if its peer had sent it; the switch's threads then had time for it."""
        self.appctl("netdev-dummy/receive", f"p{ofport}", bytes(frame).hex())
        time.sleep(UPCALL_SECONDS)

    def take(self, ofport: int) -> list[Packet]:
        """All frames that left by a port since the switch began."""
        with PcapReader(str(self._capture(ofport))) as reader:
            return [Ether(bytes(frame)) for frame in reader]

    def _capture(self, ofport: int) -> Path:
        return self.directory / f"p{ofport}.pcap"

    def add_port(self, ofport: int) -> None:
        self.vsctl(
            "add-port", BRIDGE, f"p{ofport}",
            "--", "set", "Interface", f"p{ofport}", "type=dummy", f"ofport_request={ofport}",
            f"options:tx_pcap={self._capture(ofport)}",
        )  # fmt: skip


@contextmanager
def open_dummy_switch(directory: Path, ofports: Sequence[int]) -> Iterator[DummySwitch]:
    """``directory``: short, since sockets lie in it (unix(7): 107 bytes)."""
    switch = DummySwitch(directory)
    pids = [directory / "ovsdb-server.pid", directory / "ovs-vswitchd.pid"]
    daemon = ("--detach", "--no-chdir", "--log-file")
    try:
        switch.run("ovsdb-tool", "create", f"{directory}/conf.db", str(SCHEMA))
        switch.run(
            "ovsdb-server", f"{directory}/conf.db", f"--remote=punix:{directory}/db.sock",
            # As the start script of OVS has it (ovs-ctl).
            "--remote=db:Open_vSwitch,Open_vSwitch,manager_options",
            "--private-key=db:Open_vSwitch,SSL,private_key",
            "--certificate=db:Open_vSwitch,SSL,certificate",
            "--bootstrap-ca-cert=db:Open_vSwitch,SSL,ca_cert",
            f"--pidfile={pids[0]}", *daemon,
        )  # fmt: skip
        switch.vsctl("--no-wait", "init")
        switch.run(
            "ovs-vswitchd", f"unix:{directory}/db.sock", "--enable-dummy=override", "--disable-system",
            f"--pidfile={pids[1]}", *daemon,
        )  # fmt: skip
        switch.vsctl(
            "add-br", BRIDGE, "--", "set", "Bridge", BRIDGE, "datapath_type=dummy", "fail-mode=secure",
        )  # fmt: skip
        for ofport in ofports:
            switch.add_port(ofport)
        yield switch
    finally:
        for pid in reversed(pids):
            if pid.exists():
                subprocess.run(["kill", pid.read_text().strip()], check=False, timeout=5)
