"""From a changed policy to the first packet that is steered, with many pairs of VMs."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from appliance import lab as the_lab
from steering.compile import compile_program
from steering.decide import resolve_machines
from steering.flows import Program
from steering.model import (
    Family,
    Inspect,
    Lane,
    Leg,
    MachineRecord,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    Port,
    PortRange,
    Profile,
    Protocol,
    Service,
    Zone,
)
from steering.pipeline import Table
from steering.run import run
from tests.bench.rows import Row, check
from tests.bench.traffic import BenchError, find_quantile
from tests.support.appliance import Appliance, build_policy, inspect
from tests.support.inspection_lane import in_namespace
from tests.support.lab import wait_until

SENDER = """
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        peer.sendto(b"hairpin-bench", (sys.argv[1], 9))
        time.sleep(0.0005)
"""
MARK = b"hairpin-bench"
SIDES = {1_000: 32, 10_000: 100}
"""Pairs of VMs, and how many VMs each of the two zones then has."""
MOST_SECONDS = 0.025


def build_documents(lab: the_lab.LabState, side: int, *, steered: bool) -> list[dict[str, Any]]:
    """Two zones of ``side`` VMs, and a policy between them that inspects, or that lets pass."""
    ids = [("web", lab.vm("web-1").vm_id), ("app", lab.vm("app-1").vm_id)]
    ids += [(("web", "app")[n % 2], find_vm_id(n)) for n in range(2, 2 * side)]
    documents = [
        {
            "apiVersion": "hairpin/v1",
            "kind": "VirtualMachine",
            "metadata": {"name": f"vm-{number}"},
            "spec": {"vmId": vm_id, "tags": {"tier": tier}},
        }
        for number, (tier, vm_id) in enumerate(ids)
    ]
    for zone in ("web", "app"):
        documents.append(
            {
                "apiVersion": "hairpin/v1",
                "kind": "Zone",
                "metadata": {"name": zone},
                "spec": {"selector": {"matchTags": {"tier": zone}}},
            }
        )
    action = inspect("prevent") if steered else {"direct": {"reason": "a benchmark"}}
    return [*documents, build_policy("bench", "web", "app", action)]


def find_vm_id(number: int) -> str:
    return f"be000000-0000-4000-8000-{number:012d}"


def add_ports(lab: the_lab.LabState, first: int, last: int) -> None:
    """Ports of VMs that say nothing, in one transaction."""
    args: list[str] = []
    for number in range(first, last):
        name = f"bench{number}"
        args += ["--", "add-port", "br-int", name, "--", "set", "Interface", name, "type=internal"]
        args += [f"ofport_request={1000 + number}"]
        args += [f'external_ids:attached-mac="02:be:00:00:{number >> 8:02x}:{number & 255:02x}"']
        args += [f'external_ids:vm-id="{find_vm_id(number)}"', "external_ids:iface-status=active"]
    run([*lab.vsctl_argv(args[1:])], timeout=60)


@contextlib.contextmanager
def open_lab(say: Callable[[str], None]) -> Iterator[Appliance]:
    name = f"bp{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="hairpin-bench-") as directory:
        try:
            say("bringing up a lab for policies")
            appliance = Appliance(the_lab.bring_up(name, 2), Path(directory))
            most = 2 * max(SIDES.values())
            began = time.monotonic()
            add_ports(appliance.lab, 2, most)

            def found() -> bool:
                return len(appliance.api("/vms").document["items"]) >= most

            if not wait_until(found, 60):
                raise BenchError("the ports were not found")
            say(f"{most} VMs found {time.monotonic() - began:.1f} s after their ports were added")
            yield appliance
        finally:
            the_lab.take_down(name)


def measure_change(appliance: Appliance, side: int, rounds: int) -> list[float]:
    """Seconds from asking for the change until the first frame in the lane, each round anew."""
    lab = appliance.lab
    device = lab.lanes[0].device_a
    watch = in_namespace(
        lab.service_host, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    )
    argv = lab.netns_argv(
        "web-1",
        [sys.executable, "-c", SENDER, appliance.address("app-1"), str(60 + 3 * rounds)],
    )
    seconds = []
    with watch, subprocess.Popen(argv) as sender:
        try:
            watch.bind((device, 3))
            watch.setblocking(False)
            for _ in range(rounds):
                expect_put(appliance, build_documents(lab, side, steered=False))
                time.sleep(0.2)
                _drain(watch)
                began = time.monotonic()
                with _asking(appliance, build_documents(lab, side, steered=True)):
                    seconds.append(_wait_marked(watch, began) - began)
        finally:
            sender.terminate()
            sender.wait(10)
    return seconds


def expect_put(appliance: Appliance, documents: list[dict[str, Any]]) -> None:
    answer = appliance.put(documents)
    if answer.status != 200:
        raise BenchError(f"the policies were refused: {answer.document}")


@contextlib.contextmanager
def _asking(appliance: Appliance, documents: list[dict[str, Any]]) -> Iterator[None]:
    """The change is asked for by another thread meanwhile."""
    import threading

    faults: list[BaseException] = []

    def ask() -> None:
        try:
            expect_put(appliance, documents)
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)
    if faults:
        raise faults[0]


def _drain(watch: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            watch.recv(65_536)


def _wait_marked(watch: socket.socket, began: float) -> float:
    while time.monotonic() - began < 30:
        if select.select([watch], [], [], 1)[0]:
            with contextlib.suppress(BlockingIOError):
                frame, address = watch.recvfrom(65_536)
                if MARK in frame and address[2] != socket.PACKET_OUTGOING:
                    return time.monotonic()
    raise BenchError("no packet was steered within 30 s")


def measure_policy(say: Callable[[str], None], rounds: int) -> list[Row]:
    """Policy change -> first packet steered, at 1,000 and 10,000 pairs."""
    rows = []
    with open_lab(say) as appliance:
        for pairs, side in SIDES.items():
            seconds = measure_change(appliance, side, rounds)
            worst = find_quantile(seconds, 0.99) if len(seconds) > 1 else seconds[0]
            middle = find_quantile(seconds, 0.5) if len(seconds) > 1 else seconds[0]
            say(f"    {pairs} pairs: {middle * 1000:.0f} ms, 99 %: {worst * 1000:.0f} ms")
            rows.append(
                Row(
                    name=f"policy change to first packet steered, {pairs} pairs, p99",
                    value=worst * 1000,
                    unit="ms",
                    goal="at most 25 ms, flat in size",
                    peers={"p50": middle * 1000},
                    rounds=[{"milliseconds": one * 1000} for one in seconds],
                    missed=check((worst <= MOST_SECONDS, f"{worst * 1000:.0f} ms")),
                )
            )
    return rows


def measure_flows(_say: Callable[[str], None], _rounds: int) -> list[Row]:
    """Flows for a policy between two zones of 200 VMs: those that the policy adds to its VMs' own."""
    side = 200
    lanes = (Lane(1, Profile.PREVENT, 3901, (0,), Leg("a", "a", 9001), Leg("b", "b", 9002)),)
    ports = tuple(
        Port(f"v{n}", n, f"02:00:00:00:{n >> 8:02x}:{n & 255:02x}", "", f"vm-{n}", "br-int")
        for n in range(1, 2 * side + 1)
    )
    records = tuple(
        MachineRecord(f"vm-{n}", f"vm-{n}", {"tier": "ab"[n % 2]}) for n in range(1, 2 * side + 1)
    )
    zones = (Zone("a", {"tier": "a"}), Zone("b", {"tier": "b"}))
    action = Inspect(Profile.PREVENT, OnFailure.CLOSED)
    service = (Service(Protocol.TCP, (PortRange(80, 80),)),)

    def build(names: tuple[str, ...]) -> Program:
        policies = tuple(
            Policy(
                name, priority, (Peer(zone="a"),), (Peer(zone="b"),), service, tuple(Family), action
            )
            # Policies of one priority share flows; these are its own.
            for priority, name in enumerate(names, 100)
        )
        found = PolicySet(records, zones, policies)
        return compile_program(found, resolve_machines(found, ports), lanes)

    one, two = build(("one",)), build(("one", "two"))
    added = len(two.flows) - len(one.flows)
    lookups = sum(flow.table in (Table.SENDER, Table.RECEIVER) for flow in two.flows)
    share = added / side**2
    return [
        Row(
            name="flows for a 200 x 200 policy",
            value=added,
            unit="flows",
            goal="at most 1 % of the cross product",
            # Each VM's class is looked up by two flows of its own, however many policies there are.
            peers={"once, for the VMs' classes": lookups},
            ratio={"of the cross product": share},
            missed=check((share <= 0.01, f"{share:.1%}")),
        )
    ]
