"""Questions about the alerts of one partition. SQL is built of the program's own words and numbers.

Ids in here are rows, from 1; the partition's base is added at the end. Alerts are found in the order of
their rows: of the full blocks only those are read whose marks have what is wanted (a VM, a signature, an
address, ...), the rest is walked. A substring is looked for in the signatures' texts, and in the texts of
the blocks whose sieve has it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlite_utils import Database

from appliance.alerts import sieve
from appliance.alerts.eve import parse_event
from appliance.alerts.model import Alert, Endpoint, EveAlert, Http, Opener, Signature, Verdict
from appliance.alerts.packing import CHUNK_BYTES, TEXT_BYTES, expecting_damage, unpack
from appliance.alerts.partition import CHUNK_ALERTS, Mark, Partition
from appliance.alerts.wanted import AlertFilter, fold_text, read_address
from steering.model import Family

_RUN_BLOCKS = 16
"""So many neighbouring blocks are asked of at once."""
_SLOTS_AT_ONCE = 3
"""Most groups are ruled out by the first few bits."""
_BLOCK = sieve.BLOCK_ALERTS

_NAMED = "SELECT id FROM ends WHERE ?1 IN (vm_id, vm)"
_ZONED = "SELECT id FROM ends WHERE ? IN (SELECT value FROM json_each(zones))"
_SELECT = """SELECT a.*, b.stored_at, l.lane AS lane_name, l.profile,
 s.sid, s.gid, s.rev, s.signature AS signature_text, s.category, s.severity, s.cves,
 s.affected_products, a.id AS row,
 e.vm_id AS source_vm_id, e.vm AS source_vm, e.zones AS source_zones,
 f.vm_id AS destination_vm_id, f.vm AS destination_vm, f.zones AS destination_zones,
 p.policy AS policy_name, p.revision
 FROM alerts a JOIN lanes l ON l.id = a.lane JOIN signatures s ON s.id = a.signature
 JOIN batches b ON b.first = (SELECT max(first) FROM batches WHERE first <= a.id)
 LEFT JOIN ends e ON e.id = a.source_end LEFT JOIN ends f ON f.id = a.destination_end
 LEFT JOIN policies p ON p.id = a.policy
 WHERE a.id IN (SELECT value FROM json_each(?)) ORDER BY a.id"""


_Need = tuple[Mark, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class _Plan:
    """``where``: what a row of `alerts` must fulfil; ``needs``: marks of which a block has at least one,

    of each need. Rows are between ``least`` and ``most``.
    """

    where: tuple[str, ...]
    values: dict[str, Any]
    needs: tuple[_Need, ...]
    least: int
    most: int

    @property
    def nothing(self) -> bool:
        return self.least > self.most or any(not keys for _, keys in self.needs)


def find_alerts_in(
    db: Database,
    partition: Partition,
    wanted: AlertFilter,
    after: int | None,
    limit: int,
    ascending: bool,
) -> list[Alert]:
    """At most ``limit``, in the order of their ids; ``after`` is an id, as `query.find_alerts` has it."""
    conn = db.conn
    plan = _plan(conn, partition, wanted, after, ascending)
    if plan.nothing:
        return []
    with expecting_damage():
        if wanted.text:
            needle = fold_text(wanted.text).encode("utf-8", "surrogatepass")
            rows = _find_text(conn, plan, needle, limit, ascending)
        else:
            rows = _find_rows(conn, plan, limit, ascending)
    return read_alerts(db, partition, rows)


def read_alerts(db: Database, partition: Partition, rows: Sequence[int]) -> list[Alert]:
    """The alerts of these rows, in this order; rows that are not there are left out."""
    if not rows:
        return []
    cursor = db.conn.execute(_SELECT, (json.dumps(rows),))
    names = [column[0] for column in cursor.description]
    raw = _Raw(db.conn)
    found = {}
    with expecting_damage():
        for values in cursor:
            row = dict(zip(names, values, strict=True))
            found[row["row"]] = _build_alert(row, raw.read(row["row"]), partition.base)
    return [found[row] for row in rows if row in found]


def find_last(db: Database) -> int:
    """The newest row; 0 when there is none."""
    return find_last_row(db.conn)


def find_last_row(conn: sqlite3.Connection) -> int:
    return int(conn.execute("SELECT coalesce(max(id), 0) FROM alerts").fetchone()[0])


def count_signatures(
    db: Database, first_hour: int, end_hour: int
) -> list[tuple[int, int, int, str, int, int, int, int]]:
    """gid, sid, rev, text, severity, alerts, blocked and the last hour; of the hours from ``first_hour``

    to before ``end_hour`` (since the epoch).
    """
    return db.conn.execute(
        "SELECT s.gid, s.sid, s.rev, s.signature, s.severity, h.alerts, h.blocked, h.last FROM"
        " (SELECT signature, sum(alerts) AS alerts, sum(blocked) AS blocked, max(hour) AS last"
        " FROM hours WHERE hour >= ? AND hour < ? GROUP BY signature) h"
        " JOIN signatures s ON s.id = h.signature",
        (first_hour, end_hour),
    ).fetchall()


def _plan(
    conn: sqlite3.Connection,
    partition: Partition,
    wanted: AlertFilter,
    after: int | None,
    ascending: bool,
) -> _Plan:
    where: list[str] = []
    values: dict[str, Any] = {}
    needs: list[_Need] = []

    def find(sql: str, value: object) -> tuple[int, ...]:
        return tuple(int(row[0]) for row in conn.execute(sql, (value,)))

    for side, name in (("source", wanted.source_vm), ("destination", wanted.destination_vm)):
        if name is not None:
            ends = find(_NAMED, name)
            where.append(f"{side}_end IN ({_join(ends)})")
            needs.append((Mark.END, ends))
    for sql, name in ((_NAMED, wanted.vm), (_ZONED, wanted.zone)):
        if name is not None:
            ends = find(sql, name)
            where.append(f"(source_end IN ({_join(ends)}) OR destination_end IN ({_join(ends)}))")
            needs.append((Mark.END, ends))
    if wanted.address is not None:
        values["address"] = read_address(wanted.address)
        where.append(":address IN (source_address, destination_address)")
        needs.append((Mark.ADDRESS, (values["address"],)))
    if wanted.policy is not None:
        policies = find("SELECT id FROM policies WHERE policy = ?", wanted.policy)
        where.append(f"policy IN ({_join(policies)})")
        needs.append((Mark.POLICY, policies))
    if wanted.lane is not None:
        lanes = find("SELECT id FROM lanes WHERE lane = ?", wanted.lane)
        where.append(f"lane IN ({_join(lanes)})")
        needs.append((Mark.LANE, lanes))
    if wanted.verdict is not None:
        blocked = int(wanted.verdict is Verdict.BLOCKED)
        where.append(f"blocked = {blocked}")
        needs.append((Mark.BLOCKED, (blocked,)))
    signatures = _find_signatures(conn, wanted)
    if signatures is not None:
        where.append(f"signature IN ({_join(signatures)})")
        needs.append((Mark.SIGNATURE, signatures))
    least, most = _find_bounds(conn, partition, wanted, after, ascending)
    for operator, at in ((">=", wanted.since), ("<", wanted.until)):
        if at is not None:
            name = "since" if operator == ">=" else "until"
            where.append(f"at {operator} :{name}")
            values[name] = at
    return _Plan(tuple(where), values, tuple(needs), least, most)


def _find_signatures(conn: sqlite3.Connection, wanted: AlertFilter) -> tuple[int, ...] | None:
    """The numbers of the signatures that are wanted; None where any is."""
    where: list[str] = []
    values: list[Any] = []
    if wanted.signature is not None:
        where.append("sid = ?")
        values.append(wanted.signature)
    if wanted.cve is not None:
        where.append("? IN (SELECT value FROM json_each(cves))")
        values.append(wanted.cve.upper())
    if not where:
        return None
    sql = f"SELECT id FROM signatures WHERE {' AND '.join(where)}"  # noqa: S608
    return tuple(int(row[0]) for row in conn.execute(sql, values))


def _find_bounds(
    conn: sqlite3.Connection,
    partition: Partition,
    wanted: AlertFilter,
    after: int | None,
    ascending: bool,
) -> tuple[int, int]:
    """The rows that may be wanted by their ids and, roughly, by their times."""
    least, most = 1, find_last_row(conn)
    if after is not None:
        row = after - partition.base
        least, most = (max(row + 1, 1), most) if ascending else (least, row - 1)
    if wanted.since is not None or wanted.until is not None:
        first, last = conn.execute(
            "SELECT min(first), max(last) FROM batches"
            " WHERE newest >= coalesce(?, newest) AND oldest < coalesce(?, oldest + 1)",
            (wanted.since, wanted.until),
        ).fetchone()
        if first is None:
            return 1, 0
        least, most = max(least, first), min(most, last)
    return least, most


def _find_rows(conn: sqlite3.Connection, plan: _Plan, limit: int, ascending: bool) -> list[int]:
    """The first ``limit`` rows of the plan."""
    where = " AND ".join(("id >= :first AND id <= :last", *plan.where))
    order = "ASC" if ascending else "DESC"
    sql = f"SELECT id FROM alerts WHERE {where} ORDER BY id {order} LIMIT :limit"  # noqa: S608
    found: list[int] = []
    for first, last in _find_ranges(conn, plan, ascending):
        values = {**plan.values, "first": first, "last": last, "limit": limit - len(found)}
        found += [row[0] for row in conn.execute(sql, values)]
        if len(found) >= limit:
            break
    return found


def _find_ranges(
    conn: sqlite3.Connection, plan: _Plan, ascending: bool
) -> Iterator[tuple[int, int]]:
    """First and last rows of where the plan's rows can be, in order."""
    if not plan.needs:
        yield plan.least, plan.most
        return
    rest = max(_count_full(conn) * _BLOCK + 1, plan.least), plan.most
    if not ascending and rest[0] <= rest[1]:
        yield rest
    run: list[int] = []
    for block in _sift_blocks(conn, plan, (), ascending):
        if run and (abs(block - run[-1]) != 1 or len(run) >= _RUN_BLOCKS):
            yield _bound_run(plan, run)
            run = []
        run.append(block)
    if run:
        yield _bound_run(plan, run)
    if ascending and rest[0] <= rest[1]:
        yield rest


def _bound_run(plan: _Plan, run: Sequence[int]) -> tuple[int, int]:
    first, last = min(run[0], run[-1]), max(run[0], run[-1])
    return max(first * _BLOCK + 1, plan.least), min((last + 1) * _BLOCK, plan.most)


def _find_text(
    conn: sqlite3.Connection, plan: _Plan, needle: bytes, limit: int, ascending: bool
) -> list[int]:
    """Rows whose signature, URL or payload has ``needle``, which is in small letters."""
    if b"\0" in needle:
        return []
    named = _find_signatures_with(conn, needle)
    found: set[int] = set()
    if named:
        by_name = replace(
            plan,
            where=(*plan.where, f"signature IN ({_join(named)})"),
            needs=(*plan.needs, (Mark.SIGNATURE, named)),
        )
        found.update(_find_rows(conn, by_name, limit, ascending))
    # Beyond this row enough are known already.
    end = sorted(found, reverse=not ascending)[limit - 1] if len(found) >= limit else None
    for met, row in enumerate(_search_blocks(conn, plan, needle, end, ascending), 1):
        found.add(row)
        if met >= limit:
            break
    return sorted(found, reverse=not ascending)[:limit]


def _find_signatures_with(conn: sqlite3.Connection, needle: bytes) -> tuple[int, ...]:
    return tuple(
        number
        for number, text in conn.execute("SELECT id, signature FROM signatures")
        if needle in text.encode("utf-8", "surrogatepass").lower()
    )


def _search_blocks(
    conn: sqlite3.Connection, plan: _Plan, needle: bytes, end: int | None, ascending: bool
) -> Iterator[int]:
    """Rows up to ``end`` with ``needle`` in URL or payload that fulfil the plan, in order."""
    if end is not None:
        plan = replace(plan, most=end) if ascending else replace(plan, least=end)
    check = " AND ".join(("id IN (SELECT value FROM json_each(:rows))", *plan.where))
    order = "ASC" if ascending else "DESC"
    sql = f"SELECT id FROM alerts WHERE {check} ORDER BY id {order}"  # noqa: S608
    for first in _find_pieces(conn, plan, needle, ascending):
        data = conn.execute("SELECT data FROM texts WHERE first = ?", (first,)).fetchone()[0]
        rows = [first + place for place in _find_places(unpack(data, TEXT_BYTES), needle)]
        rows = [row for row in rows if plan.least <= row <= plan.most]
        if not rows:
            continue
        if not plan.where:
            yield from rows if ascending else reversed(rows)
            continue
        values = {**plan.values, "rows": json.dumps(rows)}
        yield from [row[0] for row in conn.execute(sql, values)]


def _find_places(text: bytes, needle: bytes) -> list[int]:
    """Which alerts of a block have it; each has two fields, and every field but the last ends with NUL."""
    places: dict[int, None] = {}
    start, fields, counted = text.find(needle), 0, 0
    while start >= 0:
        fields += text.count(b"\0", counted, start)
        counted = start
        places[fields // 2] = None
        # On to the next alert.
        for _ in range(2 - fields % 2):
            start = text.find(b"\0", start) + 1
            if not start:
                return list(places)
        start = text.find(needle, start)
    return list(places)


def _find_pieces(
    conn: sqlite3.Connection, plan: _Plan, needle: bytes, ascending: bool
) -> Iterator[int]:
    """The first rows of the texts that may hold ``needle``, in order: of full blocks, and of the rest."""
    full = _count_full(conn)

    def rest() -> list[int]:
        sql = "SELECT first FROM texts WHERE first > ? ORDER BY first"
        found = [int(row[0]) for row in conn.execute(sql, (full * _BLOCK,))]
        return found if ascending else found[::-1]

    blocks = _sift_blocks(conn, plan, sieve.find_slots(needle), ascending)
    if ascending:
        yield from (block * _BLOCK + 1 for block in blocks)
        yield from rest()
    else:
        yield from rest()
        yield from (block * _BLOCK + 1 for block in blocks)


def _count_full(conn: sqlite3.Connection) -> int:
    return find_last_row(conn) // _BLOCK


def _sift_blocks(
    conn: sqlite3.Connection, plan: _Plan, slots: tuple[int, ...], ascending: bool
) -> Iterator[int]:
    """The full blocks of the plan's rows that have its marks and whose sieve has all ``slots``."""
    size = sieve.GROUP_BLOCKS
    least = (plan.least - 1) // _BLOCK
    end = min((plan.most - 1) // _BLOCK + 1, _count_full(conn))
    groups: Sequence[int] = range(least // size, (end - 1) // size + 1) if end > least else ()
    for group in groups if ascending else reversed(groups):
        blocks = range(max(group * size, least), min((group + 1) * size, end))
        left = sieve.ALL_BLOCKS
        for mark, keys in plan.needs:
            left &= _read_marks(conn, group, mark, keys)
            if not left:
                break
        if left and slots:
            left &= _read_sieves(conn, group, blocks, slots)
        if left:
            for block in blocks if ascending else reversed(blocks):
                if left & sieve.find_bit(block):
                    yield block


def _read_marks(conn: sqlite3.Connection, group: int, mark: Mark, keys: tuple[Any, ...]) -> int:
    """Bits of the group's blocks that have any of these."""
    found = 0
    if mark is Mark.ADDRESS:
        rows = conn.execute(
            "SELECT blocks FROM marks WHERE grp = ? AND kind = ? AND key = ?", (group, mark, *keys)
        )
    else:
        rows = conn.execute(
            "SELECT blocks FROM marks WHERE grp = ? AND kind = ?"  # noqa: S608 - numbers of ours
            f" AND key IN ({_join(keys)})",
            (group, mark),
        )
    for (bits,) in rows:
        found |= int.from_bytes(bits, "big")
    return found


def _read_sieves(
    conn: sqlite3.Connection, group: int, blocks: range, slots: tuple[int, ...]
) -> int:
    left, turned = sieve.ALL_BLOCKS, True
    for place in range(0, len(slots), _SLOTS_AT_ONCE):
        some = slots[place : place + _SLOTS_AT_ONCE]
        numbers = [group * sieve.PAGES + page for page in sieve.find_pages(some)]
        sql = f"SELECT page, bits FROM grams WHERE page IN ({_join(numbers)})"  # noqa: S608
        pages = {page - group * sieve.PAGES: bits for page, bits in conn.execute(sql)}
        turned = bool(pages)
        if not turned:
            break
        left &= sieve.sift_group(pages, some)
        if not left:
            break
    if turned:
        return left
    found = 0
    sql = "SELECT block, bits FROM sieves WHERE block >= ? AND block < ?"
    for block, bits in conn.execute(sql, (blocks.start, blocks.stop)):
        if sieve.may_hold(bits, slots):
            found |= sieve.find_bit(block)
    return found


class _Raw:
    """Raw events by row, empty where there is none; the chunk that was read last is kept."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn
        self._first = 0
        self._lines: list[bytes] = []

    def read(self, row: int) -> bytes:
        if not self._first <= row < self._first + len(self._lines):
            found = self._conn.execute(
                "SELECT first, data FROM chunks WHERE first > ? AND first <= ?"
                " ORDER BY first DESC LIMIT 1",
                (row - CHUNK_ALERTS, row),
            ).fetchone()
            if found is None:
                return b""
            self._first = found[0]
            self._lines = unpack(found[1], CHUNK_BYTES).split(b"\n")
        place = row - self._first
        return self._lines[place] if place < len(self._lines) else b""


def _build_alert(row: dict[str, Any], raw: bytes, base: int) -> Alert:
    event = parse_event(raw) if row["detail"] is None else read_detail(row["detail"])
    text = raw.decode(errors="replace")
    if not isinstance(event, EveAlert):
        # The quick way reads what the reference refuses, such as a number beyond all floats that
        # nobody asked for. What the row has is told.
        text, event = '{"event_type":"alert"}', None
    http = event.http if event else None
    return Alert(
        id=base + row["row"],
        at=row["at"],
        stored_at=row["stored_at"],
        lane=row["lane_name"],
        profile=row["profile"],
        verdict=Verdict.BLOCKED if row["blocked"] else Verdict.ALLOWED,
        source=_build_endpoint("source", row, event.source_port if event else None),
        destination=_build_endpoint("destination", row, event.destination_port if event else None),
        protocol=event.protocol if event else "",
        family=event.family if event else None,
        direction=event.direction if event else None,
        opener=Opener(row["opener"]) if row["opener"] else None,
        signature=Signature(
            row["sid"],
            row["gid"],
            row["rev"],
            row["signature_text"],
            row["category"],
            row["severity"],
        ),
        cves=tuple(json.loads(row["cves"])),
        affected_products=tuple(json.loads(row["affected_products"])),
        policy=row["policy_name"],
        revision=row["revision"],
        app_proto=event.app_proto if event else None,
        payload=event.payload if event else "",
        payload_printable=event.payload_printable if event else "",
        http=http,
        community_id=event.community_id if event else None,
        flow_id=event.flow_id if event else None,
        reasons=tuple(json.loads(row["reasons"])) if row["reasons"] else (),
        raw=text,
    )


def read_detail(text: str) -> EveAlert:
    """What `writing.render_detail` wrote."""
    values = json.loads(text)
    http = values["http"]
    return EveAlert(
        **{
            **values,
            "family": Family(values["family"]) if values["family"] else None,
            "opener": Opener(values["opener"]) if values["opener"] else None,
            "verdict": Verdict(values["verdict"]),
            "signature": Signature(**values["signature"]),
            "cves": tuple(values["cves"]),
            "affected_products": tuple(values["affected_products"]),
            "http": None if http is None else Http(**http),
        }
    )


def _build_endpoint(side: str, row: dict[str, Any], port: int | None) -> Endpoint:
    zones = row[f"{side}_zones"]
    return Endpoint(
        row[f"{side}_address"],
        port,
        row[f"{side}_vm_id"],
        row[f"{side}_vm"],
        tuple(json.loads(zones)) if zones else (),
    )


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
