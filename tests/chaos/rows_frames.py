"""Frames for many: each reaches every VM once, and no leg; and what comes round is not let in."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from appliance.lab.plan import LabState, LabVm
from tests.chaos import frames
from tests.chaos.registry import FRAMES_GOAL, Row, check, fault
from tests.chaos.stage import SENDER, Stage

COUNT = 50
BROADCAST = "ff:ff:ff:ff:ff:ff"
STRANGER = "db-2"  # in no policy


@dataclass(frozen=True, slots=True)
class Kind:
    """Frames of one kind, sent from one VM; ``delivered``: to every other VM, or else to none."""

    name: str
    sender: str
    frames: tuple[bytes, ...]
    delivered: bool


def _mark(name: str, number: int) -> Raw:
    return Raw(f"CHAOSFRAME {name} {number:06d} end of frame".encode())


def build_kinds(lab: LabState) -> tuple[Kind, ...]:
    """Broadcast, multicast, foreign protocols, and frames that look like ones come round a loop."""
    vm = lab.vm(SENDER)
    udp = UDP(sport=6100, dport=6100)

    def header(destination: str, source: LabVm = vm, **fields: Any) -> Any:
        return Ether(src=source.mac, dst=destination, **fields)

    layers: Mapping[str, Any] = {
        "arp-broadcast": header(BROADCAST)
        / ARP(hwsrc=vm.mac, psrc=vm.address4, pdst="10.77.0.99", op=1),
        "ipv4-broadcast": header(BROADCAST) / IP(src=vm.address4, dst="255.255.255.255") / udp,
        "subnet-broadcast": header(BROADCAST) / IP(src=vm.address4, dst="10.77.0.255") / udp,
        "ipv4-multicast": header("01:00:5e:00:00:fb")
        / IP(src=vm.address4, dst="224.0.0.251", ttl=1)
        / udp,
        "ipv6-multicast": header("33:33:00:00:00:01")
        / IPv6(src=vm.address6, dst="ff02::1", hlim=1)
        / udp,
        "other-broadcast": header(BROADCAST, type=0x88B5),
        "other-multicast": header("01:00:5e:7f:00:01", type=0x88B5),
        "loop-detection": header(BROADCAST, type=0x9000),
    }
    found = [
        Kind(
            name,
            SENDER,
            tuple(bytes(layer / _mark(name, number)) for number in range(COUNT)),
            True,
        )
        for name, layer in layers.items()
    ]
    # What web-1 sent, and a loop brings back by the port of another.
    looped = header(BROADCAST, type=0x88B5)
    shown = tuple(bytes(looped / _mark("come-round", number)) for number in range(COUNT))
    return (*found, Kind("come-round", STRANGER, shown, False))


class Listeners:
    """A counter of marked frames in every VM, and one at the legs in the service host."""

    def __init__(self, stage: Stage) -> None:
        lab = stage.lab
        self._outs: dict[str, Path] = {}
        self._children = []
        legs = [device for lane in lab.lanes for _leg, device, _ofport in lane.legs]
        places = {vm.name: (vm.netns, ["eth0"]) for vm in lab.vms} | {
            "legs": (lab.service_host, legs)
        }
        for name, (namespace, devices) in places.items():
            self._outs[name] = stage.directory / f"frames-{name}-{time.monotonic_ns()}.json"
            inside = ["ip", "netns", "exec", namespace, sys.executable, "-S", frames.__file__]
            argv = [*inside, "listen", str(self._outs[name]), *devices]
            self._children.append(subprocess.Popen(argv))
        time.sleep(0.7)

    def end(self) -> dict[str, dict[str, dict[str, int]]]:
        """Place -> device -> frame -> how often it came."""
        for child in self._children:
            child.terminate()
        for child in self._children:
            child.wait(10)
        return {name: json.loads(out.read_text()) for name, out in self._outs.items()}


@fault("broadcast, multicast and loop frames", quick=True)
def send_frames(stage: Stage) -> Iterable[Row]:
    """Fifty frames of each kind from one VM; every VM and every leg counts what comes."""
    kinds = build_kinds(stage.lab)
    listeners = Listeners(stage)
    for kind in kinds:
        path = stage.directory / f"{kind.name}.hex"
        path.write_text("".join(f"{one.hex()}\n" for one in kind.frames))
        inside = [sys.executable, "-S", frames.__file__, "send", "eth0", str(path)]
        subprocess.run(stage.lab.netns_argv(kind.sender, inside), check=True, timeout=20)
    time.sleep(0.7)
    found = listeners.end()
    names = [vm.name for vm in stage.lab.vms]
    lost = doubled = let_in = 0
    faults = []
    for kind in kinds:
        for vm in names:
            counts = [found[vm]["eth0"].get(f"{kind.name} {n}", 0) for n in range(COUNT)]
            wanted = kind.delivered and vm != kind.sender
            lost += (missing := sum(count == 0 for count in counts) if wanted else 0)
            doubled += (twice := sum(max(0, count - 1) for count in counts) if wanted else 0)
            let_in += (foreign := 0 if wanted else sum(counts))
            if missing or twice or foreign:
                faults.append(f"{kind.name} at {vm}: {missing} lost, {twice} doubled, {foreign} in")
    at_legs = sum(sum(frames.values()) for frames in found["legs"].values())
    figures = {
        "kinds": len(kinds),
        "sent": COUNT * len(kinds),
        "expected": sum(COUNT * (len(names) - 1) for kind in kinds if kind.delivered),
        "lost": lost,
        "doubled": doubled,
        "let_in": let_in,
        "at_legs": at_legs,
    }
    missed = check(
        (not faults, "; ".join(faults[:5])), (at_legs == 0, f"{at_legs} frames reached a leg")
    )
    yield Row("broadcast, multicast and loop frames", "-", FRAMES_GOAL, figures, missed)
