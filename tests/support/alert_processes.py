"""Processes that tests kill: one writes numbered EVE lines and rotates, one ingests them.

`python -m tests.support.alert_processes write DIR` or `... ingest DIR DATABASE`.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from pathlib import Path

from appliance.alerts.attribute import Context
from appliance.alerts.ingest import Ingest
from appliance.alerts.partitions import Limits
from appliance.alerts.store import Store
from steering.decide import decide
from steering.model import Lane, PolicySet
from tests.support.eve import render_eve
from tests.support.worlds import LANES


def write(directory: Path) -> None:
    """Write events numbered on from `numbers`, where each number is noted after its line.

    A number whose note was prevented by a kill is written again, by another process id.

    As the engine does: a torn last line of a killed writer stays, and the next event goes right
    behind it. A line is written in two parts, so that a kill can tear it. Rotation renames, and
    the next line goes to a new file.
    """
    live = directory / "eve.json"
    numbers = os.open(directory / "numbers", os.O_RDWR | os.O_CREAT)
    number = int(os.pread(numbers, 20, 0) or b"0") + 1
    file = os.open(live, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    while True:
        line = render_eve(flow_id=number, community_id=str(os.getpid())) + b"\n"
        cut = random.randrange(1, len(line))
        os.write(file, line[:cut])
        if random.random() < 0.01:
            time.sleep(0.01)  # most kills hit here, between the parts of a line
        os.write(file, line[cut:])
        os.pwrite(numbers, b"%020d" % number, 0)
        number += 1
        if random.random() < 0.005 and live.exists():
            live.rename(directory / f"eve.json.{time.time_ns()}")
            if random.random() < 0.5:
                continue  # the engine has not reopened yet
        if not live.exists() and random.random() < 0.5:
            os.close(file)
            file = os.open(live, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)


def find_context(lane: Lane, at: float) -> Context:
    return Context((), PolicySet(), None, lane, {})


async def ingest(directory: Path, database: Path) -> None:
    # Small partitions, so that kills meet their ends and beginnings, too.
    store = Store(database, Limits(alerts=2000))
    await Ingest(
        store,
        {LANES[0]: directory / "eve.json"},
        find_context,
        decide,
        poll_seconds=0.01,
        grace_seconds=0.5,
    ).run()


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        asyncio.run(ingest(Path(sys.argv[2]), Path(sys.argv[3])))
