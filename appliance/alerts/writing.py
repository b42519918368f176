"""Writing into the youngest partition: alerts, their texts and what is counted of them.

Each function of `Writer` belongs into a transaction of its connection. What the writer remembers between
them (numbers of signatures, the unfinished block) is true of the last commit only: after a transaction
that failed, make a new one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import zstandard
from sqlite_utils import Database

from appliance.alerts import sieve
from appliance.alerts.attributor import Attribution
from appliance.alerts.model import EveAlert, Rule
from appliance.alerts.packing import CHUNK_BYTES, TEXT_BYTES, expecting_damage, unpack
from appliance.alerts.partition import CHUNK_ALERTS, Mark
from appliance.alerts.quick import KnownRule, Sighting
from steering.decide import Subject
from steering.model import Lane

HOUR = 3600
_LEVEL = 1
_KEPT = 65_536
_BLOCK = sieve.BLOCK_ALERTS

Item = tuple[Sighting, Attribution]
_Key = tuple[int, Any]
# By the places of the columns in a row of `alerts`; plain numbers, for an Enum's hash is slow.
_MARKED = (
    (int(Mark.LANE), (2,)),
    (int(Mark.BLOCKED), (3,)),
    (int(Mark.SIGNATURE), (4,)),
    (int(Mark.ADDRESS), (5, 6)),
    (int(Mark.END), (7, 8)),
    (int(Mark.POLICY), (10,)),
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a batch of alerts was read: the file's generation and the offset it begins at."""

    lane: Lane
    generation: int
    offset: int
    stored_at: float


@dataclass(slots=True)
class _Tail:
    """The alerts after the last full block, which ``start`` - 1 alerts stand before."""

    start: int
    raw: list[bytes]
    text: list[str]
    rows: list[tuple[Any, ...]]


class Writer:
    """``db`` is the partition's connection, on which the caller has begun a transaction."""

    def __init__(self, db: Database) -> None:
        self._conn = db.conn
        self._compress = zstandard.ZstdCompressor(level=_LEVEL).compress
        self._rules: dict[KnownRule, int] = {}
        self._ends: dict[Subject, int] = {}
        self._attributions: dict[Attribution, tuple[object, ...]] = {}
        self.last = int(self._one("SELECT coalesce(max(id), 0) FROM alerts"))
        with expecting_damage():
            self._tail = self._load_tail()
            self._marks = self._load_marks()

    def write(self, items: Sequence[Item], origin: Origin) -> None:
        """Append alerts; their rows are numbered on from ``last``."""
        if not items:
            return
        lane = self._intern_lane(origin.lane)
        first = self.last + 1
        rules, attributions = self._rules, self._attributions
        if len(rules) > _KEPT or len(attributions) > _KEPT:
            rules.clear()
            attributions.clear()
        for known in {seen.known for seen, _ in items}:
            if known not in rules:
                self._intern_rule(known)
        for told in {told for _, told in items}:
            if told not in attributions:
                self._intern_attribution(told)
        rows: list[tuple[Any, ...]] = [
            (
                number,
                seen.at,
                lane,
                seen.blocked,
                rules[seen.known],
                seen.source_address,
                seen.destination_address,
                *attributions[told],
                render_detail(seen.event) if seen.shrunk and seen.event else None,
            )
            for number, (seen, told) in enumerate(items, first)
        ]
        counts = Counter([(row[1] // HOUR, row[4], row[3]) for row in rows])
        self._conn.executemany("INSERT INTO alerts VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)", rows)
        self._conn.executemany(
            "INSERT INTO hours VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " alerts = alerts + excluded.alerts, blocked = blocked + excluded.blocked",
            [(int(hour), s, n, n if blocked else 0) for (hour, s, blocked), n in counts.items()],
        )
        times = [row[1] for row in rows]
        self.last += len(items)
        self._conn.execute(
            "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                first,
                self.last,
                lane,
                origin.stored_at,
                origin.generation,
                origin.offset,
                min(times),
                max(times),
            ),
        )
        self._append(
            [seen.raw for seen, _ in items],
            [f"{seen.url}\0{seen.printable}" for seen, _ in items],
            rows,
        )

    def finish(self, at: float) -> None:
        """The last of this partition: what is told of it as a whole is written down."""
        self._turn(partial=True)
        self._conn.execute(
            "UPDATE span SET ended = ?, alerts = ?, oldest = (SELECT min(oldest) FROM batches),"
            " newest = (SELECT max(newest) FROM batches)",
            (at, self.last),
        )

    def _append(self, raw: list[bytes], text: list[str], rows: list[tuple[Any, ...]]) -> None:
        """Small batches are kept as they come until they fill a block, then packed together."""
        tail = self._tail
        begin = tail.start + len(tail.raw)
        tail.raw += raw
        tail.text += text
        tail.rows += rows
        if len(tail.raw) < _BLOCK:
            self._pack(begin, raw, text)
            return
        if begin > tail.start:
            self._conn.execute("DELETE FROM chunks WHERE first >= ?", (tail.start,))
            self._conn.execute("DELETE FROM texts WHERE first >= ?", (tail.start,))
        changed: set[_Key] = set()
        place = 0
        while len(tail.raw) - place >= _BLOCK:
            end = place + _BLOCK
            block = tail.start // _BLOCK
            self._pack(tail.start, tail.raw[place:end], tail.text[place:end], block)
            changed |= self._mark(block, tail.rows[place:end])
            place = end
            tail.start += _BLOCK
            if tail.start // _BLOCK % sieve.GROUP_BLOCKS == 0:
                self._keep_marks(block // sieve.GROUP_BLOCKS, changed)
                self._marks.clear()
                changed.clear()
        self._keep_marks(tail.start // _BLOCK // sieve.GROUP_BLOCKS, changed)
        del tail.raw[:place], tail.text[:place], tail.rows[:place]
        if tail.raw:
            self._pack(tail.start, tail.raw, tail.text)
        self._turn()

    def _mark(self, block: int, rows: list[tuple[Any, ...]]) -> set[_Key]:
        """Note what a full block has; the marks that changed."""
        columns = list(zip(*rows, strict=True))
        marks, bit = self._marks, sieve.find_bit(block)
        changed: set[_Key] = set()
        for mark, places in _MARKED:
            values = set().union(*(columns[place] for place in places))
            changed.update([(mark, value) for value in values if value is not None])
        for key in changed:
            marks[key] = marks.get(key, 0) | bit
        return changed

    def _keep_marks(self, group: int, changed: set[_Key]) -> None:
        marks = self._marks
        self._conn.executemany(
            "INSERT OR REPLACE INTO marks VALUES (?, ?, ?, ?)",
            [
                (group, kind, key, marks[kind, key].to_bytes(sieve.ROW_BYTES, "big"))
                for kind, key in changed
            ],
        )

    def _pack(
        self, first: int, raw: list[bytes], text: list[str], block: int | None = None
    ) -> None:
        compress = self._compress
        self._conn.executemany(
            "INSERT INTO chunks VALUES (?, ?)",
            [
                (first + place, compress(b"\n".join(raw[place : place + CHUNK_ALERTS])))
                for place in range(0, len(raw), CHUNK_ALERTS)
            ],
        )
        joined = "\0".join(text).encode().lower()
        self._conn.execute("INSERT INTO texts VALUES (?, ?)", (first, compress(joined)))
        if block is not None:
            self._conn.execute(
                "INSERT INTO sieves VALUES (?, ?)", (block, sieve.build_sieve(joined))
            )

    def _turn(self, *, partial: bool = False) -> None:
        """Turn full groups of sieves round, with ``partial`` also the last."""
        size = sieve.GROUP_BLOCKS
        while True:
            found = self._conn.execute(
                "SELECT block, bits FROM sieves ORDER BY block LIMIT ?", (size,)
            ).fetchall()
            if not found or (len(found) < size and not partial):
                return
            group = found[0][0] // size
            pages = sieve.turn_group([bits for _, bits in found])
            self._conn.executemany(
                "INSERT INTO grams VALUES (?, ?)",
                [(group * sieve.PAGES + page, bits) for page, bits in enumerate(pages)],
            )
            self._conn.execute("DELETE FROM sieves WHERE block <= ?", (found[-1][0],))

    def _load_tail(self) -> _Tail:
        start = self.last // _BLOCK * _BLOCK + 1
        raw: list[bytes] = []
        for (data,) in self._conn.execute(
            "SELECT data FROM chunks WHERE first >= ? ORDER BY first", (start,)
        ):
            raw += unpack(data, CHUNK_BYTES).split(b"\n")
        text: list[str] = []
        for (data,) in self._conn.execute(
            "SELECT data FROM texts WHERE first >= ? ORDER BY first", (start,)
        ):
            fields = unpack(data, TEXT_BYTES).decode().split("\0")
            text += [
                f"{url}\0{shown}" for url, shown in zip(fields[::2], fields[1::2], strict=True)
            ]
        rows = self._conn.execute("SELECT * FROM alerts WHERE id >= ? ORDER BY id", (start,))
        return _Tail(start, raw, text, rows.fetchall())

    def _load_marks(self) -> dict[_Key, int]:
        """Those of the group that the next full block belongs to."""
        group = self._tail.start // _BLOCK // sieve.GROUP_BLOCKS
        found = self._conn.execute("SELECT kind, key, blocks FROM marks WHERE grp = ?", (group,))
        return {(kind, key): int.from_bytes(bits, "big") for kind, key, bits in found}

    def _intern_lane(self, lane: Lane) -> int:
        values = (lane.name, str(lane.profile))
        self._conn.execute(
            "INSERT INTO lanes (lane, profile) VALUES (?, ?) ON CONFLICT DO NOTHING", values
        )
        return int(self._one("SELECT id FROM lanes WHERE lane = ? AND profile = ?", values))

    def _intern_rule(self, known: KnownRule) -> int:
        values = build_rule_values(known.rule)
        self._conn.execute(
            "INSERT INTO signatures (sid, gid, rev, signature, category, severity, cves,"
            " affected_products) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            values,
        )
        number = int(
            self._one(
                "SELECT id FROM signatures WHERE sid = ? AND gid = ? AND rev = ? AND signature = ?"
                " AND category = ? AND severity = ? AND cves = ? AND affected_products = ?",
                values,
            )
        )
        self._rules[known] = number
        return number

    def _intern_attribution(self, told: Attribution) -> tuple[object, ...]:
        policy = None
        if told.policy is not None:
            values = (told.policy, told.revision)
            found = "SELECT id FROM policies WHERE policy = ? AND revision IS ?"
            row = self._conn.execute(found, values).fetchone()
            if row is None:
                self._conn.execute("INSERT INTO policies (policy, revision) VALUES (?, ?)", values)
            policy = int(self._one(found, values))
        known = self._attributions[told] = (
            self._intern_end(told.source),
            self._intern_end(told.destination),
            None if told.opener is None else str(told.opener),
            policy,
            json.dumps(told.reasons) if told.reasons else None,
        )
        return known

    def _intern_end(self, subject: Subject | None) -> int | None:
        if subject is None:
            return None
        known = self._ends.get(subject)
        if known is None:
            if len(self._ends) > _KEPT:
                self._ends.clear()
            values = (subject.vm_id, subject.name, json.dumps(subject.zones))
            self._conn.execute(
                "INSERT INTO ends (vm_id, vm, zones) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                values,
            )
            known = self._ends[subject] = int(
                self._one("SELECT id FROM ends WHERE vm_id = ? AND vm = ? AND zones = ?", values)
            )
        return known

    def _one(self, sql: str, values: tuple[object, ...] = ()) -> int:
        return int(self._conn.execute(sql, values).fetchone()[0])


def build_rule_values(rule: Rule) -> tuple[object, ...]:
    one = rule.signature
    return (
        one.sid,
        one.gid,
        one.rev,
        one.text,
        one.category,
        one.severity,
        json.dumps(rule.cves),
        json.dumps(rule.affected_products),
    )


def render_detail(event: EveAlert) -> str:
    """The alert as JSON, but for its raw event."""
    return json.dumps({key: value for key, value in asdict(event).items() if key != "raw"})
