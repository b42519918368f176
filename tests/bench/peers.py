"""The peers, set up on the bench's own switch: what an engineer would build without Hairpin.

Both run the same engine, by the product's own configuration and rules (`build_peer_rules`), and get their
traffic by two flows.
*Stock NFQUEUE*: the same bridge and queue, without super-packets: the kernel cuts packets before the queue.
*AF_PACKET IPS*: the engine copies frames between two ports itself, as Antrea's L7 engine is configured; it
needs offloads off at its ports. Both are as urgent as the product's engine, and placed by the same function.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from appliance.inspection.config import build_engine_config, render_engine_config
from appliance.inspection.placement import find_placement
from appliance.inspection.process import read_cores, write_group_nice
from appliance.lab import LabState
from appliance.lab.hypervisor import widen_sockets
from appliance.lab.plan import VM_MTU
from appliance.rules.shortcut import SHORTCUT_KEYS
from appliance.settings import Settings, parse_settings
from steering.errors import HairpinError
from steering.run import run
from tests.support.inspection_lane import LaneLab, wait_for

LEGS = ("a", "b")
OFFLOADS = ("rx", "tx", "sg", "tso", "gso", "gro")
_SID = re.compile(r"\bsid:\s*(\d+)\s*;")
_MARK = re.compile(r"\s*nfq_set_mark:[^;]*;")


@dataclass(frozen=True, slots=True)
class PeerPorts:
    """A peer's two ports on the switch; ``device`` is each port's end in the peer's namespace."""

    name: str
    netns: str
    first_ofport: int

    def port(self, leg: str) -> str:
        return f"be-{self.name}-{leg}"

    def device(self, leg: str) -> str:
        return f"{self.name}-{leg}"


def add_ports(lab: LabState, ports: PeerPorts, *, offloads: bool) -> None:
    """The namespace, two pairs of links, and both ports on the switch. Frames have no tag here: the VMs' MTU."""
    run(["ip", "netns", "add", ports.netns])
    quiet = [f"net.ipv6.conf.{what}.disable_ipv6=1" for what in ("all", "default")]
    run(["ip", "netns", "exec", ports.netns, "sysctl", "-q", "-w", *quiet])
    for number, leg in enumerate(LEGS):
        port, device = ports.port(leg), ports.device(leg)
        peer = ["peer", "name", device, "netns", ports.netns, "mtu", str(VM_MTU)]
        link = ["ip", "-n", lab.hypervisor, "link", "add", port, "mtu", str(VM_MTU)]
        run([*link, "type", "veth", *peer])
        run(["ip", "-n", lab.hypervisor, "link", "set", port, "up"])
        run(["ip", "-n", ports.netns, "link", "set", device, "up"])
        if not offloads:
            for netns, one in ((lab.hypervisor, port), (ports.netns, device)):
                for what in OFFLOADS:
                    run(
                        ["ip", "netns", "exec", netns, "ethtool", "-K", one, what, "off"],
                        check=False,
                    )
        add = ["add-port", "br-int", port, "tag=3990", "--", "set", "Interface", port]
        run(lab.vsctl_argv([*add, f"ofport_request={ports.first_ofport + number}"]))
    widen_sockets(lab)


def add_flows(lab: LabState, ports: PeerPorts, source: str, target: str) -> None:
    """Between two VMs by the peer; nothing else gets into its ports. These are an administrator's flows."""
    one, other = lab.vm(source), lab.vm(target)
    a, b = ports.first_ofport, ports.first_ofport + 1
    for flow in (
        f"priority=250,ip,in_port={one.ofport},dl_dst={other.mac},actions=output:{a}",
        f"priority=250,ip,in_port={other.ofport},dl_dst={one.mac},actions=output:{b}",
        f"priority=310,in_port={b},dl_dst={other.mac},actions=output:{other.ofport}",
        f"priority=310,in_port={a},dl_dst={one.mac},actions=output:{one.ofport}",
        f"priority=305,in_port={a},actions=drop",
        f"priority=305,in_port={b},actions=drop",
    ):
        run(lab.ofctl_argv(["add-flow", flow]))


def build_peer_settings(directory: Path, ports: PeerPorts) -> Settings:
    """Settings of one lane over the peer's ports; also written as `settings.yaml`."""
    document: dict[str, Any] = {
        "stateDir": str(directory / "state"),
        "runDir": str(directory / "run"),
        "inspection": {"netns": ports.netns, "superPackets": False},
        "lanes": [
            {
                "profile": "prevent",
                "vlan": 3990,
                "queues": [0],
                "legA": {"interface": ports.port("a"), "device": ports.device("a")},
                "legB": {"interface": ports.port("b"), "device": ports.device("b")},
            }
        ],
    }
    text = yaml.safe_dump(document)
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    (directory / "settings.yaml").write_text(text)
    return parse_settings(text)


def render_af_packet(ports: PeerPorts) -> str:
    """What is added to `suricata.yaml` (its chapter "Setting up IPS with Netfilter and AF_PACKET")."""
    pairs = [(ports.device("a"), ports.device("b")), (ports.device("b"), ports.device("a"))]
    entries = [
        {
            "interface": entry,
            "copy-iface": leave,
            "copy-mode": "ips",
            "threads": 1,
            "cluster-id": 90 + number,
            "cluster-type": "cluster_flow",
            # The engine's own advice for inline use; with one thread no packets are shared out anyway.
            "defrag": False,
            "use-mmap": True,
            "tpacket-v3": False,
            "ring-size": 20_000,
        }
        for number, (entry, leave) in enumerate(pairs)
    ]
    return yaml.safe_dump({"af-packet": entries}, sort_keys=False)


def build_peer_rules(text: str) -> str:
    """The product's rules without those of its shortcut, and no rule with `nfq_set_mark`.

    A peer has nobody who acts on the marks. More than that, the keyword writes into the packet's variables of
    NFQUEUE, whatever packet it is, and those of AF_PACKET lie in the same place (Suricata 7.0.10, a union
    of `Packet`): from the first megabyte on, the engine sent a connection's packets back by the port they
    came from, or died of it.
    """
    kept = []
    for line in text.splitlines():
        sid = _SID.search(line)
        if sid is None or f"1:{sid[1]}" not in SHORTCUT_KEYS:
            kept.append(_MARK.sub("", line))
    return "\n".join(kept) + "\n"


@dataclass
class StockPeer:
    """`hairpin inspect` on one lane, with super-packets off."""

    lane: LaneLab

    def load(self, rules: str, seconds: float = 200) -> None:
        self.lane.write_rules(rules)
        if self.lane.inspect is not None:
            # The engine starts anew on the other file, as an operator's would.
            self.lane.end()
        self.lane.settings.inspection_state.unlink(missing_ok=True)
        self.lane.start()
        count = count_rules(rules)
        wait_for(lambda: (state := self.lane.lane()) and state.rules_loaded > count // 2, seconds)

    def find_end(self) -> int | None:
        """The status with which it ended, unless it runs."""
        return None if self.lane.inspect is None else self.lane.inspect.poll()

    def stop(self) -> None:
        if self.lane.inspect is not None and self.lane.inspect.poll() is None:
            self.lane.end()


@dataclass
class AfPacketPeer:
    """Suricata itself, in a namespace with two devices."""

    directory: Path
    settings: Settings
    ports: PeerPorts
    process: subprocess.Popen[bytes] | None = None

    def load(self, rules: str, seconds: float = 200) -> None:
        self.stop()
        run_dir = self.directory / "engine"
        run_dir.mkdir(parents=True, exist_ok=True)
        ruleset = run_dir / "suricata.rules"
        ruleset.write_text(rules)
        lane = self.settings.build_lanes()[0]
        # As urgent as the product's engine, and its two threads placed as the product's would be.
        placement = find_placement(read_cores(), {lane.name: len(LEGS)})[lane.name]
        config = replace(
            build_engine_config(self.settings, lane, placement),
            directory=run_dir,
            ruleset=ruleset,
            socket=run_dir / "command.socket",
        )
        path, log = run_dir / "suricata.yaml", run_dir / "engine.log"
        path.write_text(render_engine_config(config) + render_af_packet(self.ports))
        inside = ["ip", "netns", "exec", self.ports.netns, "nice", "-n", str(placement.nice)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*inside, "/usr/bin/suricata", "-c", str(path), "-v", "--af-packet"],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        if refused := write_group_nice(self.process.pid, placement.nice):
            raise HairpinError(f"the AF_PACKET engine is not as urgent as the others: {refused}")
        wait_for(lambda: b"Engine started" in log.read_bytes(), seconds)

    def find_end(self) -> int | None:
        """The status with which it ended, unless it runs."""
        return None if self.process is None else self.process.poll()

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(15)
        self.process = None


def count_rules(text: str) -> int:
    return sum(1 for line in text.splitlines() if line and not line.startswith("#"))


Peers = tuple[StockPeer, AfPacketPeer]


@contextlib.contextmanager
def standing(
    lab: LabState, directory: Path, source: str, targets: tuple[str, str]
) -> Iterator[Peers]:
    """Both peers, between ``source`` and one VM each, without rules yet; taken down afterwards."""
    stock = PeerPorts("stk", f"{lab.prefix}stk", 220)
    af_packet = PeerPorts("afp", f"{lab.prefix}afp", 222)
    add_ports(lab, stock, offloads=True)
    add_ports(lab, af_packet, offloads=False)
    for ports, target in zip((stock, af_packet), targets, strict=True):
        add_flows(lab, ports, source, target)
    stock_dir, af_dir = directory / "stock", directory / "afpacket"
    one = StockPeer(LaneLab(stock_dir, build_peer_settings(stock_dir, stock)))
    other = AfPacketPeer(af_dir, build_peer_settings(af_dir, af_packet), af_packet)
    try:
        yield one, other
    finally:
        one.stop()
        other.stop()
        for netns in (stock.netns, af_packet.netns):
            run(["ip", "netns", "del", netns], check=False)
