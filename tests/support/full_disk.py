"""A program: the disk of the store is full at a roll, and then it is not. See `tests/lab/test_alerts_full_disk.py`.

python -m tests.support.full_disk SMALL-DISK OTHER-DISK
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from appliance.alerts.attribute import Context
from appliance.alerts.ingest import Ingest
from appliance.alerts.partitions import Limits
from appliance.alerts.query import AlertFilter, find_alerts
from appliance.alerts.store import Store
from steering.decide import decide
from steering.model import PolicySet
from tests.support.eve import render_eve
from tests.support.waiting import wait_until
from tests.support.worlds import LANES


def append(live: Path, first: int, last: int) -> None:
    with live.open("ab") as file:
        for number in range(first, last + 1):
            file.write(render_eve(src_port=number) + b"\n")


async def run(small: Path, other: Path) -> dict[str, object]:
    store = Store(small / "hairpin.db", Limits(alerts=50))
    live = other / "eve.json"
    ingest = Ingest(
        store,
        {LANES[0]: live},
        lambda lane, at: Context((), PolicySet(), None, lane, {}),
        decide,
        poll_seconds=0.01,
    )
    task = asyncio.create_task(ingest.run())
    append(live, 1, 50)
    await wait_until(lambda: ingest.status()[0].alerts == 50)
    ballast = small / "ballast"
    ballast.write_bytes(b"x" * max(free_bytes(small) - 60 * 1024, 0))
    append(live, 51, 59)
    await wait_until(lambda: bool(ingest.status()[0].fault))
    await asyncio.sleep(1)  # some tries
    told = {"ended while full": task.done(), "fault": ingest.status()[0].fault}
    ballast.unlink()
    await wait_until(lambda: task.done() or ingest.status()[0].alerts == 59)
    page = await find_alerts(store, AlertFilter(), limit=1000, ascending=True)
    told["ended"] = task.done()
    task.cancel()
    await asyncio.wait([task])
    told["ids"] = [alert.id for alert in page.items]
    told["ports"] = [alert.source.port for alert in page.items]
    told["files"] = sorted(path.name for path in small.glob("hairpin-alerts/*.db*"))
    store.close()
    return told


def free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(Path(sys.argv[1]), Path(sys.argv[2])))))
