"""Rule files that are bad, empty, missing or torn: what inspects goes on inspecting."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.chaos.meter import Traffic
from tests.chaos.registry import RULES_GOAL, Row, check, fault
from tests.chaos.stage import MODES, RULES, Stage, expect
from tests.support.lab import wait_until

BACK_WITHIN = 5.0
DAMAGES: dict[str, Callable[[Path], object]] = {
    "bad": lambda path: path.write_text("this is no rule\n" * 30),
    "empty": lambda path: path.write_text(""),
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_text(path.read_text()[: len(path.read_text()) // 2]),
}


class RuleWatch:
    """How long an engine that runs had fewer rules than the floor, as `hairpin inspect` tells."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.below = 0.0
        self.least = -1
        self.whole_since = 0.0

    def __enter__(self) -> RuleWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(0.05):
            now, rules = time.monotonic(), self._stage.read_rules()
            if rules and rules < self._stage.floor:
                self.below += now - last
            if rules:
                self.least = rules if self.least < 0 else min(self.least, rules)
            if rules < self._stage.floor:
                self.whole_since = 0.0
            elif not self.whole_since:
                self.whole_since = now
            last = now


@contextlib.contextmanager
def _restored(stage: Stage) -> Iterator[None]:
    """The good source, and what comes of it, is back afterwards."""
    try:
        yield
    finally:
        stage.rules.write_text(RULES)
        done = stage.appliance.cli("rules", "update", "--json", timeout=120)
        expect(done.status == 0, f"the good rules are refused afterwards: {done.stdout[-300:]}")


def _build_row(
    name: str, mode: str, traffic: Traffic, watch: RuleWatch, back: float, told: str, killed: bool
) -> Row:
    figures = traffic.build_figures(mode) | {
        "below_floor_s": round(watch.below, 2),
        "least_rules": watch.least,
        "good_set_back_s": round(back, 2),
        "told": told,
    }
    # With the engine killed, open lets pass what it must until the next one inspects.
    by_policy = killed and mode == "open"
    missed = check(
        (watch.below == 0, f"{watch.below:.1f} s below the floor"),
        (back <= BACK_WITHIN, f"the last good set was back after {back:.1f} s"),
        (
            by_policy or figures["uninspected"] == 0,
            f"{figures['uninspected']} hostile packets were delivered",
        ),
        (killed or figures["lost"] == 0, f"{figures['lost']} packets lost"),
        (bool(told), "nobody was told"),
    )
    return Row(name, mode, RULES_GOAL, figures, missed)


def _measure_source(stage: Stage, damage: str) -> Iterable[Row]:
    with _restored(stage), RuleWatch(stage) as watch, stage.traffic(rate=100) as meter:
        DAMAGES[damage](stage.rules)
        done = stage.appliance.cli("rules", "update", "--json", timeout=120)
        time.sleep(3)
        shown = stage.appliance.cli("rules", "show")
    notes = f"{shown.stderr}\n{shown.stdout}".splitlines()
    told = next((one.strip()[:160] for one in notes if "warning" in one or "not loaded" in one), "")
    if done.status != 0:
        told = str(json.loads(done.stdout)["reason"])[:200]
    expect(watch.whole_since, "the engine had not its rules when the row ended")
    for mode in MODES:
        yield _build_row(
            f"rule source {damage}", mode, meter.traffic, watch, 0.0, told, killed=False
        )


def _find_told(stage: Stage, struck: float) -> list[str]:
    """What says that the file was bad; not that an engine was away, which is another fault."""
    problems = stage.appliance.api("/health").document["problems"]
    reasons = [one["reason"] for one in problems if "ruleset" in one["reason"]]
    for kind in ("rules.restored", "rules.failed"):
        reasons += [one["text"] for one in stage.find_events(kind, struck)]
    return reasons


def _measure_in_force(stage: Stage, damage: str) -> Iterable[Row]:
    path = stage.lab.state_dir / "rules/prevent/current/suricata.rules"
    with _restored(stage), RuleWatch(stage) as watch, stage.traffic(rate=100) as meter:
        DAMAGES[damage](path)
        struck = stage.kill("engine-prevent")
        time.sleep(0.2)
        came = wait_until(lambda: watch.whole_since > struck + 0.1, 25)
        back = watch.whole_since - struck if came else 99.0
        if came:
            stage.wait_forwarding()
        time.sleep(1)
        # The service looks at the files every 2 s; an engine on the copy may be there before.
        wait_until(lambda: _find_told(stage, struck), 10)
        reasons = _find_told(stage, struck)
    told = reasons[0][:160] if reasons else ""
    for mode in MODES:
        yield _build_row(
            f"rule file in force {damage}, engine killed",
            mode,
            meter.traffic,
            watch,
            back,
            told,
            killed=True,
        )


def _register() -> None:
    for damage in DAMAGES:

        def source(stage: Stage, damage: str = damage) -> Iterable[Row]:
            return _measure_source(stage, damage)

        def in_force(stage: Stage, damage: str = damage) -> Iterable[Row]:
            return _measure_in_force(stage, damage)

        source.__doc__ = f"The source's file is {damage} when `hairpin rules update` fetches it."
        in_force.__doc__ = f"The ruleset on disk is {damage}, and the engine has to start anew."
        fault(f"rule source {damage}", seconds=120, quick=damage == "empty")(source)
        fault(f"rule file in force {damage}, engine killed", seconds=150)(in_force)


_register()
