"""The store's rows: EVE lines into it, and ten million alerts in it.

How it is filled: the lines of `events.py` (half of them HTTP with the packet, 1.5 kB each). Into the store
they go by `Ingest`, as in the product: from a file, parsed, attributed (200 VMs, 100 policies, all pairs
met before), committed with `synchronous=FULL`. Ten million are one partition of a million made in that
way, of 200,000 lines five times over with other times and host names, and nine copies of its file with
ids and times moved on by a day each.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from appliance.alerts.ingest import Ingest
from appliance.alerts.partition import Partition, build_path, read_size
from appliance.alerts.partitions import Limits
from appliance.alerts.query import (
    AlertFilter,
    find_alerts,
    find_latest_alert_id,
    find_top_signatures,
)
from appliance.alerts.retention import Drop, record_drop
from appliance.alerts.store import Store, find_directory
from appliance.management.knowledge import Knowledge, Snapshot
from steering.decide import decide
from steering.model import (
    Family,
    Holding,
    Inspect,
    Lane,
    Leg,
    Machine,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Profile,
    Protocol,
    Service,
    Zone,
)
from tests.bench.events import SIGNATURES, VMS, Lines, find_address, find_vm
from tests.bench.rows import Row, check
from tests.bench.traffic import BenchError, find_quantile

ROOT = Path(__file__).resolve().parents[2]
LANE = Lane(1, Profile.PREVENT, 3901, (0,), Leg("a", "a", 9001), Leg("b", "b", 9002))
ZONES = 10
DAY = 86_400
BEGAN = 1_700_006_400.0
FREE_BYTES = 12 * 2**30
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Size:
    """``lines`` are made, of them ``warm`` before the measuring; ``passes`` of them fill a partition."""

    lines: int
    warm: int
    rounds: int
    passes: int
    partitions: int
    questions: int


WHOLE = Size(lines=200_000, warm=40_000, rounds=5, passes=5, partitions=10, questions=200)
QUICK = Size(lines=4_000, warm=1_000, rounds=1, passes=2, partitions=3, questions=8)


def choose_size(changes: int) -> Size:
    """By the effort of the other rows (`measures.Effort.changes`)."""
    return WHOLE if changes >= 10 else QUICK


@contextmanager
def work_in(name: str) -> Iterator[Path]:
    """A directory on the disk of the repository, removed at the end."""
    directory = ROOT / "build" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    if shutil.disk_usage(directory).free < FREE_BYTES:
        raise BenchError(f"less than {FREE_BYTES >> 30} GiB are free at {directory}")
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def build_knowledge() -> Knowledge:
    """200 VMs in ten zones, a policy for each pair of zones."""
    zones = tuple(Zone(f"zone-{n}", {"tier": str(n)}) for n in range(ZONES))
    services = (
        Service(Protocol.TCP, (PortRange(80, 443),)),
        Service(Protocol.UDP, (PortRange(53, 53),)),
    )
    policies = tuple(
        Policy(
            f"policy-{a}-{b}",
            100 + a,
            (Peer(zone=f"zone-{a}"),),
            (Peer(zone=f"zone-{b}"),),
            services,
            tuple(Family),
            Inspect(Profile.PREVENT, OnFailure.CLOSED),
        )
        for a in range(ZONES)
        for b in range(ZONES)
    )
    machines = tuple(
        Machine(find_vm(n), f"web-{n}", {"tier": str(n % ZONES)}, (f"zone-{n % ZONES}",), ())
        for n in range(VMS)
    )
    holdings = {
        find_address(n): (Holding(find_address(n), find_vm(n), 1.0, None),) for n in range(VMS)
    }
    knowledge = Knowledge(holdings)
    knowledge.add(Snapshot(1.0, machines, PolicySet((), zones, policies), 7))
    return knowledge


@contextmanager
def ingesting(store: Store, live: Path) -> Iterator[Ingest]:
    find_context = build_knowledge().find_context
    ingest = Ingest(store, {LANE: live}, find_context, decide, poll_seconds=0.005)
    task = asyncio.ensure_future(ingest.run())
    try:
        yield ingest
    finally:
        task.cancel()


def measure_ingest(say: Say, changes: int) -> list[Row]:
    size = choose_size(changes)
    with work_in("bench-ingest") as directory:
        lines = list(islice(Lines(), size.lines))
        (directory / "warm").write_bytes(b"".join(lines[: size.warm]))
        (directory / "lines").write_bytes(b"".join(lines[size.warm :]))
        os.sync()
        rounds = []
        for number in range(size.rounds):
            rounds.append(asyncio.run(_ingest(directory, size, f"round-{number}")))
            say(
                f"    round {number + 1}: "
                + ", ".join(f"{k} {v:.0f}" for k, v in rounds[-1].items())
            )
    value = statistics.median(one["events/s and core"] for one in rounds)
    return [
        Row(
            name="EVE events into the store",
            value=value,
            unit="1/s and core",
            goal="at least 40,000, durable and queryable",
            peers={
                "by wall clock": statistics.median(one["by wall clock"] for one in rounds),
                "pairs not met before": statistics.median(one["cold"] for one in rounds),
            },
            spread={
                "hairpin": (
                    min(one["events/s and core"] for one in rounds),
                    max(one["events/s and core"] for one in rounds),
                )
            },
            rounds=rounds,
            missed=check((value >= 40_000, f"{value:,.0f} a second and core")),
        )
    ]


async def _ingest(directory: Path, size: Size, name: str) -> dict[str, float]:
    """The rate by processor time or by the clock, whichever is the lower: more than one core is not used."""
    lane = directory / name
    lane.mkdir()
    os.link(directory / "warm", lane / "eve.json.1")
    store = Store(lane / "hairpin.db")
    count = size.lines - size.warm
    try:
        with ingesting(store, lane / "eve.json") as ingest:
            cpu = time.process_time()
            await ingest.wait_newer(size.warm - 1)
            cold = size.warm / (time.process_time() - cpu)
            await asyncio.sleep(0.1)
            os.link(directory / "lines", lane / "eve.json")
            cpu, clock = time.process_time(), time.perf_counter()
            await ingest.wait_newer(size.lines - 1)
            cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
            (status,) = ingest.status()
        newest = (await find_alerts(store, AlertFilter(), limit=1)).items[0]
        if (newest.id, status.malformed, newest.policy is None) != (size.lines, 0, False):
            raise BenchError(f"{newest.id} alerts were stored of {size.lines}: {status}")
    finally:
        store.close()
        shutil.rmtree(lane)
    return {
        "events/s and core": count / max(cpu, clock),
        "by processor time": count / cpu,
        "by wall clock": count / clock,
        "cold": cold,
    }


def measure_alerts(say: Say, changes: int) -> list[Row]:
    size = choose_size(changes)
    with work_in("bench-alerts") as directory:
        began = time.monotonic()
        _fill(directory, size)
        total = size.lines * size.passes * size.partitions
        store = Store(directory / "hairpin.db", Limits(alerts=10**9, seconds=1e9))
        try:
            os.sync()  # partitions that are asked or removed were written long ago
            used = sum(read_size(one.path) for one in store.partitions)
            say(
                f"    {total:,} alerts, {used / 2**30:.2f} GiB, {used / total:.0f} B each,"
                f" made in {time.monotonic() - began:.0f} s"
            )
            return asyncio.run(_ask(say, store, size, total))
        finally:
            store.close()


def _fill(directory: Path, size: Size) -> None:
    count = size.lines * size.passes
    lines = list(islice(Lines(step=DAY / count), size.lines))
    live = directory / "eve.json"
    head = len(b'{"timestamp":"2023-11-14T22:13:20.030000+0000"')
    stamps = _make_stamps(count)
    with live.open("wb") as file:
        for number in range(size.passes):
            host = b"-%d.example" % number
            file.writelines(
                b'{"timestamp":"%s"' % next(stamps) + line[head:].replace(b".example", host)
                for line in lines
            )
    asyncio.run(_fill_one(directory, live, count))
    live.unlink()
    path = build_path(find_directory(directory / "hairpin.db"), 0)
    for number in range(1, size.partitions):
        _copy(path, number, count, ended=number < size.partitions - 1)


def _make_stamps(count: int) -> Iterator[bytes]:
    for number in range(count):
        at = BEGAN + number * DAY / count
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
        yield b"%s.%06d+0000" % (moment.encode(), int(at % 1 * 1e6))


async def _fill_one(directory: Path, live: Path, count: int) -> None:
    store = Store(directory / "hairpin.db", Limits(alerts=10**9, seconds=1e9))
    try:
        with ingesting(store, live) as ingest:
            await ingest.wait_newer(count - 1)
        await store.roll()
        newest = store.partitions[-1].path
    finally:
        store.close()
    newest.unlink()


def _copy(path: Path, number: int, count: int, *, ended: bool) -> None:
    target = build_path(path.parent, number * count)
    shutil.copyfile(path, target)
    target.chmod(0o600)
    connection = sqlite3.connect(target, isolation_level=None)
    for statement in ("PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", "BEGIN"):
        connection.execute(statement)
    moved = number * DAY
    connection.execute("UPDATE alerts SET at = at + ?", (moved,))
    connection.execute("UPDATE batches SET oldest = oldest + ?1, newest = newest + ?1", (moved,))
    connection.execute(
        "CREATE TEMP TABLE moved AS SELECT hour + ?, signature, alerts, blocked FROM hours",
        (moved // 3600,),
    )
    connection.execute("DELETE FROM hours")
    connection.execute("INSERT INTO hours SELECT * FROM moved")
    connection.execute(
        "UPDATE span SET base = ?, oldest = oldest + ?, newest = newest + ?",
        (number * count, moved, moved),
    )
    if not ended:
        connection.execute(
            "UPDATE span SET ended = NULL, alerts = NULL, oldest = NULL, newest = NULL"
        )
    connection.execute("COMMIT")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()


async def _ask(say: Say, store: Store, size: Size, total: int) -> list[Row]:
    if await find_latest_alert_id(store) != total:
        raise BenchError(f"{await find_latest_alert_id(store)} alerts are stored of {total}")
    rnd = random.Random(5)
    sample = (await find_alerts(store, AlertFilter(), limit=1000)).items
    hosts = [one.http.hostname for one in sample if one.http]
    tokens = [one.http.url.partition("=")[2] for one in sample if one.http]

    async def by_vm(number: int) -> int:
        vm = f"web-{rnd.randrange(VMS)}"
        return len((await find_alerts(store, AlertFilter(vm=vm), limit=100)).items)

    async def top(number: int) -> int:
        since = BEGAN + rnd.randrange(max((size.partitions - 1) * 24, 1)) * 3600
        return len(await find_top_signatures(store, since, since + DAY, limit=20))

    kinds: dict[str, Callable[[], str]] = {
        "a host": lambda: rnd.choice(hosts),
        "a token of a URL": lambda: rnd.choice(tokens),
        "a signature's name": lambda: f"of kind {rnd.randrange(SIGNATURES)} (",
        "a word in one alert of five": lambda: "passwd",
        "nowhere": lambda: f"absent{rnd.getrandbits(60):x}",
    }
    by_kind: dict[str, list[float]] = {kind: [] for kind in kinds}

    async def substring(number: int) -> int:
        kind = list(kinds)[number % len(kinds)]
        text = kinds[kind]()
        began = time.perf_counter()
        found = (await find_alerts(store, AlertFilter(text=text), limit=100)).items
        by_kind[kind].append((time.perf_counter() - began) * 1000)
        if bool(found) is (kind == "nowhere"):
            raise BenchError(f"{len(found)} alerts have {text!r} in them")
        return len(found)

    rows = []
    for name, question in (
        ("latest by VM", by_vm),
        ("top signatures over a day", top),
        ("substring", substring),
    ):
        rows.append(await _time(f"10 million alerts: {name}, p95", question, size.questions, total))
        say(f"    {rows[-1].name}: {rows[-1].value:.1f} ms")
    rows[-1] = _add_kinds(rows[-1], by_kind)
    rows.append(await _drop(store, size))
    return rows


async def _time(
    name: str, question: Callable[[int], Awaitable[int]], count: int, total: int
) -> Row:
    for number in range(5):
        await question(number)
    times = []
    for number in range(count):
        began = time.perf_counter()
        await question(number)
        times.append((time.perf_counter() - began) * 1000)
    value = find_quantile(times, 0.95)
    return Row(
        name=name,
        value=value,
        unit="ms",
        goal="at most 50 ms",
        peers={"p50": statistics.median(times), "most": max(times)},
        rounds=[{"alerts": total, "milliseconds": [round(one, 3) for one in times]}],
        missed=check((value <= 50, f"{value:.0f} ms")),
    )


def _add_kinds(row: Row, by_kind: dict[str, list[float]]) -> Row:
    peers = {
        **row.peers,
        **{f"{kind}, p95": find_quantile(times, 0.95) for kind, times in by_kind.items() if times},
    }
    return Row(row.name, row.value, row.unit, row.goal, peers, rounds=row.rounds, missed=row.missed)


async def _drop(store: Store, size: Size) -> Row:
    """Each ended partition in turn, its events included; until its file is gone."""
    parts: Sequence[Partition] = store.partitions[:-1]
    times = []
    for part in parts:
        drop = Drop(part, read_size(part.path), "a benchmark", {})
        began = time.perf_counter()
        await store.drop(part, lambda db, drop=drop: record_drop(db, drop, 1.0))  # type: ignore[misc]
        times.append((time.perf_counter() - began) * 1000)
    worst = max(times)
    return Row(
        name="retention of 1 million rows",
        value=worst,
        unit="ms",
        goal="at most 100 ms",
        peers={"p50": statistics.median(times)},
        rounds=[{"rows": size.lines * size.passes, "milliseconds": one} for one in times],
        missed=check((worst <= 100, f"{worst:.0f} ms")),
    )
