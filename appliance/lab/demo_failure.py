"""Step (e) of the demonstration: the engine is killed, and each policy fails as it says.

Two pairs on one lane, pinged every 10 ms and captured at both ends: web-1 -> app-1 by a policy that
is closed on failure, app-1 -> db-1 by one that is open. Which packet passed when is read from the
captures, so nothing depends on how quickly this process looks.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from appliance.lab.changes import find_process, kill_process, start_in_vm, stop_process
from appliance.lab.demo_policies import LOG4SHELL, Attempt
from appliance.lab.demo_probe import (
    AnswerKind,
    count_sent,
    find_first_arrival,
    find_passed,
    parse_capture,
)
from appliance.lab.demo_report import Check, render_seconds
from appliance.lab.demo_stage import Stage, wait_until
from appliance.lab.services import INSPECT
from steering.errors import HairpinError

ENGINE = "engine-prevent"
CLOSED = ("web-1", "app-1")
OPEN = ("app-1", "db-1")
BACK_SECONDS = 20.0
OPEN_SECONDS = 5.0
HELD_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Pinging:
    """A ping between two VMs and a capture of its requests at either end."""

    stage: Stage
    ping: str
    sender: str
    receiver: str
    every: float = 0.01

    @property
    def sent(self) -> dict[int, float]:
        return parse_capture(self.stage.read_log(self.sender))

    @property
    def arrived(self) -> dict[int, float]:
        return parse_capture(self.stage.read_log(self.receiver))

    def wait_first(
        self, sent_after: float, seconds: float, look_every: float = 0.05
    ) -> float | None:
        """When the first of those sent from then on arrived; None if none did in time."""
        return wait_until(
            lambda: find_first_arrival(self.sent, self.arrived, sent_after), seconds, look_every
        )

    def wait_steady(self, seconds: float = 15.0) -> None:
        """Until half a second's worth passed, and 10 at least. Raises HairpinError."""
        begin = time.time()
        enough = max(10, int(0.5 / self.every))

        def is_steady() -> bool:
            return len(find_passed(self.sent, self.arrived, begin, time.time())) >= enough

        if not wait_until(is_steady, seconds):
            raise HairpinError(
                f"{self.ping}: pings do not pass\n{self.stage.read_log(self.ping)[-500:]}"
            )

    def stop(self) -> None:
        for role in (self.ping, self.sender, self.receiver):
            stop_process(self.stage.state, role)


def start_pinging(
    stage: Stage, source: str, target: str, *, every: float = 0.01, seconds: int = 120
) -> Pinging:
    """One request every ``every`` seconds, for ``seconds`` at most. Raises HairpinError."""
    state = stage.state
    ends = {}
    for vm, way in ((source, "out"), (target, "in")):
        argv = ["tcpdump", "-i", state.vm(vm).device, "-Q", way, "-n", "-tt", "-l"]
        argv += ["--immediate-mode", "icmp[icmptype] == icmp-echo"]
        _, ends[way] = start_in_vm(state, vm, argv, role=f"demo-capture-{source}-{target}-{way}")
    for role in ends.values():
        if not wait_until(lambda role=role: "listening on" in stage.read_log(role), 10.0):  # type: ignore[misc]
            raise HairpinError(f"tcpdump does not start: {stage.read_log(role)}")
    argv = ["ping", "-n", "-q", "-i", str(every), "-w", str(seconds), state.vm(target).address4]
    _, ping = start_in_vm(state, source, argv, role=f"demo-ping-{source}-{target}")
    return Pinging(stage, ping, ends["out"], ends["in"], every)


def run_failure(stage: Stage) -> Iterator[Check]:
    """(e) Kill the engine: once as it may happen, once so that it stays down for a while."""
    stage.say("(e) pinging a closed and an open pair every 10 ms")
    closed, opened = start_pinging(stage, *CLOSED), start_pinging(stage, *OPEN)
    try:
        closed.wait_steady()
        opened.wait_steady()
        yield _kill(stage, closed)
        closed.wait_steady()
        opened.wait_steady()
        yield from _kill_and_hold(stage, closed, opened)
    finally:
        closed.stop()
        opened.stop()


def _kill(stage: Stage, closed: Pinging) -> Check:
    stage.say("(e) killing the engine with kill -9")
    first, _ = find_process(stage.state, ENGINE)
    killed = time.time()
    kill_process(stage.state, ENGINE)
    back = closed.wait_first(time.time(), BACK_SECONDS)
    now = wait_until(lambda: _find_engine(stage), 5.0)
    return Check(
        "e",
        "engine: kill -9",
        "inspected again",
        f"by a new engine after {render_seconds(None if back is None else back - killed)}",
        back is not None and now not in (0, first),
    )


def _find_engine(stage: Stage) -> int:
    try:
        return find_process(stage.state, ENGINE)[0]
    except HairpinError:
        return 0


@dataclass(frozen=True, slots=True)
class Outage:
    """What breaks inspection and mends it again. ``begin`` returns when it is broken.

    ``what`` and ``mended`` name both in the table. ``held``: how long it is kept broken, in seconds;
    ``back``: how long it may take afterwards until packets are inspected again.
    """

    what: str
    begin: Callable[[], None]
    mended: str
    mend: Callable[[], None]
    held: float = HELD_SECONDS
    back: float = BACK_SECONDS
    look_every: float = 0.05


def _kill_and_hold(stage: Stage, closed: Pinging, opened: Pinging) -> Iterator[Check]:
    stage.say("(e) killing the engine, with its supervisor stopped so that it stays down")

    def begin() -> None:
        kill_process(stage.state, INSPECT, signal.SIGSTOP)
        kill_process(stage.state, ENGINE)

    def mend() -> None:
        kill_process(stage.state, INSPECT, signal.SIGCONT)

    outage = Outage("kill -9, supervisor stopped", begin, "supervisor goes on", mend)
    yield from run_outage(stage, closed, opened, outage)
    told = [one for one in stage.run_hairpin("events")["items"] if one["kind"] == "lane.down"]
    yield Check(
        "e",
        "hairpin events",
        "lane was down",
        told[0]["text"] if told else "nothing",
        bool(told),
    )


def run_outage(stage: Stage, closed: Pinging, opened: Pinging, outage: Outage) -> Iterator[Check]:
    """Break inspection, look at what an open and a closed policy do, mend it, and attack again."""
    attack_closed = Attempt(LOG4SHELL, *CLOSED, "IPv4")
    attack_open = Attempt(LOG4SHELL, *OPEN, "IPv4")
    try:
        began = time.time()
        outage.begin()
        gone = time.time()
        again = opened.wait_first(gone, OPEN_SECONDS)
        seen_before = stage.count_seen(attack_closed)
        through, against = stage.try_all([attack_open, attack_closed])
        seen = stage.count_seen(attack_closed) - seen_before
        time.sleep(max(0.0, gone + outage.held - time.time()))
        ended = time.time()
    finally:
        outage.mend()
    back = closed.wait_first(ended, outage.back, outage.look_every)
    passed = find_passed(closed.sent, closed.arrived, gone, ended)
    sent = count_sent(closed.sent, gone, ended)
    yield Check(
        "e",
        f"{outage.what}: open, {OPEN[0]} -> {OPEN[1]}",
        "passes uninspected",
        f"after {render_seconds(None if again is None else again - began)}; "
        f"exploit: {through.text}",
        again is not None and through.is_200,
    )
    yield Check(
        "e",
        f"  the same {ended - gone:.1f} s: closed, {CLOSED[0]} -> {CLOSED[1]}",
        "0 packets pass",
        f"{len(passed)} of {sent} pings; exploit: {against.text}, server saw {seen}",
        not passed
        and sent >= min(50, 0.5 / closed.every)
        and seen == 0
        and against.kind in (AnswerKind.UNREACHED, AnswerKind.SILENT),
    )
    yield Check(
        "e",
        f"  {outage.mended}",
        "inspected again",
        f"after {render_seconds(None if back is None else back - ended)}",
        back is not None,
    )
    opened.wait_steady()
    tries = [attack_closed, attack_open]

    def is_blocked() -> bool:
        return all(one.kind is AnswerKind.SILENT for one in stage.try_all(tries))

    # The group goes back to the engine as soon as BFD is up at both legs.
    blocked = wait_until(is_blocked, 20.0)
    yield Check(
        "e",
        f"{LOG4SHELL.name} on both pairs, after that",
        "blocked again",
        "no answer on either" if blocked else "answered",
        blocked,
    )
