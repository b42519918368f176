"""The fault campaign: `python -m tests.chaos [--quick] [--row NAME]... [--list] [--json]
[--out FILE] [--tries N]`.

Exit status 0 when every row meets its goal, 1 when one does not, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from appliance.logs import configure_logs
from tests.chaos import (  # noqa: F401
    rows_control,
    rows_engine,
    rows_evasions,
    rows_frames,
    rows_load,
    rows_rules,
    rows_store,
    rows_switch,
    rows_tcp,
)
from tests.chaos.registry import Fault, Row, find_faults
from tests.chaos.report import render_table
from tests.chaos.stage import Stage, build_stage_error, take_down_stale

ROOT = Path(__file__).resolve().parents[2]


Save = Callable[[list[dict[str, Any]]], None]


class TimeUp(Exception):
    """A row took longer than it may."""


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raises TimeUp in the main thread after ``seconds``."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise TimeUp(f"not measured within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Campaign:
    """Rows one after the other on one lab, which is made anew when a row leaves it unhealthy."""

    def __init__(self, faults: Sequence[Fault], save: Save, tries: int, verbose: bool) -> None:
        self.faults = faults
        self._tries = tries
        self._save = save
        self.rows: list[Row] = []
        self._verbose = verbose
        self._began = time.monotonic()
        self._stage: Stage | None = None

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", file=sys.stderr, flush=True)

    def run(self) -> None:
        try:
            for number, one in enumerate(self.faults, 1):
                self.say(f"{number}/{len(self.faults)} {one.name}: {one.text}")
                found = self._try(one)
                for row in found:
                    self.rows.append(row)
                    told = ", ".join(f"{key} {value}" for key, value in row.figures.items())
                    self.say(f"    {'met   ' if row.met else 'MISSED'} {row.mode}: {told}")
                    for missed in row.missed:
                        self.say(f"           {missed}")
                self._save([row.document() for row in self.rows])
        finally:
            self._drop()

    def _try(self, one: Fault) -> tuple[Row, ...]:
        """Measure it, again if it missed and may be: other work on the machine fails lanes, too."""
        earlier: list[str] = []
        for number in range(1, self._tries + 1):
            found = self._measure(one)
            if number == self._tries or all(row.met for row in found):
                break
            earlier = [f"{row.mode}: {missed}" for row in found for missed in row.missed]
            self.say(f"    measured again: {'; '.join(earlier)}")
        if not earlier:
            return found
        return tuple(replace(r, figures={**r.figures, "missed_at_first": earlier}) for r in found)

    def _measure(self, one: Fault) -> tuple[Row, ...]:
        rows: tuple[Row, ...] = ()
        fault: BaseException | None = None
        try:
            with limit_time(one.seconds + 60):
                stage = self._find_stage()
            with limit_time(one.seconds):
                rows = tuple(one.measure(stage))
        except Exception as found:
            fault = found
        try:
            if self._stage is not None:
                with limit_time(90):
                    self._stage.recover()
        except Exception as found:
            self.say(f"    the lab is made anew: {build_stage_error(found)}")
            self._drop()
            fault = fault or found
        if fault is None:
            return rows
        if self._verbose:
            traceback.print_exception(fault)
        text = build_stage_error(fault)
        if rows:  # measured, but the appliance did not come back by itself
            missed = f"not healthy again: {text}"
            return tuple(Row(r.name, r.mode, r.goal, r.figures, (*r.missed, missed)) for r in rows)
        return (Row(one.name, "-", "measured", {}, (text,)),)

    def _find_stage(self) -> Stage:
        if self._stage is None:
            self.say("bringing up the lab")
            stage = self._stage = Stage(self.say)
            stage.open()
        return self._stage

    def _drop(self) -> None:
        if self._stage is not None:
            stage, self._stage = self._stage, None
            stage.close()


def choose(names: Sequence[str], quick: bool) -> list[Fault]:
    """The rows asked for, by a part of their names; all, or the quick ones, without a name."""
    faults = find_faults()
    if unknown := [name for name in names if not any(name in one.name for one in faults)]:
        raise SystemExit(f"no row is called {', '.join(unknown)}; --list shows them")
    if names:
        return [one for one in faults if any(name in one.name for name in names)]
    return [one for one in faults if one.quick or not quick]


def merge(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old rows with those of faults that were measured again replaced, and others added.

    All rows of such a fault: one that could not be measured has one row instead of a row for each mode.
    """
    fresh: dict[str, list[dict[str, Any]]] = {}
    for row in new:
        fresh.setdefault(row["name"], []).append(row)
    again = set(fresh)
    merged = []
    for row in old:
        merged += fresh.pop(row["name"], []) if row["name"] in again else [row]
    return [*merged, *(row for rows in fresh.values() for row in rows)]


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the subset that runs in .ci/run")
    parser.add_argument("--row", action="append", default=[], help="rows with this in their name")
    parser.add_argument("--list", action="store_true", help="show the rows and end")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="where the JSON goes; with --row, merged into")
    parser.add_argument("--tries", type=int, default=1, help="how often a row that misses is tried")
    parser.add_argument("--verbose", action="store_true", help="tracebacks")
    told = parser.parse_args()
    faults = choose(told.row, told.quick)
    if told.list:
        for one in faults:
            print(f"{one.theme:10} {'quick' if one.quick else '     '} {one.name}: {one.text}")
        return 0
    configure_logs("warning")
    # SIGINT too: what a script starts in the background ignores it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    take_down_stale()
    out: Path | None = told.out
    if out is None and not told.row:
        out = ROOT / "build" / f"chaos{'-quick' if told.quick else ''}.json"
    before = json.loads(out.read_text()) if out and told.row and out.exists() else []

    def save(documents: list[dict[str, Any]]) -> None:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(merge(before, documents), indent=1) + "\n")

    campaign = Campaign(faults, save, told.tries, told.verbose)
    status = 0
    try:
        campaign.run()
    except KeyboardInterrupt:
        print("interrupted; the lab is taken down", file=sys.stderr)
        status = 130
    documents = [row.document() for row in campaign.rows]
    if status == 0:
        status = 0 if all(row.met for row in campaign.rows) else 1
    print(json.dumps(documents, indent=1) if told.json else render_table(documents))
    # Last, so that whoever keeps only the end of the output has it.
    for row in campaign.rows:
        for missed in row.missed:
            print(f"missed: {row.name} ({row.mode}): {missed}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
