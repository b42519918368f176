"""`hairpin serve` on a store that is damaged: nothing of it is used, and whoever asks is told. There is no switch."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Never

import pytest
from sqlite_utils import Database

from appliance.alerts.history import find_rows, record_event, record_holding
from appliance.alerts.rows import build_bookmark_row, insert_sql
from appliance.alerts.store import Store, StoreError
from appliance.alerts.tail import Bookmark, Fingerprint
from appliance.api.control import Control, Unavailable
from appliance.api.quarantine import QuarantineOrder
from appliance.app import _load_holdings, _serve
from appliance.assurance import failures, shortcuts
from appliance.assurance.failures import Concerned, FailureWatch
from appliance.assurance.shortcuts import ShortcutWatch
from appliance.client import Client, Place, ServiceRefused
from appliance.firstboot.status import read_health
from appliance.management.damaged import DamagedManagement
from appliance.management.flows import SPOOL, FlowIngest
from appliance.management.health import Facts, build_health
from appliance.management.knowledge import Snapshot
from appliance.rules.model import RulesState
from appliance.settings import Settings
from steering.change import SwitchStatus
from steering.errors import HairpinError
from steering.model import PolicySet
from tests.support.tls_switch import find_free_ports
from tests.support.waiting import wait_until


def break_policies(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE configuration SET sha256 = 'x', copy = 'x' WHERE name = 'revisions'")


def break_header(path: Path) -> None:
    with open(path, "r+b") as opened:
        opened.write(b"SQLitf")


def break_youngest(path: Path) -> None:
    (youngest,) = path.with_name("hairpin-alerts").glob("*.db")
    with open(youngest, "r+b") as opened:
        opened.write(b"SQLitf")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_policies, "the policies in force are not what was written"),
        (break_header, "file is not a database"),
        (break_youngest, "alerts-0000000000000000.db is damaged"),
    ],
)
async def test_a_damaged_store_is_told_by_health_and_by_every_answer(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    (port,) = find_free_ports(1)
    leg = {"interface": "leg", "device": "in"}
    settings = Settings.model_validate(
        {
            "name": "rack-12", "stateDir": tmp_path, "runDir": tmp_path, "api": {"port": port},
            "lanes": [{"profile": "prevent", "vlan": 101, "legA": leg, "legB": {"interface": "b", "device": "b"}}],
            # Whoever asked it would be told that nobody listens.
            "switch": {"ovsdb": f"unix:{tmp_path}/none", "openflow": f"unix:{tmp_path}/none"},
        }
    )  # fmt: skip
    Store(settings.database).close()
    damage(settings.database)
    before = settings.database.read_bytes()
    serving = asyncio.create_task(_serve(settings))
    try:
        client = await find_client(settings, serving)
        health = await asyncio.to_thread(client.read_health)
        assert (health.status, health.name) == ("failing", "rack-12")
        (problem,) = health.problems
        assert reason in problem.reason
        assert "goes on by what it was told last" in problem.reason
        assert problem.mend
        assert health.components.store.status == "failing"
        seen = await read_health(settings)  # the console's
        assert not isinstance(seen, str)
        assert seen.status == "failing"
        asked: list[Callable[[], Any]] = [
            client.read_policies,
            client.find_quarantines,
            lambda: client.put_policies("{}", "*", dry_run=False),
            lambda: client.add_quarantine(QuarantineOrder(vm="web-1")),
        ]
        for question in asked:
            with pytest.raises(ServiceRefused, match=re.escape(reason)) as caught:
                await asyncio.to_thread(question)
            assert caught.value.problem.status == 503
            assert caught.value.mend == problem.mend
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert settings.database.read_bytes() == before


async def find_client(settings: Settings, serving: asyncio.Task[int]) -> Client:
    await wait_until(lambda: settings.token_file.exists() or serving.done())
    client = Client(Place(f"http://127.0.0.1:{settings.api.port}", settings.token_file, "the test"))
    for _ in range(100):
        if serving.done():
            raise AssertionError(f"it ended: {serving}")
        with contextlib.suppress(Unavailable):
            await asyncio.to_thread(client.read_health)
            return client
        await asyncio.sleep(0.05)
    raise AssertionError("it does not answer")


async def test_a_store_of_another_process_still_ends_it(tmp_path: Path) -> None:
    leg = {"interface": "leg", "device": "in"}
    settings = Settings.model_validate(
        {
            "stateDir": tmp_path, "runDir": tmp_path,
            "lanes": [{"profile": "prevent", "vlan": 101, "legA": leg, "legB": {"interface": "b", "device": "b"}}],
        }
    )  # fmt: skip
    store = Store(settings.database)
    try:
        with pytest.raises(HairpinError, match="another running process"):
            await _serve(settings)
    finally:
        store.close()


async def test_every_method_that_the_api_asks_is_answered() -> None:
    damaged = DamagedManagement("rack-12", HairpinError("torn", "mend it"), 1.0)
    methods = {name for name in vars(Control) if not name.startswith("_")}
    assert {"read_health", "read_status", "put_policies", "find_alerts"} <= methods
    assert (await damaged.read_status()).status == "failing"
    for name in methods - {"read_health", "read_status"}:
        with pytest.raises(Unavailable, match="torn"):
            await getattr(damaged, name)()


def test_what_was_mended_is_told_until_the_next_start() -> None:
    facts = Facts(
        name="hairpin", version="0", now=9.0, started_at=1.0, revision=0, policies=PolicySet(),
        switch=SwitchStatus(True, "", 1.0, "secure", "3.1.0", "system", ()), lanes=(), forwarding={},
        inspection=None, rules=RulesState((), None), ingest=(), exporters=(),
    )  # fmt: skip
    assert build_health(facts).status == "ok"
    told = build_health(replace(facts, mended=("the quarantines: damaged on disk",)))
    assert told.status == told.components.store.status == "degraded"
    (problem,) = told.problems
    assert problem.reason == "the quarantines: damaged on disk"
    assert "check the disk" in problem.mend


BROKEN = "UPDATE {table} SET {column} = substr({column}, 2)"


@pytest.mark.parametrize("table", ["meters", "events", "bookmarks"])
async def test_what_is_no_configuration_may_be_damaged_and_the_rest_goes_on(
    tmp_path: Path, table: str
) -> None:
    """A flipped byte in an account ended the service, and the next start, and the next."""
    store = Store(tmp_path / "hairpin.db")
    bookmark = Bookmark(SPOOL, 1, 2049, 7, 0, Fingerprint(0, ""))

    def fill(db: Database) -> None:
        for name in (failures.METER, shortcuts.METER):
            db.execute("INSERT INTO meters (name, at, value) VALUES (?, 1.0, '{}')", (name,))
        record_event(db, 1.0, failures.DOWN, "error", "down", subject="lane prevent")
        row = {**build_bookmark_row(bookmark), "device": "x2049"}
        db.execute(insert_sql("bookmarks", row), row)
        column = {"meters": "value", "events": "detail"}.get(table)
        if column is not None:
            assert db.execute(BROKEN.format(table=table, column=column)).rowcount

    await store.write(fill)
    down = FailureWatch(store, read_nothing, lambda _: Concerned())
    await down._load()
    assert list(down.down) == ["prevent"]
    cuts = ShortcutWatch(store, read_nothing, read_nothing, PolicySet, lambda: ())
    await cuts.load()
    assert cuts.book == shortcuts.Book()
    if table == "bookmarks":
        flows = FlowIngest(store, tmp_path / "flows.json", lambda: Snapshot(1.0), dict)
        with pytest.raises(StoreError, match="invalid literal"):  # which it tells, and tries again
            await flows._load()
    store.close()


async def test_a_damaged_holding_costs_no_more_than_what_is_known_of_addresses(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "hairpin.db")
    await store.write(lambda db: record_holding(db, "10.0.0.5", "vm-1", 1.0))
    assert set(await _load_holdings(store, 2.0)) == {"10.0.0.5"}
    await store.write(lambda db: db.execute("UPDATE holdings SET vm_id = CAST(x'ff' AS TEXT)"))
    assert await _load_holdings(store, 2.0) == {}
    (event,) = await store.read(
        lambda db: find_rows(db, "SELECT * FROM events WHERE kind = 'store.damaged'", ())
    )
    assert "who held which address is not known any more" in event["message"]
    store.close()


async def read_nothing() -> Never:
    raise AssertionError("not asked for")
