"""A lane of two queues: both directions of a flow come to one thread, in order, and each thread is watched."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.inspection.config import build_engine_config, render_engine_config
from appliance.inspection.placement import LanePlacement, find_placement_faults
from appliance.inspection.process import read_threads
from appliance.inspection.publish import EngineState
from appliance.settings import parse_settings
from steering.run import run
from tests.support.inspection_lane import (
    HOST,
    MAC_A,
    RULES,
    A,
    B,
    LaneLab,
    in_namespace,
    open_lane,
    wait_for,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]

PAIRS = tuple(range(11, 23))
"""Last parts of the sender's addresses: 12 pairs are all in one queue once in 2,048 starts."""
PINNED = """
lanes:
  - profile: prevent
    vlan: 101
    queues: [0, 1]
    legA: {interface: a1, device: d1}
    legB: {interface: a2, device: d2}
"""
WHOLE = 20 * 2**20


@pytest.fixture(scope="module")
def lane_lab() -> Iterator[LaneLab]:
    with open_lane((7, 8)) as lab:
        # What the kernel sends of its own accord comes to a queue, too: reports of the groups that each address
        # joins, up to a second after it was added. At once, so that they have gone before anything is counted.
        for name, device in ((A, "a0"), (B, "b0")):
            for version in (1, 2):
                setting = f"net.ipv6.conf.{device}.mldv{version}_unsolicited_report_interval=1"
                run(["ip", "netns", "exec", name, "sysctl", "-q", "-w", setting])
        for number in PAIRS:
            for address, family in (
                (f"10.97.0.{number}/24", ()),
                (f"fd97::{number}/64", ("nodad",)),
            ):
                run(["ip", "-n", A, "addr", "add", address, "dev", "a0", *family])
                bare = address.partition("/")[0]
                run(["ip", "-n", B, "neigh", "replace", bare, "lladdr", MAC_A, "dev", "b0"])
        for name, device in ((A, "a0"), (B, "b0")):
            setting = f"net.ipv6.conf.{device}.router_solicitations=0"
            run(["ip", "netns", "exec", name, "sysctl", "-q", "-w", setting])
        lab.write_rules(RULES, loaded=2)
        lab.running()
        yield lab


def read_packets(lab: LaneLab) -> tuple[int, ...]:
    """By queue, from the kernel: what is published is a second old."""
    argv = ["cat", "/proc/net/netfilter/nfnetlink_queue"]
    rows = run(["ip", "netns", "exec", lab.settings.inspection.netns, *argv]).stdout.splitlines()
    found = {int(row.split()[0]): int(row.split()[7]) for row in rows}
    return found.get(7, 0), found.get(8, 0)


def settle(lab: LaneLab) -> tuple[int, ...]:
    """The counters once nothing came for a while: the end of the connection before may be late."""
    seen = [read_packets(lab)]
    while len(seen) < 4 or len(set(seen[-4:])) > 1:
        time.sleep(0.08)
        seen.append(read_packets(lab))
    return seen[-1]


def find_growth(lab: LaneLab, action: Callable[[], object]) -> tuple[int, int]:
    before = settle(lab)
    action()
    after = settle(lab)
    return after[0] - before[0], after[1] - before[1]


def request(source: str, target: str, path: str = "/", wanted: int = 2) -> int | None:
    """Bytes of the body that answers a request; None when no answer came."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with in_namespace(A, lambda: socket.socket(family)) as door:
        door.settimeout(3.0)
        door.bind((source, 0))
        door.connect((target, 80))
        said = f"GET {path} HTTP/1.1\r\nHost: b\r\nWanted: {wanted}\r\nConnection: close\r\n\r\n"
        door.sendall(said.encode())
        count, head = 0, b""
        try:
            while part := door.recv(2**20):
                count += len(part)
                head = head or part
        except TimeoutError:
            return None
        return count - head.index(b"\r\n\r\n") - 4 if head else None


def ping(source: str, target: str, size: int = 56) -> int:
    argv = ["ping", "-n", "-q", "-c2", "-i0.05", "-W1", "-s", str(size), "-I", source, target]
    return run(["ip", "netns", "exec", A, *argv], check=False).status


def find_thread_for(lab: LaneLab, source: str) -> int:
    """Which queue, 0 or 1, the TCP packets between a source and 10.97.0.2 come to."""
    return int(find_growth(lab, lambda: request(source, "10.97.0.2"))[1] > 0)


def test_each_queue_has_a_thread_and_that_is_told(lane_lab: LaneLab) -> None:
    lane = lane_lab.running()
    assert [queue.number for queue in lane.queues] == [7, 8]
    assert len({queue.listener for queue in lane.queues}) == 2
    placed = wait_for(lambda: (now := lane_lab.running().placement) and now.threads and now, 15)
    assert (placed.threads, placed.nice) == (2, -10)
    cores = os.cpu_count() or 1
    assert placed.pinned is (cores >= 4)
    if not placed.pinned:
        assert placed.reason == f"{cores} cores are shared by all; threads are pinned from 4 on"
    group = Path(f"/proc/{lane.pid}/autogroup")
    if group.exists():
        assert group.read_text().split()[-1] == "-10"
    assert not lane_lab.running().faults


@pytest.mark.parametrize(("net", "target"), [("10.97.0.", "10.97.0.2"), ("fd97::", "fd97::2")])
def test_both_directions_of_a_flow_and_its_fragments_come_to_one_queue(
    lane_lab: LaneLab, net: str, target: str
) -> None:
    lane_lab.running()
    used = set()
    for number in PAIRS:
        source = f"{net}{number}"
        grown = find_growth(lane_lab, lambda source=source: request(source, target, wanted=40_000))  # type: ignore[misc]
        assert sorted(grown)[0] == 0 < sorted(grown)[1], (source, grown)
        used.add(grown[1] > 0)
        for size in (56, 4000):
            parts = find_growth(
                lane_lab, lambda source=source, size=size: ping(source, target, size)
            )  # type: ignore[misc]
            assert sorted(parts)[0] == 0 < sorted(parts)[1], (source, size, parts)
    assert used == {False, True}, "both queues had flows"


def test_the_engine_drops_an_exploit_in_each_queue(lane_lab: LaneLab) -> None:
    lane_lab.running()
    seen = set()
    for number in PAIRS:
        source = f"10.97.0.{number}"
        queue = find_thread_for(lane_lab, source)
        if queue not in seen:
            assert request(source, "10.97.0.2", "/?file=/etc/passwd") is None
            seen.add(queue)
    assert seen == {0, 1}


def count_disordered() -> int:
    """Segments that came to A before one that was sent earlier."""
    counted = run(["ip", "netns", "exec", A, "nstat", "-az", "TcpExtTCPOFOQueue"]).stdout
    found = re.search(r"TcpExtTCPOFOQueue\s+(\d+)", counted)
    assert found is not None
    return int(found[1])


@contextmanager
def one_backlog() -> Iterator[None]:
    """All links put what they carry on one core's backlog (RPS).

    A veth uses the sender's core otherwise, and a sender that moves overtakes itself before any queue.
    """
    ends = ((A, "a0"), (B, "b0"), (HOST, "legA"), (HOST, "legB"))
    for mask in ("1", "0"):
        for name, device in ends:
            write = (
                f"for q in /sys/class/net/{device}/queues/rx-*; do echo {mask} > $q/rps_cpus; done"
            )
            run(["ip", "netns", "exec", name, "sh", "-c", write])
        if mask == "1":
            yield


def test_packets_of_flows_in_both_queues_stay_in_order(lane_lab: LaneLab) -> None:
    lane_lab.running()
    by_queue = {find_thread_for(lane_lab, f"10.97.0.{number}"): number for number in PAIRS}
    assert set(by_queue) == {0, 1}
    with one_backlog():
        before = count_disordered()
        for number in by_queue.values():
            assert request(f"10.97.0.{number}", "10.97.0.2", wanted=WHOLE) == WHOLE
        assert count_disordered() == before


SEIZE, INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000


def hold(thread: int) -> None:
    """Stop one thread of a process, by ptrace(2); the others go on."""
    libc = ctypes.CDLL(None, use_errno=True)
    for what in (SEIZE, INTERRUPT):
        if libc.ptrace(what, thread, None, None) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")


def reap(thread: int) -> bool:
    """Whether the held thread is gone. Its process does not end before its tracer has taken note."""
    try:
        pid, status = os.waitpid(thread, WALL | os.WNOHANG)
    except ChildProcessError:
        return True
    return pid == thread and (os.WIFSIGNALED(status) or os.WIFEXITED(status))


def test_an_engine_of_which_one_thread_hangs_is_replaced(lane_lab: LaneLab) -> None:
    lane = lane_lab.running()
    by_queue = {find_thread_for(lane_lab, f"10.97.0.{number}"): number for number in PAIRS}
    tasks = Path(f"/proc/{lane.pid}/task").iterdir()
    (thread,) = [int(one.name) for one in tasks if (one / "comm").read_text().strip() == "W-NFQ#8"]
    hold(thread)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        request(f"10.97.0.{by_queue[1]}", "10.97.0.2")
    for _ in range(4):
        assert request(f"10.97.0.{by_queue[0]}", "10.97.0.2") == 2, "the other thread goes on"
    wait_for(lambda: reap(thread), 30)
    again = lane_lab.wait_state(EngineState.RUNNING, lane.pid)
    took = time.monotonic() - began
    print(f"an engine of which one thread hung was replaced after {took:.1f} s")
    assert took < 20
    assert any("queue 8 gave no packet back" in fault.reason for fault in again.faults), again
    assert request(f"10.97.0.{by_queue[1]}", "10.97.0.2") == 2


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core leaves nothing to choose")
def test_a_real_engine_pins_its_threads_as_it_is_told(tmp_path: Path) -> None:
    """By its configuration alone: on few cores the product pins nothing, so this engine is not in a lane."""
    settings = parse_settings(PINNED)
    ruleset = tmp_path / "suricata.rules"
    ruleset.write_text(RULES)
    wanted = LanePlacement(2, (1, 0), (0,), nice=0)
    config = replace(
        build_engine_config(settings, settings.build_lanes()[0], wanted),
        directory=tmp_path,
        ruleset=ruleset,
        socket=tmp_path / "command.socket",
    )
    path = tmp_path / "suricata.yaml"
    path.write_text(render_engine_config(config))
    argv = ["unshare", "--net", "--", "suricata", "-c", str(path), "-q", "0", "-q", "1"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as engine:
        try:
            wait_for(lambda: not find_placement_faults(wanted, read_threads(engine.pid)), 20)
            wait_for(
                lambda: (
                    ("FM#01", (0,)) in {(one.name, one.cores) for one in read_threads(engine.pid)}
                ),
                20,
            )
        finally:
            engine.terminate()
            engine.wait(15)
