"""The control plane dies, is restarted, is kept busy, loses its sense of time: no packet notices."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from appliance import lab as the_lab
from appliance.lab import hypervisor, processes
from appliance.lab.plan import ProcessRecord
from appliance.lab.services import build_env, build_service_argv
from appliance.lab.store import hold_lock, write_state
from steering.errors import HairpinError
from tests.chaos.meter import Tally
from tests.chaos.registry import Row, fault
from tests.chaos.rows_switch import build_control_row
from tests.chaos.stage import MODES, Stage, build_policies, expect
from tests.support.appliance import build_policy, inspect
from tests.support.lab import wait_until

COUNTED_RATE = 20
DRIFT = "cookie=0x4850000000000001,table=40,priority=9,in_port=999,actions=drop"
"""A flow with our cookie that we did not make: what a service that was away has to find."""


def tell_events(tally: Tally) -> dict[str, Any]:
    return {
        "events": tally.expected,
        "events_lost": len(tally.lost),
        "events_doubled": len(tally.doubled),
    }


def claim_events(tally: Tally) -> tuple[tuple[bool, str], ...]:
    return (
        (not tally.lost, f"{len(tally.lost)} alerts lost, the first {tally.lost[:5]}"),
        (not tally.doubled, f"{len(tally.doubled)} alerts doubled, the first {tally.doubled[:5]}"),
    )


def _kill_service(stage: Stage, name: str, times: int) -> Iterable[Row]:
    switch = stage.appliance.read_switch()
    before = stage.appliance.find_latest_alert()
    starts, reconciled = [], []
    with stage.traffic(rate=100, counted=COUNTED_RATE) as meter:
        for number in range(times):
            time.sleep(random.uniform(0.0, 0.5))
            stage.kill("serve")
            if number % 5 == 2:
                stage.appliance.ofctl("add-flow", DRIFT)
            began = time.monotonic()
            stage.start("serve")
            expect(wait_until(stage.appliance.is_ready, 20), "serve did not come up again")
            starts.append(time.monotonic() - began)
            reconciled.append(stage.wait_switch(switch, time.monotonic()))
        time.sleep(1)
    stage.wait_ok()
    different = int(stage.appliance.read_switch() != switch)
    tally = stage.wait_counted(meter.traffic, before)
    for mode in MODES:
        figures = {
            "kills": times,
            "start_s": round(statistics.median(starts), 2),
            "reconciled_s": round(max(reconciled), 2),
            "flows_different": different,
            **tell_events(tally),
        }
        yield build_control_row(name, mode, meter.traffic, figures, *claim_events(tally))


@fault("management service kill -9, 100 times", seconds=900)
def kill_service(stage: Stage) -> Iterable[Row]:
    """`serve` is killed and started 100 times under traffic; each fifth time the switch drifted."""
    return _kill_service(stage, "management service kill -9, 100 times", 100)


@fault("management service kill -9, 5 times", quick=True)
def kill_service_a_little(stage: Stage) -> Iterable[Row]:
    """The same, 5 times."""
    return _kill_service(stage, "management service kill -9, 5 times", 5)


def _change_policies(stage: Stage, name: str, changes: int, seconds: float) -> Iterable[Row]:
    switch = stage.appliance.read_switch()
    before = stage.appliance.find_latest_alert()
    base = build_policies(stage.lab)
    machines, policies = base[:-2], base[-2:]
    other = build_policy("other", "web-2", "db-2", inspect("detect", "open"))
    web = [{"protocol": "tcp", "ports": [80]}]
    elsewhere = build_policy("other", "app-2", "db-2", inspect("prevent"), services=web)
    raised = build_policy("closed", "web-1", "app-1", inspect("prevent", "closed"), priority=300)
    variants: tuple[list[dict[str, Any]], ...] = ([other], [elsewhere], [])
    took = []
    with stage.traffic(counted=COUNTED_RATE) as meter:
        began = time.monotonic()
        for number in range(changes):
            if number % 4 == 3:
                documents = [*machines, raised, policies[1]]
            else:
                documents = [*machines, *policies, *variants[number % 4]]
            asked = time.monotonic()
            answer = stage.appliance.put(documents)
            took.append(time.monotonic() - asked)
            expect(answer.status == 200, f"a change was refused: {answer.document}")
            time.sleep(max(0.0, began + (number + 1) * seconds / changes - time.monotonic()))
        minute = time.monotonic() - began
        expect(stage.appliance.put(base).status == 200, "the policies could not be put back")
        reconciled = stage.wait_switch(switch, time.monotonic())
        time.sleep(1)
    tally = stage.wait_counted(meter.traffic, before)
    for mode in MODES:
        figures = {
            "changes": changes,
            "changes_s": round(minute, 1),
            "applied_s": round(statistics.median(took), 3),
            "slowest_s": round(max(took), 3),
            "reconciled_s": round(reconciled, 2),
            "flows_different": 0,
            **tell_events(tally),
        }
        yield build_control_row(name, mode, meter.traffic, figures, *claim_events(tally))


@fault("100 policy changes in a minute", seconds=180)
def change_policies(stage: Stage) -> Iterable[Row]:
    """Other policies come and go, and the closed one's priority changes, 100 times in a minute."""
    return _change_policies(stage, "100 policy changes in a minute", 100, 60.0)


@fault("15 policy changes in 9 s", seconds=90, quick=True)
def change_policies_a_little(stage: Stage) -> Iterable[Row]:
    """The same, 15 times in 9 seconds."""
    return _change_policies(stage, "15 policy changes in 9 s", 15, 9.0)


def find_faketime() -> str:
    """Debian's libfaketime, wherever this architecture has it. Raises Failed."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    expect(found, "libfaketime is not installed (Debian: faketime)")
    return str(found[0])


class FakeClock:
    """`serve` with a clock of its own (libfaketime); the machine's own is never touched."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._file = stage.directory / "clock"
        self.set(0)

    def set(self, seconds: int) -> None:
        """So many seconds from the machine's clock."""
        scratch = self._file.with_suffix(".part")
        scratch.write_text(f"{seconds:+d}s\n")
        scratch.chmod(0o644)
        os.replace(scratch, self._file)

    def start(self) -> None:
        """As `services.start_service`; the library is loaded into the last program of the command."""
        fake = {
            "LD_PRELOAD": find_faketime(),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            # What waits and measures by it goes on; a step of the clock does not move it.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        with hold_lock(self._stage.name):
            state = hypervisor.record_process(the_lab.read_lab(self._stage.name), "serve")
            argv = build_service_argv(state, "serve")
            program = argv.index("appliance.cli") - 2  # the interpreter
            argv[program:program] = ["env", *(f"{key}={value}" for key, value in fake.items())]
            log_file = state.log_dir / "serve.log"
            pid, started = processes.start_process(
                argv,
                lab=state.name,
                log_file=log_file,
                env={**build_env(), "HOME": str(state.state_dir)},
            )
            record = ProcessRecord("serve", pid, started, str(log_file))
            self._stage.appliance.lab = write_state(state.with_process(record))


@fault("clock jumps of the management service", seconds=120)
def jump_clock(stage: Stage) -> Iterable[Row]:
    """`serve` sees its clock jump an hour forward, back, an hour back, and forward again."""
    find_faketime()
    switch = stage.appliance.read_switch()
    before = stage.appliance.find_latest_alert()
    clock = FakeClock(stage)
    stage.kill("serve")
    health, reconciled, silent = {}, [], 0
    try:
        clock.start()
        expect(wait_until(stage.appliance.is_ready, 30), "serve does not run with libfaketime")
        stage.wait_ok()
        with stage.traffic(counted=COUNTED_RATE) as meter:
            for seconds in (3600, 0, -3600, 0):
                clock.set(seconds)
                time.sleep(2)
                stage.appliance.ofctl("add-flow", DRIFT)
                reconciled.append(stage.wait_switch(switch, time.monotonic()))
                silent += not stage.appliance.is_ready()
                health[f"{seconds:+d}"] = stage.read_health()
                time.sleep(1)
        tally = stage.wait_counted(meter.traffic, before)
        healthy = wait_until(lambda: stage.read_health() == "ok", 10)
    finally:
        with contextlib.suppress(HairpinError):
            stage.kill("serve")
        stage.start("serve")
    for mode in MODES:
        figures = {
            "health": health,
            "reconciled_s": round(max(reconciled), 2),
            "flows_different": 0,
            **tell_events(tally),
        }
        yield build_control_row(
            "clock jumps of the management service",
            mode,
            meter.traffic,
            figures,
            *claim_events(tally),
            (silent == 0, "the API did not answer"),
            (healthy, "health is not ok 10 s after the clock is right again"),
        )
