"""The shortcut from end to end: a real engine lets connections go, a real switch passes them, all come back."""

from __future__ import annotations

import contextlib
import select
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance import lab as the_lab
from tests.bench.traffic import measure_idle, measure_transfer, start_servers
from tests.support.appliance import (
    EXPLOIT,
    EXPLOIT_SID,
    Appliance,
    build_base,
    build_policy,
    inspect,
)
from tests.support.inspection_lane import in_namespace
from tests.support.lab import build_name, wait_until
from tests.support.rule_pipelines import write_feed
from tests.support.session import Session, open_session

pytestmark = pytest.mark.lab

RULE = 'alert tcp any any -> any 9 (msg:"a rule"; content:"nothing"; sid:{sid}; rev:1;)'
MEGABYTE = 1_000_000
BIG = 3 * MEGABYTE
MOST_SECONDS = 0.05
"""From asking until inspection has every connection again."""


def cut(after: str = "1MB", most: int = 100, **more: Any) -> dict[str, Any]:
    action = inspect("prevent")
    action["inspect"]["shortcut"] = {"after": after, "maxFlows": most, **more}
    return action


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Servers and the rule pipeline drop their rights, so it is not below pytest's own."""
    with tempfile.TemporaryDirectory(prefix="hairpin-shortcut-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def write_rules(directory: Path, *lines: str) -> Path:
    feed = write_feed(directory / "feed.tar.gz", *lines)
    feed.chmod(0o644)
    return feed


@pytest.fixture(scope="module")
def appliance(directory: Path) -> Iterator[Appliance]:
    feed = write_rules(directory, RULE.format(sid=2_900_001))
    name = build_name("c")
    overrides = {"rules": {"sources": [{"name": "feed", "url": feed.as_uri()}]}}
    try:
        yield start(Appliance(the_lab.bring_up(name, 6, overrides=overrides), directory / "vms"))
    finally:
        the_lab.take_down(name)


def start(found: Appliance) -> Appliance:
    start_servers(found, "app-1", "app-2")
    for vm in ("app-1", "app-2"):
        with (found.directory / f"nginx-{vm}" / "www" / "big").open("wb") as stream:
            stream.truncate(BIG)
    return found


@pytest.fixture
def policies(appliance: Appliance) -> list[dict[str, Any]]:
    """web-1 -> app-1 has a shortcut after 1 MB; web-1 -> app-2 has none, in the same lane."""
    return put(appliance, cut())


def put(appliance: Appliance, action: dict[str, Any]) -> list[dict[str, Any]]:
    documents = [
        *build_base(appliance.lab),
        build_policy("with", "web-1", "app-1", action),
        build_policy("without", "web-1", "app-2", inspect("prevent")),
    ]
    appliance.apply(documents)
    assert wait_until(lambda: appliance.is_forwarding("prevent"), 20)
    time.sleep(1.2)  # nothing is learned for a second after a change
    return documents


def find_shortcuts(appliance: Appliance) -> list[dict[str, Any]]:
    return list(appliance.read("shortcut", "list")["items"])


def let_go(appliance: Appliance, session: Session) -> None:
    """Get more than a megabyte, until the switch has learned the connection."""
    assert session.get("/big") == ("HTTP/1.1 200 OK", BIG)
    assert wait_until(lambda: find_shortcuts(appliance), 3), "no shortcut was learned"
    assert session.get("/") is not None


def is_stopped(session: Session) -> bool:
    """Whether an attack, now, on this connection, gets no answer."""
    return session.get("/", agent=EXPLOIT, seconds=1.5) is None


def test_a_connection_takes_its_shortcut_and_nothing_else_does(
    appliance: Appliance, policies: list[dict[str, Any]]
) -> None:
    with (
        open_session(appliance, "web-1", "app-1") as session,
        open_session(appliance, "web-1", "app-2") as other,
    ):
        let_go(appliance, session)
        (one,) = find_shortcuts(appliance)
        assert (one["policy"], one["reason"]) == ("with", "1MB")
        assert other.get("/big") == ("HTTP/1.1 200 OK", BIG)
        assert len(find_shortcuts(appliance)) == 1, "a policy without one stays inspected"
        assert is_stopped(other)
        with open_session(appliance, "web-1", "app-1") as young:
            assert is_stopped(young), "so is a connection before its first megabyte"
        assert len(find_shortcuts(appliance)) <= 1


@pytest.mark.parametrize("family", [4, 6])
def test_what_came_back_is_inspected_again_and_lives(
    appliance: Appliance, policies: list[dict[str, Any]], family: int
) -> None:
    after = appliance.find_latest_alert()
    with open_session(appliance, "web-1", "app-1", family=family) as session:
        let_go(appliance, session)
        # Megabytes of which the engine sees nothing.
        assert session.get("/big") == ("HTTP/1.1 200 OK", BIG)
        assert appliance.cli("shortcut", "return", "--all").status == 0
        assert find_shortcuts(appliance) == []
        for _ in range(3):
            assert session.get("/") == ("HTTP/1.1 200 OK", len("hello from app-1\n"))
        assert session.get("/big") == ("HTTP/1.1 200 OK", BIG), "it is not taken for a stray"
        assert is_stopped(session)
    (alert, *_) = appliance.wait_alerts(after, query=f"&sid={EXPLOIT_SID}")
    assert alert["policy"] == "with"
    assert alert["source"]["address"] == appliance.address("web-1", family)
    assert alert["destination"]["port"] == 80
    assert EXPLOIT not in appliance.read_requests("app-1")


def test_the_balance_closes_over_shortcuts_and_returns(
    appliance: Appliance, policies: list[dict[str, Any]]
) -> None:
    """What came back by the third leg, and what the engine was shown twice, is accounted for."""
    for _ in range(3):
        with open_session(appliance, "web-1", "app-1") as session:
            let_go(appliance, session)
            assert appliance.api("/shortcuts", "DELETE").status == 200
            for _ in range(3):
                assert session.get("/") is not None
        time.sleep(1.2)  # for so long nothing is learned after a return
    time.sleep(8)  # the engine's figures are up to 4 s old

    def read(name: str) -> float:
        lines = appliance.api("/metrics").document.splitlines()
        return float(
            next(one for one in lines if one.startswith(f'{name}{{lane="prevent"}}')).split()[1]
        )

    assert wait_until(lambda: read("hairpin_balance_closes") == 1, 20)
    assert abs(read("hairpin_balance_unexplained_packets")) <= 2


def test_the_trade_is_as_told_an_attack_behind_the_trigger_is_delivered(
    appliance: Appliance, policies: list[dict[str, Any]]
) -> None:
    """docs/shortcut.md says so; if this fails, the page is wrong."""
    with open_session(appliance, "web-1", "app-1") as session:
        let_go(appliance, session)
        assert session.get("/", agent=EXPLOIT) is not None


def test_a_tuple_used_again_is_inspected_from_its_first_byte(
    appliance: Appliance, policies: list[dict[str, Any]]
) -> None:
    with open_session(appliance, "web-1", "app-1") as session:
        let_go(appliance, session)
        port = session.port
        session.close()
        with open_session(appliance, "web-1", "app-1", port=port) as again:
            assert again.get("/") is not None
            assert find_shortcuts(appliance) == []
            assert is_stopped(again)


def test_changed_policies_send_all_back(
    appliance: Appliance, policies: list[dict[str, Any]]
) -> None:
    with open_session(appliance, "web-1", "app-1") as session:
        let_go(appliance, session)
        other = build_policy("more", "web-2", "db-1", inspect("prevent"), priority=90)
        appliance.apply([*policies, other])
        assert find_shortcuts(appliance) == []
        assert session.get("/") is not None
        assert is_stopped(session)


def test_an_alert_of_either_vm_sends_its_connections_back(
    appliance: Appliance, policies: list[dict[str, Any]]
) -> None:
    with open_session(appliance, "web-1", "app-1") as session:
        let_go(appliance, session)
        appliance.attack("web-1", "app-2")
        assert wait_until(lambda: find_shortcuts(appliance) == [], 5)
        assert is_stopped(session)


def test_an_alert_leaves_them_where_the_policy_says_so(appliance: Appliance) -> None:
    put(appliance, cut(returnOnAlert=False))
    with open_session(appliance, "web-1", "app-1") as session:
        let_go(appliance, session)
        after = appliance.find_latest_alert()
        appliance.attack("web-1", "app-2")
        appliance.wait_alerts(after)
        time.sleep(1.0)
        assert len(find_shortcuts(appliance)) == 1


def test_changed_rules_send_all_back(
    appliance: Appliance, policies: list[dict[str, Any]], directory: Path
) -> None:
    with open_session(appliance, "web-1", "app-1") as session:
        let_go(appliance, session)
        write_rules(
            directory,
            *(RULE.format(sid=sid) for sid in (2_900_001, time.time_ns() % 10**6 + 2_900_002)),
        )
        done = appliance.cli("rules", "update", "--json", timeout=120)
        assert done.status == 0, done.stderr
        assert find_shortcuts(appliance) == []
        assert is_stopped(session)


def test_no_more_connections_than_the_policy_allows(appliance: Appliance) -> None:
    put(appliance, cut(most=2))
    with contextlib.ExitStack() as stack:
        sessions = [
            stack.enter_context(open_session(appliance, "web-1", "app-1")) for _ in range(4)
        ]
        for session in sessions:
            assert session.get("/big") == ("HTTP/1.1 200 OK", BIG)
        for session in sessions:
            assert session.get("/big") == ("HTTP/1.1 200 OK", BIG)
        taken = {one["source"]["port"] for one in find_shortcuts(appliance)}
        assert len(taken) == 2
        others = [session for session in sessions if session.port not in taken]
        assert all(is_stopped(session) for session in others), "the others stay inspected"


def test_all_are_inspected_within_50_milliseconds(
    appliance: Appliance, policies: list[dict[str, Any]]
) -> None:
    """From asking the API until the first frame of the connection is in the lane; frames come each 1 ms."""
    device = appliance.lab.lanes[0].device_a
    watch = in_namespace(
        appliance.lab.service_host,
        lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)),
    )
    took, answered = [], []
    with watch:
        watch.bind((device, 3))
        watch.setblocking(False)
        for _ in range(7):
            with open_session(appliance, "web-1", "app-1") as session:
                mark = session.port.to_bytes(2, "big") + (80).to_bytes(2, "big")
                let_go(appliance, session)
                session.tell("trickle", 600, 0.001)
                time.sleep(0.2)
                _drain(watch)
                began = time.monotonic()
                asking = threading.Thread(
                    target=lambda began=began: (
                        appliance.api("/shortcuts", "DELETE"),
                        answered.append(time.monotonic() - began),
                    )
                )
                asking.start()
                took.append(_wait_marked(watch, mark, began) - began)
                asking.join()
                session.hear()
            time.sleep(1.2)
    shown = ", ".join(f"{one * 1000:.0f}" for one in took)
    print(
        f"\n{shown} ms until the first frame is inspected; answered after "
        f"{statistics.median(answered) * 1000:.0f} ms"
    )
    assert statistics.median(took) < MOST_SECONDS


def _drain(watch: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            watch.recv(65_536)


def _wait_marked(watch: socket.socket, mark: bytes, began: float) -> float:
    while time.monotonic() - began < 5:
        if select.select([watch], [], [], 1)[0]:
            with contextlib.suppress(BlockingIOError):
                frame, address = watch.recvfrom(65_536)
                if mark in frame[:64] and address[2] != socket.PACKET_OUTGOING:
                    return time.monotonic()
    raise AssertionError("no frame of the connection came into the lane within 5 s")


def test_it_is_as_fast_as_the_direct_path(
    appliance: Appliance, policies: list[dict[str, Any]]
) -> None:
    """A look only, that most of a transfer leaves the hairpin; `make bench` measures."""
    idle = measure_idle(looks=1)
    rates = {vm: measure_transfer(appliance, vm, 1.5, idle).rate for vm in ("app-1", "app-2")}
    print(f"\nshortcut {rates['app-1']:.2f}, inspected {rates['app-2']:.2f} Gbit/s")
    coverage = appliance.api("/shortcuts").document
    assert coverage is not None
    assert rates["app-1"] > 1.2 * rates["app-2"]
