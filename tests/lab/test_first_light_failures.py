"""Parts that die: a lane fails alone and as its policies say, and nothing is lost or left wrong."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from appliance import lab as the_lab
from appliance.lab import LabState
from tests.support.appliance import BLOCKED, Appliance, Lines, build_base, build_policy, inspect
from tests.support.lab import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.slow]

# Sends a numbered datagram each 5 ms and prints, for each that was answered, number and time.
CALLER = r"""
import socket, sys, time
address, seconds = sys.argv[1], float(sys.argv[2])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.connect((address, 7))
    s.settimeout(0.005)
    end, number = time.time() + seconds, 0
    while time.time() < end:
        try:
            s.send(b"%d %f" % (number, time.time()))
            number += 1
            began = time.time()
            print(s.recv(100).decode(), flush=True)
            time.sleep(max(0, 0.005 - (time.time() - began)))
        except OSError:
            pass
"""
ECHO = r"""
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.bind(("", 7))
    while True:
        data, peer = s.recvfrom(100)
        s.sendto(data, peer)
"""


def build_documents(lab: LabState) -> list[dict[str, Any]]:
    """Each lane with a closed policy and an open one."""
    return [
        *build_base(lab),
        build_policy("prevent-closed", "web-1", "app-1", inspect("prevent", "closed")),
        build_policy("prevent-open", "web-1", "app-2", inspect("prevent", "open")),
        build_policy("detect-closed", "web-1", "db-1", inspect("detect", "closed")),
        build_policy("detect-open", "web-1", "db-2", inspect("detect", "open")),
    ]


PAIRS = {
    ("prevent", "closed"): "app-1",
    ("prevent", "open"): "app-2",
    ("detect", "closed"): "db-1",
    ("detect", "open"): "db-2",
}


@pytest.fixture(scope="module")
def appliance(module_lab: LabState, tmp_path_factory: pytest.TempPathFactory) -> Appliance:
    appliance = Appliance(module_lab, tmp_path_factory.mktemp("servers"))
    appliance.start_web(*PAIRS.values())
    for vm in PAIRS.values():
        appliance.start(vm, sys.executable, "-c", ECHO, role=f"{vm}-echo")
    appliance.apply(build_documents(module_lab))
    assert wait_until(lambda: all(map(appliance.is_forwarding, ("prevent", "detect"))))
    return appliance


@pytest.fixture(autouse=True)
def whole_again(appliance: Appliance) -> Iterator[None]:
    wait_whole(appliance)
    yield
    wait_whole(appliance)


def wait_whole(appliance: Appliance) -> None:
    assert wait_until(
        lambda: appliance.is_ready() and appliance.api("/health").document["status"] == "ok", 30
    ), appliance.api("/health").document["problems"]
    # A lane that is down again soon is the same failure that goes on: let the last one end first,
    # that of the lane's start too.
    assert wait_until(
        lambda: all(one.get("ended") for one in appliance.find_events("lane.down", 0)), 30
    )


class Call:
    """Datagrams from web-1 to a VM and back; afterwards, what was answered."""

    def __init__(self, appliance: Appliance, vm: str, seconds: float) -> None:
        argv = [sys.executable, "-c", CALLER, appliance.address(vm), str(seconds)]
        argv = appliance.lab.netns_argv("web-1", argv)
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self.answered: list[tuple[int, float]] = []

    def end(self) -> Call:
        for line in self.process.communicate(timeout=60)[0].splitlines():
            number, sent = line.split()
            self.answered.append((int(number), float(sent)))
        return self

    def count(self, since: float, until: float) -> int:
        return sum(since <= sent < until for _, sent in self.answered)

    def find_first(self, since: float) -> float:
        """Seconds from then until the first that was answered."""
        return next(sent for _, sent in self.answered if sent >= since) - since


@contextmanager
def hung(appliance: Appliance, profile: str) -> Iterator[None]:
    """Stop the engine (SIGSTOP) meanwhile; whoever supervises it may replace it before."""
    the_lab.kill_process(appliance.lab, f"engine-{profile}", signal.SIGSTOP)
    yield


@contextmanager
def killed(appliance: Appliance, profile: str) -> Iterator[None]:
    the_lab.kill_process(appliance.lab, f"engine-{profile}", signal.SIGKILL)
    yield


@pytest.mark.parametrize("how", [hung, killed])
@pytest.mark.parametrize("profile", ["detect", "prevent"])
def test_a_lane_fails_alone_and_as_its_policies_say(
    appliance: Appliance, profile: str, how: Callable[[Appliance, str], Any]
) -> None:
    other = "prevent" if profile == "detect" else "detect"
    started = time.time()
    calls = {key: Call(appliance, vm, 9) for key, vm in PAIRS.items()}
    time.sleep(1)
    # What reaches the closed policy's VM while no engine runs has not been inspected.
    sniff = appliance.lab.netns_argv(
        PAIRS[profile, "closed"], ["tcpdump", "-ttlnni", "eth0", "udp dst port 7"]
    )
    with subprocess.Popen(
        sniff, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as sniffer:
        time.sleep(0.5)
        struck = time.time()
        with how(appliance, profile):
            assert wait_until(lambda: not appliance.is_forwarding(profile), 2)
            down = time.time()
            assert appliance.is_forwarding(other)
            # Now: the other lane inspects, and here open is open.
            before = appliance.find_latest_alert()
            status = appliance.attack("web-1", PAIRS[other, "closed"]).status
            assert status == (BLOCKED if other == "prevent" else 0)
            assert appliance.wait_alerts(before)[0]["lane"] == other
        assert wait_until(lambda: appliance.is_forwarding(profile), 20)
        back = time.time()
        for call in calls.values():
            call.end()
        sniffer.terminate()
        arrived = [
            float(line.split()[0]) for line in sniffer.communicate()[0].splitlines() if line.strip()
        ]
    closed, opened = calls[profile, "closed"], calls[profile, "open"]
    gap = opened.find_first(struck + 0.05)
    print(f"\n{how.__name__} {profile}: open passes after {gap * 1000:.0f} ms, "
          f"back after {back - struck:.1f} s")  # fmt: skip
    assert gap < 1.0, "the open policy did not pass"
    assert closed.count(struck - 1, struck) > 50
    uninspected = [moment for moment in arrived if struck + 0.02 < moment < down]
    assert uninspected == [], "a closed policy passed what no engine has seen"
    for on_failure in ("closed", "open"):
        call = calls[other, on_failure]
        numbers = [number for number, sent in call.answered if sent > struck - 0.5]
        lost = numbers[-1] - numbers[0] + 1 - len(numbers)
        assert lost <= len(numbers) * 0.02, (
            f"{lost} of the other lane's were lost",
            appliance.find_events("lane.down", started),
        )
    before = appliance.find_latest_alert()
    status = appliance.attack("web-1", PAIRS[profile, "closed"]).status
    assert status == (BLOCKED if profile == "prevent" else 0)
    assert appliance.wait_alerts(before)[0]["lane"] == profile
    # An event is kept when the management service has read what passed meanwhile.
    assert wait_until(lambda: bool(appliance.find_events("lane.down", started)), 10)
    events = appliance.find_events("lane.down", started)
    assert [event["subject"] for event in events] == [f"lane {profile}"]


def restart_serve(appliance: Appliance) -> None:
    appliance.lab = the_lab.start_service(the_lab.read_lab(appliance.lab.name), "serve")
    assert wait_until(appliance.is_ready, 20)


def test_serve_dies_and_no_packet_nor_alert_is_lost(appliance: Appliance) -> None:
    switch = appliance.read_switch()
    before = appliance.find_latest_alert()
    call = Call(appliance, PAIRS["prevent", "closed"], 6)
    time.sleep(0.5)
    appliance.attack("web-1", PAIRS["prevent", "closed"], path="/before")
    the_lab.kill_process(appliance.lab, "serve")
    for number in range(2):
        status = appliance.attack(
            "web-1", PAIRS["prevent", "closed"], path=f"/during-{number}"
        ).status
        assert status == BLOCKED
    assert appliance.read_switch() == switch
    restart_serve(appliance)
    appliance.attack("web-1", PAIRS["prevent", "closed"], path="/after")
    alerts = appliance.wait_alerts(before, 4)
    paths = [re.findall(r"GET (\S+) ", alert["payload"])[-1] for alert in alerts]
    assert sorted(paths) == ["/after", "/before", "/during-0", "/during-1"]
    assert {alert["source"]["vm"]["name"] for alert in alerts} == {"web-1"}
    assert {alert["policy"] for alert in alerts} == {"prevent-closed"}
    time.sleep(0.5)
    assert len(appliance.find_alerts(before)) == 4, "told twice"
    assert appliance.read_switch() == switch
    call.end()
    numbers = [number for number, _ in call.answered]
    assert numbers[-1] - numbers[0] + 1 - len(numbers) <= len(numbers) * 0.01


def test_following_goes_on_over_a_restart_without_loss_or_doubling(appliance: Appliance) -> None:
    target = PAIRS["prevent", "closed"]
    follower = Lines(appliance.start_cli("alerts", "--follow", "--json"))
    try:
        # Followed from now on: the first attacks may come before it listens.
        def sees() -> bool:
            appliance.attack("web-1", target, path="/live")
            return bool(follower.lines)

        assert wait_until(sees, 15)
        began = appliance.find_latest_alert()
        struck = time.monotonic()
        appliance.attack("web-1", target, path="/next")
        alert = appliance.wait_alerts(began)[0]

        def ids() -> list[int]:
            return [json.loads(line)["id"] for line in follower.lines]

        assert wait_until(lambda: alert["id"] in ids(), 2)
        assert time.monotonic() - struck < 5
        the_lab.kill_process(appliance.lab, "serve")
        appliance.attack("web-1", target, path="/down")
        restart_serve(appliance)
        appliance.attack("web-1", target, path="/up")
        wanted = [one["id"] for one in appliance.wait_alerts(began, 3)]
        assert wait_until(lambda: [one for one in ids() if one > began] == wanted, 20), (
            ids(),
            wanted,
        )
        assert len(set(ids())) == len(ids())
    finally:
        follower.end()


def test_inspect_dies_and_the_engines_go_on(appliance: Appliance) -> None:
    pids = {p: the_lab.find_process(appliance.lab, f"engine-{p}") for p in ("prevent", "detect")}
    call = Call(appliance, PAIRS["prevent", "closed"], 6)
    time.sleep(0.5)
    the_lab.kill_process(appliance.lab, "inspect")
    before = appliance.find_latest_alert()
    assert appliance.attack("web-1", PAIRS["prevent", "closed"]).status == BLOCKED
    appliance.wait_alerts(before)
    assert appliance.is_forwarding("prevent")
    assert wait_until(lambda: appliance.api("/health").document["status"] != "ok", 10)
    appliance.lab = the_lab.start_service(the_lab.read_lab(appliance.lab.name), "inspect")
    assert wait_until(lambda: appliance.api("/health").document["status"] == "ok", 30)
    call.end()
    assert appliance.attack("web-1", PAIRS["prevent", "closed"]).status == BLOCKED
    now = {p: the_lab.find_process(appliance.lab, f"engine-{p}") for p in ("prevent", "detect")}
    assert now == pids, "the engines were not taken over but started anew"
    numbers = [number for number, _ in call.answered]
    assert numbers[-1] - numbers[0] + 1 - len(numbers) <= len(numbers) * 0.01


def wait_mended(appliance: Appliance, switch: object, since: float, seconds: float = 2.0) -> float:
    """Seconds until the switch is as it was. Fails the test after ``seconds``, or without an event."""
    began = time.monotonic()
    assert wait_until(lambda: appliance.read_switch() == switch, seconds)
    took = time.monotonic() - began
    assert wait_until(lambda: appliance.find_events("drift.mended", since), 5)
    print(f"\nmended in {took:.2f} s")
    return took


def test_flows_and_groups_changed_by_hand_are_mended(appliance: Appliance) -> None:
    switch = appliance.read_switch()

    def change(*argv: str) -> None:
        since = time.time()
        appliance.ofctl(*argv)
        wait_mended(appliance, switch, since)

    change("del-flows", "cookie=0x4850000000000000/0xffff000000000000")
    flow = next(line for line in switch[0] if "table=60," in line and "priority=100" in line)
    match = re.sub(r"^.*?priority=\d+,(.*) actions=.*$", r"\1", flow)
    change("add-flow", f"cookie=0x4850040000000001,table=60,priority=100,{match},actions=drop")
    change("mod-group", "group_id=1213202448,type=all,bucket=actions=drop")
    change("del-groups", "group_id=1213202448")
    before = appliance.find_latest_alert()
    assert appliance.attack("web-1", PAIRS["prevent", "closed"]).status == BLOCKED
    appliance.wait_alerts(before)


def test_a_restarted_switch_steers_again(appliance: Appliance) -> None:
    switch = appliance.read_switch()
    since = time.time()
    appliance.lab = the_lab.restart_vswitchd(appliance.lab, plain_flow=True)
    took = wait_mended(appliance, switch, since, 3.0)
    assert took < 3.0
    assert wait_until(lambda: appliance.is_forwarding("prevent"), 5)
    assert appliance.curl("web-1", PAIRS["prevent", "closed"]).status == 0
    before = appliance.find_latest_alert()
    assert appliance.attack("web-1", PAIRS["prevent", "closed"]).status == BLOCKED
    appliance.wait_alerts(before)
