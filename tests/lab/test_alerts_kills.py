"""Writer and reader are killed again and again (SIGKILL): no alert is lost, none is stored twice."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlite_utils import Database

from tests.support.alerts import check_stores, read_stored

ROUNDS = 10


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "tests.support.alert_processes", *map(str, arguments)]
    return subprocess.Popen(argv, cwd=Path(__file__).parents[2])


def kill(process: subprocess.Popen[bytes]) -> None:
    assert process.poll() is None, "it ended by itself"
    process.send_signal(signal.SIGKILL)
    process.wait()


def count_stored(database: Path) -> Counter[tuple[int | None, str | None]]:
    """How often each event (its number, and the process that wrote it) is stored."""
    return Counter((event.flow_id, event.community_id) for event in read_stored(database))


def read_newest(database: Path) -> int:
    return max((event.flow_id or 0 for event in read_stored(database)), default=0)


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.lab
@pytest.mark.slow
def test_kills_of_both_sides_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    directory, database = tmp_path / "prevent", tmp_path / "hairpin.db"
    directory.mkdir()
    numbers = directory / "numbers"
    reader, writer = start("ingest", directory, database), start("write", directory)
    rotations = 0
    try:
        wait_for(numbers.exists, 60, "nothing was ever written")
        for _ in range(ROUNDS):
            time.sleep(random.uniform(0.9, 1.6))
            for side in random.sample(("reader", "writer"), 2):
                if side == "reader":
                    kill(reader)
                    # What piles up meanwhile holds several rotations.
                    time.sleep(random.uniform(0.0, 0.3))
                    rotations += len(list(directory.glob("eve.json.*")))
                    reader = start("ingest", directory, database)
                else:
                    kill(writer)
                    writer = start("write", directory)
        time.sleep(1)
        kill(writer)
        last = int(numbers.read_bytes())
        wait_for(lambda: read_newest(database) >= last, 60, f"{last} never arrived")
        # Only the youngest may stay: nothing tells that its writer has left it.
        wait_for(lambda: len(list(directory.glob("eve.json*"))) <= 1, 15, "drained files stayed")
        kill(reader)
    finally:
        for process in (reader, writer):
            if process.poll() is None:
                process.kill()
                process.wait()

    stored = count_stored(database)
    numbers_stored = {number for number, _ in stored}
    lost = [number for number in range(1, last + 1) if number not in numbers_stored]
    doubled = {event: count for event, count in stored.items() if count > 1}
    db = Database(database)
    events = {
        (row["kind"], row["message"][:40]) for row in db.query("SELECT kind, message FROM events")
    }
    db.close()
    integrity = check_stores(database)
    print(
        f"\n{last} written, {rotations} rotated files met, lost {lost}, doubled {doubled}, {events}"
    )
    assert lost == []
    assert doubled == {}
    assert rotations > 0
    assert "eve.malformed" in {kind for kind, _ in events}, "no kill tore a line"
    assert "eve.replaced" not in {kind for kind, _ in events}
    assert integrity == "ok"
