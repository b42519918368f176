"""A canary names the place at which the way through a lane is broken; each is really broken here.

What `serve` or `inspect` would mend at once is broken again and again until the canary has told.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance import lab as the_lab
from appliance.lab import LabState
from steering.run import run
from tests.support.appliance import Appliance, build_base, build_policy, inspect
from tests.support.lab import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(240)]

LANE = "prevent"


@pytest.fixture(scope="module")
def appliance(
    module_lab: LabState, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Appliance]:
    appliance = Appliance(module_lab, tmp_path_factory.mktemp("servers"))
    try:
        appliance.start_web("app-1")
        appliance.apply(
            [*build_base(module_lab), build_policy("all", "web", "app", inspect("prevent"))]
        )
        assert wait_until(lambda: send(appliance)["passed"] is True, 30)
        yield appliance
    finally:
        appliance.stop_all()


def send(appliance: Appliance, lane: str = LANE) -> dict[str, Any]:
    """Have every lane proved now; the proof of one."""
    answer = appliance.api("/canaries", "POST")
    assert answer.status == 200, answer
    lanes = {one["lane"]: one["canary"] for one in answer.document["lanes"]}
    found: dict[str, Any] = lanes[lane]
    return found


@contextmanager
def repeated(action: Callable[[], object], seconds: float = 0.03) -> Iterator[None]:
    """Do it at once, and again and again meanwhile."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            action()

    action()
    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def run_in_host(appliance: Appliance, *argv: str) -> None:
    """In the service host, whatever comes of it: others mend at the same time."""
    where = ["ip", "netns", "exec", appliance.lab.service_host]
    subprocess.run([*where, *argv], capture_output=True, check=False)


def check_lost(appliance: Appliance, stage: str) -> dict[str, Any]:
    proof = send(appliance)
    assert (proof["passed"], proof["stage"]) == (False, stage), proof
    return proof


def check_mended(appliance: Appliance, since: float) -> None:
    """The lane is proved again, and the failure is an event that has ended."""
    assert wait_until(lambda: send(appliance)["passed"] is True, 30)
    events = appliance.find_events("canary.failed", since)
    assert events, "no event told of it"
    assert wait_until(
        lambda: all(one["ended"] for one in appliance.find_events("canary.failed", since)), 10
    )


@pytest.fixture
def since(appliance: Appliance) -> Iterator[float]:
    began = time.time()
    yield began
    check_mended(appliance, began)
    # The other lane was never concerned, nor did an alert come of a canary.
    assert appliance.find_alerts(0, "&sid=4850999") == []


def test_flow_table(appliance: Appliance, since: float) -> None:
    appliance.ofctl("add-flow", "cookie=0x77,table=10,priority=60000,in_port=291,actions=drop")
    try:
        check_lost(appliance, "flow table")
        health = appliance.api("/health")
        assert health.status == 503
        reasons = [one["reason"] for one in health.document["problems"]]
        assert any("flow table" in reason for reason in reasons), reasons
    finally:
        appliance.ofctl("del-flows", "cookie=0x77/-1,table=10")


def test_vlan(appliance: Appliance, since: float) -> None:
    lane = next(one for one in appliance.lab.lanes if one.profile == LANE)
    steps = f"push_vlan:0x8100,set_field:{0x1000 | 77}->vlan_vid,output:{lane.ofport_a}"
    appliance.ofctl(
        "add-flow", f"cookie=0x77,table=50,priority=60000,in_port=291,reg2=0x10,actions={steps}"
    )
    try:
        check_lost(appliance, "vlan")
    finally:
        appliance.ofctl("del-flows", "cookie=0x77/-1,table=50")


def test_bridge(appliance: Appliance, since: float) -> None:
    with repeated(lambda: run_in_host(appliance, "ip", "link", "set", "prev-b", "nomaster")):
        check_lost(appliance, "bridge")


@pytest.mark.parametrize("program", ["iptables", "ip6tables"])
def test_queue_rule(appliance: Appliance, since: float, program: str) -> None:
    flush = (program, "-t", "mangle", "-F", "hairpin")
    with repeated(lambda: run_in_host(appliance, *flush)):
        proof = check_lost(appliance, "queue rule")
    if program == "ip6tables":
        assert "ipv6" in proof["detail"] or "ip6tables" in proof["detail"]


def test_engine(appliance: Appliance, since: float) -> None:
    the_lab.kill_process(appliance.lab, "engine-prevent", signal.SIGSTOP)
    check_lost(appliance, "engine")


def test_ruleset(appliance: Appliance, since: float) -> None:
    """Another program had the engine load other rules, as many as these; the file is right again."""
    socket = appliance.lab.run_dir / "lanes" / LANE / "command.socket"
    rules = find_loaded_file(appliance)
    kept = rules.read_text()
    own = [line for line in kept.splitlines() if "hairpin-canary" not in line]
    other = 'alert ip any any -> any any (msg:"another"; content:"nothing like it"; sid:1;)'

    def load_other() -> bool:
        # `serve` looks at the file every two seconds, and puts both right if it looks just now.
        rules.write_text("\n".join([*own, other]) + "\n")
        run(["suricatasc", "-c", "ruleset-reload-rules", str(socket)], timeout=60)
        rules.write_text(kept)
        proof = send(appliance)
        return proof["passed"] is False and proof["stage"] == "ruleset"

    assert any(load_other() for _ in range(4)), "no canary told of it"
    assert wait_until(lambda: appliance.find_events("rules.reloaded", since), 20)


def find_loaded_file(appliance: Appliance) -> Path:
    """The rule file that the engine's configuration names."""
    text = (appliance.lab.run_dir / "lanes" / LANE / "suricata.yaml").read_text()
    lines = text.splitlines()
    return Path(lines[lines.index("rule-files:") + 1].strip().removeprefix("- "))


def test_eve(appliance: Appliance, since: float) -> None:
    """The engine goes on writing to a file that nobody reads any more."""
    eve = appliance.lab.run_dir / "lanes" / LANE / "eve.json"
    moved, other = eve.with_name("moved-away"), eve.with_name("another")
    stat = eve.stat()
    other.touch()
    other.chmod(stat.st_mode & 0o777)
    os.chown(other, stat.st_uid, stat.st_gid)
    # At no moment is there none: its supervisor would have the engine open a new one.
    moved.hardlink_to(eve)
    other.replace(eve)
    try:
        check_lost(appliance, "eve")
    finally:
        socket = appliance.lab.run_dir / "lanes" / LANE / "command.socket"
        run(["suricatasc", "-c", "reopen-log-files", str(socket)], timeout=30)
        moved.unlink()


def test_store(appliance: Appliance, since: float) -> None:
    """Another program holds the database."""
    holder = sqlite3.connect(appliance.lab.state_dir / "hairpin.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    try:
        check_lost(appliance, "store")
    finally:
        holder.rollback()
        holder.close()


def test_sender(appliance: Appliance, since: float) -> None:
    the_lab.kill_process(appliance.lab, "inspect")
    try:
        check_lost(appliance, "sender")
        before = appliance.find_latest_alert()
        appliance.attack("web-1", "app-1")
        appliance.wait_alerts(before)
    finally:
        appliance.lab = the_lab.start_service(the_lab.read_lab(appliance.lab.name), "inspect")
    assert json.loads(appliance.cli("health", "--json").stdout)["components"]["lanes"]
