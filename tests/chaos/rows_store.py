"""Alerts outlive what happens to who stores them, to their files, and to the disk under both."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from appliance.lab import LabState
from steering.run import run
from tests.chaos.meter import compare_numbers
from tests.chaos.registry import EVENTS_GOAL, Row, check, fault
from tests.chaos.rows_control import claim_events, tell_events
from tests.chaos.stage import Stage, expect
from tests.support.alerts import check_stores, read_stored
from tests.support.lab import wait_until

ROOT = Path(__file__).resolve().parents[2]
TMPFS_BYTES = 24 * 2**20


def _count_stored(database: Path) -> Counter[tuple[int | None, str | None]]:
    return Counter((event.flow_id, event.community_id) for event in read_stored(database))


def _start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "tests.support.alert_processes", *map(str, arguments)]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _wait_stored(database: Path, last: int) -> bool:
    def newest() -> int:
        return max((event.flow_id or 0 for event in read_stored(database)), default=0)

    return wait_until(lambda: newest() >= last, 120)


def _kill_store(stage: Stage, name: str, times: int) -> Iterable[Row]:
    directory = Path(tempfile.mkdtemp(dir=stage.directory))
    (directory / "lane").mkdir()
    database = directory / "hairpin.db"
    faults, broken = [], 0
    writer = _start("write", directory / "lane")
    reader = _start("ingest", directory / "lane", database)
    try:
        expect(wait_until(database.exists, 20), "the reader made no database")
        for number in range(times):
            # In bursts: what is written must be read in the end, on the same two processors.
            writer.send_signal(signal.SIGCONT)
            time.sleep(random.uniform(0.02, 0.12))
            writer.send_signal(signal.SIGSTOP)
            time.sleep(random.uniform(0.3, 1.1))
            broken += reader.poll() is not None
            _kill(reader)
            if (said := check_stores(database)) != "ok":
                faults.append(f"after kill {number + 1}: {said}")
            reader = _start("ingest", directory / "lane", database)
        _kill(writer)
        last = int((directory / "lane/numbers").read_bytes())
        arrived = _wait_stored(database, last)
        time.sleep(1)
    finally:
        for process in (writer, reader):
            process.send_signal(signal.SIGCONT)
            _kill(process)
    stored = _count_stored(database)
    doubled = [event for event, count in stored.items() if count > 1]
    tally = compare_numbers(range(1, last + 1), {number for number, _ in stored})
    figures = {
        "kills": times,
        "integrity_checks": times,
        "integrity_failed": len(faults),
        "events": last,
        "events_lost": len(tally.lost),
        "events_doubled": len(doubled),
    }
    missed = check(
        (arrived, "the last event was never stored"),
        (not faults, "; ".join(faults[:3])),
        (broken == 0, f"the reader ended by itself {broken} times"),
        (not tally.lost, f"{len(tally.lost)} events lost, the first {tally.lost[:5]}"),
        (not doubled, f"{len(doubled)} events doubled"),
        (last > times, "too few events to tell anything"),
    )
    yield Row(name, "-", EVENTS_GOAL, figures, missed)


@fault("store kill -9, 200 times", seconds=600)
def kill_store(stage: Stage) -> Iterable[Row]:
    """Who stores the alerts is killed 200 times while it stores; each time the database is checked."""
    return _kill_store(stage, "store kill -9, 200 times", 200)


@fault("store kill -9, 10 times", quick=True)
def kill_store_a_little(stage: Stage) -> Iterable[Row]:
    """The same, 10 times."""
    return _kill_store(stage, "store kill -9, 10 times", 10)


def count_drained(stage: Stage) -> int:
    """How many rotated EVE files the management service says to have read to their end."""
    return (stage.lab.log_dir / "serve.log").read_text().count("EVE file drained and deleted")


@fault("EVE rotation during a burst", seconds=120, quick=True)
def rotate_in_burst(stage: Stage) -> Iterable[Row]:
    """A thousand alerts a second for 6 s, with EVE files of 3 MiB."""
    before, rotated = stage.appliance.find_latest_alert(), count_drained(stage)
    with stage.traffic(modes=("closed",), rate=40, settle=0, counted=1000) as meter:
        time.sleep(6)
    began = time.monotonic()
    tally = stage.wait_counted(meter.traffic, before, 60)
    stored = time.monotonic() - began
    expect(
        wait_until(lambda: count_drained(stage) > rotated, 10), "no file was rotated in the burst"
    )
    lane = stage.lab.run_dir / "lanes/prevent"
    wait_until(lambda: len(list(lane.glob("eve.json.*"))) <= 1, 10)
    integrity = check_stores(stage.lab.state_dir / "hairpin.db")
    figures = {
        "rotated": count_drained(stage) - rotated,
        **tell_events(tally),
        "stored_after_s": round(stored, 1),
        "integrity": integrity,
    }
    missed = check(*claim_events(tally), (integrity == "ok", integrity))
    yield Row("EVE rotation during a burst", "closed", EVENTS_GOAL, figures, missed)


@contextlib.contextmanager
def _small_disks(stage: Stage) -> Iterator[Stage]:
    """A lab of its own whose lane directory and state directory are small file systems."""
    mounts: list[Path] = []

    def mount(state: LabState) -> None:
        lane = state.run_dir / "lanes/prevent"
        lane.mkdir(parents=True)
        for directory in (lane, state.state_dir):
            shown = directory.stat()
            kept = directory.with_name(f"{directory.name}.kept")
            shutil.copytree(directory, kept)
            option = f"size={TMPFS_BYTES},mode={shown.st_mode & 0o7777:o}"
            run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(directory)])
            mounts.append(directory)
            os.chown(directory, shown.st_uid, shown.st_gid)
            for path in kept.iterdir():
                copy = directory / path.name
                shutil.copy2(path, copy)
                os.chown(copy, shown.st_uid, shown.st_gid)
            shutil.rmtree(kept)

    own = Stage(stage.say, suffix="d", before_serve=mount)
    try:
        own.open()
        yield own
    finally:
        for directory in mounts:
            run(["umount", "-l", str(directory)], check=False)
        own.close()


@contextlib.contextmanager
def _full(directory: Path) -> Iterator[None]:
    """Not one byte is free in the file system of ``directory`` meanwhile."""
    filler = directory / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            for size in (2**20, 4096, 1):
                while True:
                    try:
                        file.write(b"x" * size)
                    except OSError as fault:
                        if fault.errno != errno.ENOSPC:
                            raise
                        break
        yield
    finally:
        filler.unlink()


def _measure_full(own: Stage, name: str, directory: Path) -> Iterable[Row]:
    before = own.appliance.find_latest_alert()
    with own.traffic(rate=100, counted=20) as meter:
        struck = time.monotonic()
        with _full(directory):
            time.sleep(5)
            health = own.read_health()
            shown = own.appliance.api("/health").document["problems"]
        freed = time.monotonic()
        time.sleep(5)
    expect(wait_until(lambda: own.read_health() == "ok", 30), "health is not ok again")
    healthy = time.monotonic() - freed
    tally = own.wait_counted(meter.traffic, before, 45)
    (counted,) = meter.traffic.find("closed", "counted")
    sent = counted.sent
    during = [n for n in tally.lost if struck - 0.5 <= sent[n] <= freed + 0.5]
    integrity = check_stores(own.lab.state_dir / "hairpin.db")
    for mode in ("closed", "open"):
        figures = meter.traffic.build_figures(mode) | {
            **tell_events(tally),
            "events_lost_while_full": len(during),
            "health_while_full": health,
            "told": [one["reason"] for one in shown][:3],
            "healthy_again_s": round(healthy, 1),
            "integrity": integrity,
        }
        missed = check(
            *claim_events(tally),
            (figures["uninspected"] == 0, f"{figures['uninspected']} hostile were delivered"),
            (figures["lost"] == 0, f"{figures['lost']} packets lost"),
            (integrity == "ok", integrity),
            (health != "ok" or not tally.lost, "health did not tell of it"),
            (len(during) == len(tally.lost), "events were lost while there was space"),
        )
        yield Row(name, mode, EVENTS_GOAL, figures, missed)


@fault("disk full under EVE and under the store", seconds=240)
def fill_disks(stage: Stage) -> Iterable[Row]:
    """The engine's directory, then the store's, has no byte free for 5 s."""
    rows: list[Row] = []
    with _small_disks(stage) as own:
        lane = own.lab.run_dir / "lanes/prevent"
        rows += _measure_full(own, "disk full under the store", own.lab.state_dir)
        rows += _measure_full(own, "disk full under EVE", lane)
    return rows
