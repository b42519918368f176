"""The benchmark: `python -m tests.bench [--quick] [--only GROUP]... [--list] [--json] [--out FILE]`.

Exit status 0 when every row was measured, whatever it says (1 with --strict when a goal is missed),
1 when one could not be measured or the token exploit was delivered, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType

from appliance.logs import configure_logs
from steering.errors import HairpinError
from tests.bench.measures import GROUPS, QUICK, WHOLE, Group
from tests.bench.report import find_machine, render_table
from tests.bench.rows import Row
from tests.bench.stage import FEED, open_stage
from tests.bench.traffic import BenchError

ROOT = Path(__file__).resolve().parents[2]
BEGAN = time.monotonic()


def say(line: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {line}", file=sys.stderr, flush=True)


def choose(names: Sequence[str], quick: bool) -> list[Group]:
    known = {group.name for group in GROUPS}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no group is called {', '.join(unknown)}; --list shows them")
    if names:
        return [group for group in GROUPS if group.name in names]
    # The feed takes a minute to load into three engines.
    return [group for group in GROUPS if not (quick and group.feed)]


def measure(groups: Sequence[Group], rows: list[Row], *, quick: bool) -> None:
    """Append what each group finds to ``rows``: what breaks off later takes nothing away from it."""
    effort = QUICK if quick else WHOLE
    feed = any(group.feed for group in groups)
    if feed and not FEED.is_file():
        raise BenchError(f"there's no feed at {FEED} (HAIRPIN_SHARED)")

    def keep(found: Iterable[Row]) -> None:
        for row in found:
            rows.append(row)
            say(f"    {'met   ' if row.met else 'MISSED'} {row.name}: {row.value:.3g} {row.unit}")

    staged = sorted((one for one in groups if one.measure), key=lambda one: one.feed)
    if staged:
        with open_stage(say, feed=feed) as stage:
            loaded = False
            for group in staged:
                if group.feed and not loaded:
                    stage.load_feed()
                    loaded = True
                say(f"{group.name}: {group.text}; {stage.rules} rules loaded")
                assert group.measure is not None
                keep(group.measure(stage, effort))
    for group in groups:
        if group.alone is not None:
            say(f"{group.name}: {group.text}")
            keep(group.alone(say, effort.changes))


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round; asserts no times")
    parser.add_argument("--only", action="append", default=[], help="these groups")
    parser.add_argument("--list", action="store_true", help="show the groups and end")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--strict", action="store_true", help="status 1 when a goal is missed")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    told = parser.parse_args()
    groups = choose(told.only, told.quick)
    if told.list:
        for group in groups:
            print(f"{group.name}: {group.text}")
        return 0
    configure_logs("warning")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    rows: list[Row] = []
    ended = 0
    try:
        measure(groups, rows, quick=told.quick)
    except KeyboardInterrupt:
        print("interrupted; the lab is taken down", file=sys.stderr)
        return 130
    except (BenchError, HairpinError) as fault:
        print(f"error: {fault}; the rows until then follow", file=sys.stderr)
        ended = 1
    document = {"machine": find_machine(time.time()), "rows": [row.document() for row in rows]}
    out: Path = told.out or ROOT / "build" / f"bench{'-quick' if told.quick else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document["rows"], indent=1) + "\n")
    print(json.dumps(document, indent=1) if told.json else render_table(rows))
    blind = [one for row in rows for one in row.missed if "token exploit" in one]
    for one in blind:
        print(f"missed: {one}", file=sys.stderr)
    return 1 if ended or blind or (told.strict and not all(row.met for row in rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
