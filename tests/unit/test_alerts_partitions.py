"""Partitions: any question about them is answered as by one table, however they are cut."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from appliance.alerts import sieve
from appliance.alerts.attribute import Attributed
from appliance.alerts.eve import RAW_LIMIT, parse_event
from appliance.alerts.history import find_rows
from appliance.alerts.model import Alert, Endpoint, EveAlert, Opener, Verdict
from appliance.alerts.partition import read_size
from appliance.alerts.partitions import AlertWrite, Limits
from appliance.alerts.query import (
    AlertFilter,
    alerts_sql,
    find_alert,
    find_alerts,
    find_alerts_after,
    find_latest_alert_id,
    find_top_signatures,
)
from appliance.alerts.rows import parse_alert_row
from appliance.alerts.store import Store, StoreError
from tests.bench.events import Lines
from tests.support.alerts import Stored, fill_table, store_alerts
from tests.support.eve import render_eve
from tests.support.worlds import LANES

VMS = [("vm-1", "web1", ("web", "edge")), ("vm-2", "app1", ("app",)), ("vm-3", "app1", ())]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "hairpin.db", Limits(alerts=4))
    yield store
    store.close()


def parse(**changes: object) -> EveAlert:
    event = parse_event(render_eve(**changes))
    assert isinstance(event, EveAlert)
    return event


PLAIN = (
    parse(),
    Attributed(
        Endpoint("10.9.0.1", 40000), Endpoint("10.9.0.2", 80), Opener.SOURCE, None, None, ()
    ),
    LANES[0],
)


async def add(store: Store, count: int) -> int:
    return await store.write_alerts(partial(store_alerts, stored=[PLAIN] * count))


async def read_ids(store: Store, wanted: AlertFilter | None = None) -> list[int]:
    page = await find_alerts(store, wanted or AlertFilter(), limit=1000, ascending=True)
    return [alert.id for alert in page.items]


# Any cut, any question

TEXTS = st.sampled_from(
    [
        "",
        "GET /etc/passwd",
        "ROOT\r\n",
        "é and É",
        "a\u0000b",
        "%_'",
        "jndi:LDAP",
        "x" * 1500,
        "passwd",
    ]
)


@st.composite
def stored_alerts(draw: st.DrawFn) -> Stored:
    def end(address: str) -> Endpoint:
        vm = draw(st.none() | st.sampled_from(VMS))
        return Endpoint(address, 80, *(vm or ()))

    source, destination = draw(st.sampled_from(["10.9.0.1", "fd00::9"])), "10.9.0.2"
    sid = draw(st.integers(1, 3))
    event = parse(
        timestamp=f"2023-11-14T22:13:{draw(st.integers(10, 59))}.000000+0000",
        src_ip=source,
        alert={
            "signature_id": sid,
            "signature": ["jndi", "Shellshock É", "passwd"][sid - 1],
            "action": draw(st.sampled_from(["blocked", "allowed"])),
            "metadata": {"cve": draw(st.sampled_from([[], ["CVE_2021_44228"]]))},
        },
        verdict=None,
        http=draw(st.none() | st.fixed_dictionaries({"url": TEXTS, "http_method": st.just("GET")})),
        payload_printable=draw(TEXTS),
        x=draw(st.sampled_from(["", "", "y" * RAW_LIMIT])),
    )
    policy = draw(st.sampled_from([None, "p", "q"]))
    return (
        event,
        Attributed(
            end(source),
            end(destination),
            draw(st.sampled_from([None, *Opener])),
            policy,
            policy and 7,
            draw(st.sampled_from([(), ("why",)])),
        ),
        draw(st.sampled_from(LANES)),
    )


FILTERS = st.builds(
    AlertFilter,
    vm=st.none() | st.sampled_from(["vm-1", "app1", "nobody"]),
    source_vm=st.none() | st.sampled_from(["web1", "app1"]),
    destination_vm=st.none() | st.sampled_from(["vm-2"]),
    address=st.none() | st.sampled_from(["fd00:0::9", "10.9.0.2"]),
    zone=st.none() | st.sampled_from(["app", "edge", "no"]),
    verdict=st.none() | st.sampled_from(list(Verdict)),
    signature=st.none() | st.integers(1, 4),
    cve=st.none() | st.sampled_from(["cve-2021-44228", "CVE-1"]),
    policy=st.none() | st.sampled_from(["p", "no"]),
    lane=st.none() | st.sampled_from([LANES[0].name]),
    since=st.none() | st.just(PLAIN[0].at + 10),
    until=st.none() | st.just(PLAIN[0].at + 30),
    text=st.none()
    | st.sampled_from(
        ["", "p", "PASSWD", "passwd", "ldap", "É", "é", "\u0000", "%", "shell", "xxxx", "zzz"]
    ),
)
FEW = st.one_of(
    FILTERS,
    st.builds(AlertFilter, text=st.sampled_from(["PASSWD", "ldap", "É", "p", "a", "xxx", "shell"])),
    st.builds(AlertFilter, vm=st.sampled_from(["vm-1", "app1"])),
    st.just(AlertFilter()),
)


@given(
    st.lists(stored_alerts(), max_size=24),
    st.integers(0, 8),
    st.lists(st.integers(1, 7), min_size=1, max_size=6),
    st.lists(st.tuples(FEW, st.booleans(), st.integers(1, 6)), min_size=1, max_size=5),
)
@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_partitions_answer_as_one_table_would(
    tmp_path_factory: pytest.TempPathFactory,
    stored: list[Stored],
    before: int,
    cuts: list[int],
    questions: list[tuple[AlertFilter, bool, int]],
) -> None:
    """The alerts stand in a table of before, and in partitions cut anywhere; blocks are of 4 alerts."""
    path = tmp_path_factory.mktemp("store") / "hairpin.db"
    naive = path.with_name("naive.db")
    fill_table(naive, stored)
    fill_table(path, stored[:before])
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch)
        store = Store(path, Limits(alerts=7))
        rest = stored[before:]
        for number in range(len(rest) + 1):
            count = cuts[number % len(cuts)]
            batch, rest = rest[:count], rest[count:]
            if batch:
                await store.write_alerts(partial(store_alerts, stored=batch))
            if number == 2:
                store.close()  # what a writer remembers is found again
                store = Store(path, Limits(alerts=7))
        try:
            for wanted, ascending, limit in questions:
                seen, cursor = [], None
                while True:
                    page = await find_alerts(
                        store, wanted, cursor, limit=limit, ascending=ascending
                    )
                    seen += page.items
                    assert page.next_cursor is None or len(page.items) == limit
                    cursor = page.next_cursor
                    if cursor is None:
                        break
                assert [tidy(one) for one in seen] == [
                    tidy(one) for one in ask_naive(naive, wanted, ascending)
                ]
        finally:
            store.close()


def use_small_blocks(patch: pytest.MonkeyPatch) -> None:
    for module in ("writing", "reading"):
        patch.setattr(f"appliance.alerts.{module}._BLOCK", 4)
        patch.setattr(f"appliance.alerts.{module}.CHUNK_ALERTS", 2)


def ask_naive(path: Path, wanted: AlertFilter, ascending: bool) -> list[Alert]:
    db = Database(path)
    sql, values = alerts_sql(wanted, None, 1000, ascending)
    found = [parse_alert_row(row) for row in db.query(sql, values)]
    db.close()
    return found


def tidy(alert: Alert) -> Alert:
    """Ports of an endpoint are the event's; what attribution was given of them in this test is not."""
    return replace(
        alert,
        source=replace(alert.source, port=None),
        destination=replace(alert.destination, port=None),
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [("ÉCOLE", 1), ("École", 1), ("école", 0), ("STRASSE", 0), ("straße", 1), ("İSTANBUL", 1)],
)
async def test_the_case_of_ascii_letters_alone_does_not_matter(
    store: Store, text: str, found: int
) -> None:
    """In partitions, and in the table of before."""
    one: Stored = (parse(payload_printable="GET /ÉCOLE Straße İstanbul"), *PLAIN[1:])
    naive = store.path.with_name("naive.db")
    fill_table(naive, [one])
    await store.write_alerts(partial(store_alerts, stored=[one]))
    wanted = AlertFilter(text=text)
    assert len(await read_ids(store, wanted)) == found
    assert len(ask_naive(naive, wanted, True)) == found


async def test_real_blocks_are_searched_in_full_and_in_the_rest(tmp_path: Path) -> None:
    """A few thousand alerts, so that blocks are full and sieves stand apart; then groups are turned."""
    events = [parse_event(line.rstrip(b"\n")) for line in islice(Lines(3), 3000)]
    stored: list[Stored] = [
        (one, PLAIN[1], LANES[0]) for one in events if isinstance(one, EveAlert)
    ]
    store = Store(tmp_path / "hairpin.db")
    naive = tmp_path / "naive.db"
    fill_table(naive, stored)
    await store.write_alerts(partial(store_alerts, stored=stored[:700]))
    await store.write_alerts(partial(store_alerts, stored=stored[700:]))
    hosts = [one.http.hostname for one, _, _ in stored if one.http][::400]
    for _ in range(2):
        for text in [
            *hosts,
            "passwd",
            ".php?id=",
            "attempt of kind 7",
            "curl/7.88",
            "nowhere at all",
        ]:
            wanted = AlertFilter(text=text)
            page = await find_alerts(store, wanted, limit=1000)
            expected = [one.id for one in ask_naive(naive, wanted, False)][:1000]
            assert [one.id for one in page.items] == expected, text
        await store.roll()
    turned = await store.read_alerts(
        lambda view: view.ask(
            view.partitions[0], lambda db: (db.table("grams").count, db.table("sieves").count)
        )
    )
    assert turned == (sieve.PAGES, 0)
    store.close()


@given(st.lists(st.binary(max_size=300), max_size=4), st.binary(min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_a_sieve_never_hides_what_is_there(texts: list[bytes], needle: bytes) -> None:
    slots = sieve.find_slots(needle)
    blocks = [*texts, b"before" + needle + b"after", b"\0".join(texts)]
    sieves = [sieve.build_sieve(text) for text in blocks]
    passed = [n for n, one in enumerate(sieves) if sieve.may_hold(one, slots)]
    assert {n for n, text in enumerate(blocks) if needle in text} <= set(passed)
    if not slots:
        return  # too short: every block is read
    pages = sieve.turn_group(sieves)
    chosen = {page: pages[page] for page in sieve.find_pages(slots)}
    assert sieve.sift_group(chosen, slots) == sum(map(sieve.find_bit, passed))


# Ids


async def test_ids_go_on_over_partitions_and_are_never_used_again(store: Store) -> None:
    for _ in range(6):
        await add(store, 3)
    assert await read_ids(store) == list(range(1, 19))
    for part in store.partitions[:-1]:
        await store.drop(part, lambda db: None)
    last = await find_latest_alert_id(store)
    path, left = store.path, await read_ids(store)
    store.close()
    again = Store(path, Limits(alerts=4))
    assert await read_ids(again) == left
    assert await find_latest_alert_id(again) == last == 18
    assert await add(again, 1) == 19
    again.close()


async def test_a_follower_goes_on_over_what_was_removed(store: Store) -> None:
    for _ in range(4):
        await add(store, 4)
    seen, after = await find_alerts_after(store, 0, limit=2)
    assert ([one.id for one in seen], after) == ([1, 2], 2)
    for part in store.partitions[:2]:
        await store.drop(part, lambda db: None)
    seen, after = await find_alerts_after(store, after, limit=3)
    assert ([one.id for one in seen], after) == ([9, 10, 11], 11)
    assert await find_alert(store, 3) is None
    assert await find_alert(store, 9) is not None


async def test_who_follows_opens_no_partition_that_is_behind(store: Store) -> None:
    for _ in range(3):
        await add(store, 4)
    store.partitions[0].path.write_bytes(b"no database")  # opening it would fail
    seen, _ = await find_alerts_after(store, 4, limit=2)
    assert [one.id for one in seen] == [5, 6]
    with pytest.raises(StoreError):
        await find_alerts_after(store, 3, limit=2)


async def test_ids_begin_behind_the_table_of_before_also_when_it_was_emptied(
    tmp_path: Path,
) -> None:
    path = tmp_path / "hairpin.db"
    fill_table(path, [PLAIN] * 5)
    db = Database(path)
    db.execute("DELETE FROM alerts")
    db.conn.commit()
    db.close()
    store = Store(path)
    assert await find_latest_alert_id(store) == 5
    assert await add(store, 1) == 6
    store.close()


async def test_the_bookmark_of_before_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "hairpin.db"
    fill_table(path, [PLAIN])
    db = Database(path)
    for lane in ("prevent", "(flows)"):
        db.execute(
            "INSERT INTO bookmarks VALUES (?, 3, '1', '2', 77, 5, 'abc', NULL)",
            (lane,),
        )
    db.conn.commit()
    db.close()
    store = Store(path)

    def read(write: AlertWrite) -> list[dict[str, object]]:
        return find_rows(write.db, "SELECT lane, generation, offset FROM bookmarks", ())

    expected = [{"lane": "prevent", "generation": 3, "offset": 77}]
    assert await store.write_alerts(read) == expected
    await add(store, 1)
    await store.roll()
    assert await store.write_alerts(read) == expected
    store.close()


async def test_a_new_partition_begins_after_its_time_but_not_empty(tmp_path: Path) -> None:
    now = [1000.0]
    store = Store(tmp_path / "hairpin.db", Limits(seconds=60.0), clock=lambda: now[0])
    now[0] = 5000.0
    await add(store, 1)
    await add(store, 1)
    assert [one.base for one in store.partitions] == [0, 1]
    await store.roll()
    await store.roll()
    assert [one.base for one in store.partitions] == [0, 1, 2]
    store.close()


async def test_a_partition_ends_before_it_takes_too_much(tmp_path: Path) -> None:
    limit = 2**20
    store = Store(tmp_path / "hairpin.db", Limits(bytes=limit))
    noise = random.Random(5)
    for _ in range(40):
        text = noise.randbytes(15_000).hex()
        await store.write_alerts(partial(store_alerts, stored=[(parse(x=text), *PLAIN[1:])] * 2))
    await add(store, 1)
    sizes = [read_size(one.path) for one in store.partitions[:-1]]
    assert sizes
    assert all(limit <= size < 1.5 * limit for size in sizes), sizes
    assert await read_ids(store) == list(range(1, 82))
    store.close()


async def test_a_long_question_does_not_hold_the_next_partition_up(store: Store) -> None:
    await add(store, 3)
    asked, answered = threading.Event(), threading.Event()

    def ask(db: Database) -> None:
        db.execute("SELECT count(*) FROM alerts").fetchone()
        asked.set()
        answered.wait(15)

    question = asyncio.create_task(
        store.read_alerts(lambda view: view.ask(view.partitions[-1], ask))
    )
    await asyncio.to_thread(asked.wait)
    begun = time.monotonic()
    await store.roll()
    took = time.monotonic() - begun
    answered.set()
    await question
    assert took < 5
    assert await add(store, 1) == 4


async def test_top_signatures_are_counted_over_partitions_and_the_table_of_before(
    tmp_path: Path,
) -> None:
    path = tmp_path / "hairpin.db"
    other = parse(
        alert={"signature_id": 9, "signature": "nine", "action": "allowed", "rev": 3}, verdict=None
    )
    fill_table(path, [PLAIN, PLAIN])
    store = Store(path, Limits(alerts=2))
    for one in (PLAIN, (other, PLAIN[1], LANES[0]), PLAIN, (other, PLAIN[1], LANES[1])):
        await store.write_alerts(partial(store_alerts, stored=[one]))
    at = PLAIN[0].at
    counted = await find_top_signatures(store, at, at + 60)
    assert [(one.sid, one.alerts, one.blocked, one.rev) for one in counted] == [
        (1, 4, 4, 2),
        (9, 2, 0, 3),
    ]
    assert len(await find_top_signatures(store, at, at + 60, limit=1)) == 1
    assert await find_top_signatures(store, at + 3600, at + 7200) == ()
    store.close()


# Hostile and unlucky


async def test_a_number_beyond_all_floats_costs_its_raw_event_only(store: Store) -> None:
    """The short way skips what it does not need, and so takes a line that the reference refuses."""
    from appliance.alerts.attributor import shorten
    from appliance.alerts.quick import Sighting, parse_line
    from appliance.alerts.writing import Origin

    (seen,) = parse_line(render_eve(x=0).replace(b'"x":0', b'"x":1e999'))
    assert isinstance(seen, Sighting)
    await store.write_alerts(
        lambda write: write.writer.write([(seen, shorten(PLAIN[1]))], Origin(LANES[0], 1, 0, 5.0))
    )
    alert = await find_alert(store, 1)
    assert alert is not None
    assert (alert.signature.sid, alert.verdict) == (1, Verdict.BLOCKED)
    assert json.loads(alert.raw) == {"event_type": "alert"}


async def test_a_transaction_that_fails_leaves_nothing_in_memory_either(store: Store) -> None:
    await add(store, 1)

    def fail(write: AlertWrite) -> None:
        store_alerts(write, [(parse(alert={"signature_id": 77}), PLAIN[1], LANES[0])] * 2)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        await store.write_alerts(fail)
    await add(store, 1)
    assert await read_ids(store) == [1, 2]
    assert await read_ids(store, AlertFilter(signature=77)) == []


def note(write: AlertWrite, kinds: Sequence[str]) -> None:
    for kind in kinds:
        write.note_event(1.0, kind, "info", "x")


async def test_what_is_noted_is_recorded_once_also_when_the_main_database_refuses(
    store: Store,
) -> None:
    refuse = (
        "CREATE TRIGGER refuse BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'refused'); END"
    )
    await store.write(lambda db: db.execute(refuse))
    await store.write_alerts(partial(note, kinds=["a.one"]))
    await add(store, 4)
    await add(store, 1)  # its partition does not end while it has something to tell
    assert len(store.partitions) == 1
    await store.write(lambda db: db.execute("DROP TRIGGER refuse"))
    await store.write_alerts(partial(note, kinds=["a.two"]))
    await add(store, 1)
    path = store.path
    assert len(store.partitions) == 2
    store.close()
    again = Store(path)
    kinds = await again.read(
        lambda db: [row["kind"] for row in db.query("SELECT kind FROM events")]
    )
    assert kinds == ["a.one", "a.two"]
    again.close()


async def test_a_reader_of_a_removed_partition_goes_on_reading_it(store: Store) -> None:
    await add(store, 4)
    await add(store, 1)
    first = store.partitions[0]
    with store._partitions.lease(first) as database:
        assert database is not None
        await store.drop(first, lambda db: None)
        assert not first.path.exists()
        assert database.table("alerts").count == 4
    with store._partitions.lease(first) as database:
        assert database is None
