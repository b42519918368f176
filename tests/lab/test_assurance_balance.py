"""The balance of a real lane under load: it closes, and opens when frames vanish before the queue."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance.assurance.balance import (
    Balance,
    LaneBook,
    build_balance,
    build_engine_sample,
    build_host_sample,
    build_switch_sample,
    record_host,
    record_switch,
)
from appliance.inspection.publish import read_inspection_state
from appliance.lab import LabState
from appliance.settings import Settings, read_settings
from steering.counters import build_counters, find_tallies
from steering.model import PolicySet
from steering.run import run
from steering.switch.openflow import parse_flow_counter, parse_group_counter
from tests.support.appliance import Appliance, build_base, build_policy, inspect

pytestmark = [pytest.mark.lab, pytest.mark.slow]

# cBPF for tc: of the frames with a tag every twentieth, by chance, is dropped (SKF_AD_VLAN_TAG_PRESENT,
# SKF_AD_RANDOM > 0.95 * 2**32, TC_ACT_SHOT or TC_ACT_OK). BFD has no tag and goes on.
TWENTIETH = "6,48 0 0 4294963248,21 0 3 1,32 0 0 4294963256,37 0 1 4080218931,6 0 0 2,6 0 0 0"


class Reader:
    """Reads switch and service host once a second, as the management service does."""

    def __init__(self, lab: LabState) -> None:
        self.lab = lab
        self.settings: Settings = read_settings(lab.settings_file)
        self.lanes = self.settings.build_lanes()
        self.book = LaneBook("prevent")

    def read(self) -> Balance | None:
        at = time.time()
        groups = run(self.lab.ofctl_argv(["dump-group-stats"])).stdout.splitlines()
        flows = run(self.lab.ofctl_argv(["dump-flows"])).stdout.splitlines()
        counted = [parse_flow_counter(line) for line in flows if "cookie=0x4850" in line]
        tallies = find_tallies(
            [(one.flow.key, one.flow.cookie, one.packets, one.bytes) for one in counted],
            [(g.group_id, g.buckets) for line in groups if (g := parse_group_counter(line))],
            PolicySet(),
            self.lanes,
        )
        counters = build_counters(tallies, PolicySet(), self.lanes)
        self.book = record_switch(self.book, build_switch_sample(at, counters, "prevent"))
        state = read_inspection_state(self.settings.inspection_state)
        assert state is not None
        told = state.lanes[0].counters
        self.book = record_host(self.book, build_host_sample(told), build_engine_sample(told))
        return build_balance(self.book, time.time())

    def watch(self, seconds: float) -> list[Balance]:
        found = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (balance := self.read()) is not None:
                found.append(balance)
            time.sleep(1.0)
        return found


@pytest.fixture(scope="module")
def lab(module_lab: LabState, tmp_path_factory: pytest.TempPathFactory) -> LabState:
    appliance = Appliance(module_lab, tmp_path_factory.mktemp("balance"))
    policy = build_policy("web-app", "web", "app", inspect("prevent"))
    appliance.apply([*build_base(module_lab), policy])
    return module_lab


@contextmanager
def pinging(lab: LabState, *intervals: str) -> Iterator[None]:
    """Pings from web-1 to app-1, one stream for each interval (seconds)."""
    address = lab.vm("app-1").address4
    children = [
        subprocess.Popen(
            lab.netns_argv("web-1", ["ping", "-q", "-n", "-i", interval, address]),
            stdout=subprocess.DEVNULL,
        )
        for interval in intervals
    ]
    try:
        yield
    finally:
        for child in children:
            child.send_signal(signal.SIGINT)
            child.wait(10)


def test_balance_closes_while_the_load_changes(lab: LabState) -> None:
    reader = Reader(lab)
    found: list[Balance] = []
    for intervals in (("0.004",), ("0.001", "0.001"), (), ("0.002",)):
        with pinging(lab, *intervals):
            found += reader.watch(7)
    found += reader.watch(4)
    assert all(one.closes for one in found), next(one for one in found if not one.closes)
    last = found[-1]
    assert last.into > 8000
    assert abs(last.into - last.inspected) < 50
    assert (last.unexplained, last.lost, last.reason) == (0, 0, "")


def test_balance_opens_when_every_twentieth_frame_vanishes_before_the_queue(lab: LabState) -> None:
    reader = Reader(lab)
    leg = reader.lanes[0].leg_a.device
    tc = ["ip", "netns", "exec", lab.service_host, "tc"]
    with pinging(lab, "0.005"):
        assert all(one.closes for one in reader.watch(10))
        # It is there already where the lane has a third leg.
        run([*tc, "qdisc", "add", "dev", leg, "clsact"], check=False)
        where = ["dev", leg, "ingress", "protocol", "all", "bpf", "da", "bytecode", TWENTIETH]
        run([*tc, "filter", "add", *where])
        began = time.monotonic()
        try:
            while (balance := reader.read()) is None or balance.closes:
                assert time.monotonic() - began < 30
                time.sleep(1.0)
        finally:
            run([*tc, "filter", "del", "dev", leg, "ingress"])
        took = time.monotonic() - began
    assert balance.unexplained > 10
    assert balance.reason.endswith(
        "packets vanished between the switch and the queue of lane prevent, on the way in or back: "
        "see what is attached to its two legs"
    )
    assert took < 30


def test_balance_closes_over_the_death_of_an_engine(lab: LabState) -> None:
    reader = Reader(lab)
    with pinging(lab, "0.002"):
        found = reader.watch(9)
        state = read_inspection_state(reader.settings.inspection_state)
        assert state is not None
        pid = state.lanes[0].pid
        assert pid is not None
        assert Path(f"/proc/{pid}/comm").read_text().startswith("Suricata")
        # Held for a moment: a new engine is often there before BFD misses the old one.
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.6)
        os.kill(pid, signal.SIGKILL)
        found += reader.watch(20)
    found += reader.watch(4)
    assert all(one.closes for one in found), next(one for one in found if not one.closes)
    last = found[-1]
    # What it took with it, and what nobody listened for, is told; what BFD held back never entered.
    assert last.refused + last.lost_with_engine > 0
    assert last.blocked > 0
