"""Configuration in the database: one flipped byte never changes it unseen, wherever it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import sqlite3
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from appliance.alerts import schema
from appliance.alerts.configuration import CHANGED, Part, Witness, compute_digest, judge
from appliance.alerts.history import (
    find_rows,
    record_applied,
    record_cursor,
    record_event,
    record_holding,
    record_revision,
)
from appliance.alerts.losses import load_cursors
from appliance.alerts.store import Store, StoreError, explain_fault
from appliance.management.policies import load_in_force
from appliance.management.quarantine import (
    Quarantine,
    load_quarantines,
    remove_quarantine,
    store_quarantine,
)
from steering.model import PolicySet
from steering.parse import render_documents
from tests.support.damaged_rows import damage_rows
from tests.support.shortcut_world import build_policies
from tests.support.waiting import wait_until

FLIPS = 100
"""Anywhere, and as many in the pages that count; in each of two states. 8,000 were tried, and none passed."""
SHUT_OFF = (
    Quarantine("vm-1", "web-1", 100.25, None, "scans"),
    Quarantine("vm-2", "web-2", 101.5, 9e9, "ünruly"),
)


@dataclass(frozen=True)
class Configuration:
    revision: int
    policies: PolicySet
    quarantines: dict[str, Quarantine]
    cursors: dict[str, int]


async def read_configuration(store: Store) -> Configuration:
    in_force = await load_in_force(store)
    return Configuration(
        in_force.number,
        in_force.policies,
        await store.read(load_quarantines),
        await store.read(load_cursors),
    )


def apply_policies(db: Database, policies: PolicySet, at: float) -> int:
    number = record_revision(db, at, "api", render_documents(policies))
    record_applied(db, number, at + 0.01, {"seconds": 0.01, "changes": 7})
    return number


async def add_events(store: Store, count: int) -> None:
    """Each in a transaction of its own."""
    for number in range(count):
        add = partial(record_event, at=90.0, kind="a.b", severity="info", message=f"{number}")
        await store.write(add)


async def fill(store: Store) -> Configuration:
    """Two revisions in force after another, one that never was, two in quarantine, two exporters; and data."""
    whole = build_policies()
    first = replace(whole, policies=whole.policies[:1])
    await store.write_lasting(lambda db: apply_policies(db, first, 50.0))
    await add_events(store, 200)
    await store.write_lasting(lambda db: apply_policies(db, whole, 60.0))
    await store.write(lambda db: record_revision(db, 70.0, "api", render_documents(first)))
    for one in SHUT_OFF:
        await store.write_lasting(partial(store_quarantine, one=one))
    for name, last in (("siem", 4711), ("archive", 4000)):
        await store.write(partial(record_cursor, name=name, last_id=last, at=80.0))
    await store.write(lambda db: record_holding(db, "10.0.0.5", "vm-1", 81.0))
    return await read_configuration(store)


def copy_state(directory: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns("*.lock", "*-shm"))
    return target / "hairpin.db"


async def look(path: Path) -> Configuration | str:
    """What a start on it would use, or why it would use nothing."""
    try:
        store = Store(path)
        try:
            return await read_configuration(store)
        finally:
            store.close()
    except StoreError as fault:
        if fault.damaged and fault.mend:
            return fault.reason
        raise


def flip(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ (1 << bit)]))


def find_pages(path: Path) -> list[int]:
    """Places in the file of the pages that configuration and its copies stand in."""
    wanted = {*map(str, Part), "configuration"}
    with contextlib.closing(sqlite3.connect(path)) as db:
        (size,) = db.execute("PRAGMA page_size").fetchone()
        pages = db.execute(
            "SELECT tbl_name, pageno FROM dbstat JOIN sqlite_schema USING (name)"
        ).fetchall()
    return [(page - 1) * size + at for name, page in pages if name in wanted for at in range(size)]


@pytest.mark.parametrize("stopped", ["well", "killed"])
async def test_no_flipped_byte_changes_it_unseen(tmp_path: Path, stopped: str) -> None:
    (tmp_path / "state").mkdir()
    store = Store(tmp_path / "state" / "hairpin.db")
    written = await fill(store)
    # What comes after stands in the log, where a flipped byte takes away all that follows.
    await add_events(store, 20)
    if stopped == "well":
        store.close()
    origin = tmp_path / "origin"
    copy_state(tmp_path / "state", origin)
    store.close()
    path = copy_state(origin, tmp_path / "run")
    assert await look(path) == written
    files = [one for one in ("hairpin.db", "hairpin.db-wal") if (origin / one).exists()]
    assert ("hairpin.db-wal" in files) == (stopped == "killed")
    chance = random.Random(20261128)
    anywhere = [(one, at) for one in files for at in range((origin / one).stat().st_size)]
    in_pages = [("hairpin.db", at) for at in find_pages(path)]
    found: Counter[str] = Counter()
    for name, at in chance.sample(anywhere, FLIPS) + chance.sample(in_pages, FLIPS):
        path = copy_state(origin, tmp_path / "run")
        flip(path.with_name(name), at, chance.randrange(8))
        seen = await look(path)
        if isinstance(seen, str):
            found["refused"] += 1
            continue
        # An older cursor is no harm: what was delivered is delivered again, nothing is passed over.
        assert seen.cursors.items() <= written.cursors.items(), (name, at)
        assert replace(seen, cursors=written.cursors) == written, (name, at)
        found["used"] += 1
    assert found["used"] > FLIPS, found


ROWS = {
    "another policy": "UPDATE revisions SET documents = replace(documents, 'vm-1', 'vm-2')",
    "an older one in force": "UPDATE revisions SET applied_at = NULL WHERE number = 2",
    "one in force that never was": "UPDATE revisions SET applied_at = 71.0 WHERE number = 3",
    "the policies gone": "DELETE FROM revisions WHERE number = 2",
    "let out of quarantine": "DELETE FROM quarantines WHERE vm_id = 'vm-1'",
    "another one shut off": "UPDATE quarantines SET vm_id = 'vm-3' WHERE vm_id = 'vm-2'",
    "a quarantine that ends": "UPDATE quarantines SET until = 1.0 WHERE vm_id = 'vm-1'",
    "alerts passed over": "UPDATE export_cursors SET last_id = last_id + 4096 WHERE name = 'siem'",
    "no text": "UPDATE quarantines SET reason = CAST(x'ff' AS TEXT) WHERE vm_id = 'vm-1'",
}


@pytest.mark.parametrize("what", ROWS)
async def test_damaged_rows_are_put_back_and_told(tmp_path: Path, what: str) -> None:
    path = tmp_path / "hairpin.db"
    store = Store(path)
    written = await fill(store)
    assert store.mended == ()
    store.close()
    damage_rows(path, ROWS[what])
    for run in range(2):
        store = Store(path)
        assert await read_configuration(store) == written
        assert bool(store.mended) == (run == 0), "it is mended for good"
        told = await store.read(
            lambda db: find_rows(db, "SELECT * FROM events WHERE kind LIKE 'configuration.%'", ())
        )
        store.close()
    assert [(one["severity"], one["message"]) for one in told] == [("error", told[0]["message"])], (
        told
    )
    assert "damaged on disk, and put back as written" in told[0]["message"]


COPIES = {
    "digest": "UPDATE configuration SET sha256 = replace(sha256, substr(sha256, 1, 1), 'x')",
    "copy": "UPDATE configuration SET copy = replace(copy, 'a', 'b') WHERE copy LIKE '%a%'",
}


@pytest.mark.parametrize("what", COPIES)
async def test_a_damaged_copy_changes_nothing_and_is_made_anew(tmp_path: Path, what: str) -> None:
    path = tmp_path / "hairpin.db"
    store = Store(path)
    written = await fill(store)
    store.close()
    damage_rows(path, COPIES[what])
    store = Store(path)
    assert await read_configuration(store) == written
    assert {one[:11] for one in store.mended} == {"the copy of"}
    store.close()
    damage_rows(path, ROWS["another policy"])
    assert await look(path) == written


@pytest.mark.parametrize("what", ["copy", "digest and copy", "no copy"])
async def test_what_nothing_vouches_for_is_not_used(tmp_path: Path, what: str) -> None:
    path = tmp_path / "hairpin.db"
    store = Store(path)
    await fill(store)
    store.close()
    worse = {
        "copy": (COPIES["copy"],),
        "digest and copy": tuple(COPIES.values()),
        "no copy": ("DELETE FROM configuration WHERE name = 'revisions'",),
    }
    damage_rows(path, ROWS["another policy"], *worse[what])
    before = path.read_bytes()
    seen = await look(path)
    assert isinstance(seen, str)
    assert "the policies in force are not what was written, nor is the copy of them" in seen
    assert path.read_bytes() == before, "it is left for who looks into it"


def find_page(path: Path, name: str) -> tuple[int, int]:
    """Of a tree of one page: where it begins in the file, and its size."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        (size,) = db.execute("PRAGMA page_size").fetchone()
        ((page,),) = db.execute("SELECT pageno FROM dbstat WHERE name = ?", (name,)).fetchall()
    return (page - 1) * size, size


def replace_once(path: Path, name: str, old: bytes, new: bytes) -> None:
    start, size = find_page(path, name)
    data = path.read_bytes()
    assert data.count(old, start, start + size) == 1
    at = data.index(old, start)
    path.write_bytes(data[:at] + new + data[at + len(old) :])


@pytest.mark.parametrize(
    ("tree", "old", "new", "told"),
    [
        ("sqlite_autoindex_quarantines_1", b"vm-2", b"va-2", ["the index of table quarantines"]),
        (
            "quarantines", b"vm-2", b"va-2", ["the index of table quarantines", "the quarantines"],
        ),
        (
            "export_cursors", b"archive", b"avchive",
            ["the index of table export_cursors", "how far exporters got"],
        ),
        ("sqlite_autoindex_configuration_1", b"revisions", b"revisionz", ["the index of table configuration"]),
    ],
)  # fmt: skip
async def test_a_key_stands_in_the_table_and_in_its_index(
    tmp_path: Path, tree: str, old: bytes, new: bytes, told: list[str]
) -> None:
    """A question that the index alone can answer finds nothing wrong with the table, and the other way round."""
    path = tmp_path / "hairpin.db"
    store = Store(path)
    written = await fill(store)
    store.close()
    replace_once(path, tree, old, new)
    store = Store(path)
    assert await read_configuration(store) == written
    assert [one.partition(":")[0] for one in store.mended] == told
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize(
    ("table", "at", "bit"),
    # Where the content of the page begins; how many rows it has.
    [("quarantines", 5, 2), ("configuration", 5, 2), ("revisions", 4, 0)],
)
async def test_nothing_is_written_into_a_tree_that_is_broken(
    tmp_path: Path, table: str, at: int, bit: int
) -> None:
    path = tmp_path / "hairpin.db"
    store = Store(path)
    await store.write_lasting(lambda db: apply_policies(db, PolicySet(), 50.0))
    store.close()
    start, _ = find_page(path, table)
    flip(path, start + at, bit)
    before = path.read_bytes()
    seen = await look(path)
    assert isinstance(seen, str)
    assert path.read_bytes() == before


async def test_an_empty_configuration_is_as_well_kept(tmp_path: Path) -> None:
    path = tmp_path / "hairpin.db"
    store = Store(path)
    one = SHUT_OFF[0]
    await store.write_lasting(lambda db: store_quarantine(db, one))
    await store.write_lasting(lambda db: remove_quarantine(db, one.vm_id))
    nothing = await read_configuration(store)
    store.close()
    assert nothing == Configuration(0, PolicySet(), {}, {})
    damage_rows(path, "INSERT INTO quarantines VALUES ('vm-9', 'db-9', 1.0, NULL, '')")
    assert await look(path) == nothing


async def test_a_store_from_before_is_taken_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "hairpin.db"
    store = Store(path)
    written = await fill(store)
    store.close()
    damage_rows(path, "DELETE FROM _sqlite_migrations WHERE name = 'configuration_tables'")
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for (name,) in db.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'trigger'"
        ).fetchall():
            db.execute(f"DROP TRIGGER {name}")
        db.execute("DROP TABLE configuration")
    assert await look(path) == written
    damage_rows(path, ROWS["another policy"])
    assert await look(path) == written


async def test_a_version_of_before_that_ran_again_may_have_changed_it(tmp_path: Path) -> None:
    """It knows of no copy, and the next one must not put back what was in force before it."""
    path = tmp_path / "hairpin.db"
    store = Store(path)
    await fill(store)
    store.close()
    whole = build_policies()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "INSERT INTO revisions (at, author, documents) VALUES (90.0, 'api', ?)",
            (json.dumps(render_documents(replace(whole, policies=whole.policies[1:]))),),
        )
        db.execute("UPDATE revisions SET applied_at = 90.1 WHERE number = 4")
        db.execute("DELETE FROM quarantines WHERE vm_id = 'vm-1'")
        db.execute("UPDATE export_cursors SET last_id = 4712 WHERE name = 'siem'")
    store = Store(path)
    assert store.mended == ()
    found = await read_configuration(store)
    store.close()
    assert found.revision == 4
    assert found.policies.policies == whole.policies[1:]
    assert set(found.quarantines) == {"vm-2"}
    assert found.cursors["siem"] == 4712
    damage_rows(path, ROWS["another policy"])
    assert await look(path) == found


async def test_tables_of_a_newer_version_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hairpin.db"
    store = Store(path)
    await fill(store)
    store.close()
    newer = Migrations("hairpin")
    for one in schema.migrations._migrations:
        newer(name=one.name)(one.fn)

    @newer()
    def further(db: Database) -> None:
        db.execute("ALTER TABLE quarantines ADD COLUMN asked_by TEXT NOT NULL DEFAULT 'api'")

    with monkeypatch.context() as patched:
        patched.setattr(schema, "migrations", newer)
        for _ in range(2):
            store = Store(path)
            assert store.mended == ()
            store.close()
        damage_rows(path, ROWS["let out of quarantine"])
        store = Store(path)
        assert len(store.mended) == 1
        rows = await store.read(lambda db: find_rows(db, "SELECT * FROM quarantines", ()))
        assert [one["asked_by"] for one in rows] == ["api", "api"]
        store.close()
    store = Store(path)  # the version of before again
    assert store.mended == ()
    store.close()


async def test_a_change_does_not_stay_in_the_log_alone(tmp_path: Path) -> None:
    path = tmp_path / "hairpin.db"
    log = path.with_name("hairpin.db-wal")
    store = Store(path)
    whole = build_policies()
    try:
        await store.write_lasting(lambda db: apply_policies(db, whole, 50.0))
        await wait_until(lambda: log.stat().st_size == 0)
        with contextlib.closing(sqlite3.connect(path)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT max(number) FROM revisions").fetchone() == (1,)
            await store.write_lasting(lambda db: apply_policies(db, whole, 60.0))
            await asyncio.sleep(0.3)
            assert log.stat().st_size, "a reader is in the way, and waits for nobody"
        await store.write(lambda db: record_event(db, 61.0, "a.b", "info", "x"))
        await wait_until(lambda: log.stat().st_size == 0)
    finally:
        store.close()


def test_a_disk_that_fails_is_no_damage(tmp_path: Path) -> None:
    fault = sqlite3.OperationalError("disk I/O error")
    fault.sqlite_errorcode = sqlite3.SQLITE_IOERR_READ
    for opening in (False, True):
        told = explain_fault(tmp_path / "hairpin.db", fault, opening=opening)
        assert not told.damaged
        assert "check the disk" in told.mend


@pytest.mark.parametrize(
    ("rows", "copy", "digest", "verdict"),
    [
        ("a", "a", "a", "whole"),
        ("a", "b", "a", "copy damaged"),
        ("a", None, "a", "copy damaged"),
        ("a", "a", "b", "copy damaged"),
        ("a", "a", None, "copy damaged"),
        ("b", "a", "a", "rows damaged"),
        (None, "a", "a", "rows damaged"),
        ("a", "b", "c", "damaged"),
        ("a", None, None, "damaged"),
        (None, None, "a", "damaged"),
        (None, "a", None, "damaged"),
        (None, None, None, "damaged"),
    ],
)
def test_two_of_three_are_believed(
    rows: str | None, copy: str | None, digest: str | None, verdict: str
) -> None:
    assert judge(Part.POLICIES, Witness(rows, copy, CHANGED)) == (
        "damaged" if rows is None else "changed"
    )
    sha256 = None if digest is None else compute_digest(Part.POLICIES, digest)
    assert judge(Part.POLICIES, Witness(rows, copy, sha256)) == verdict
