"""What takes shortcuts, counted by policy and trigger: connections, packets and bytes that go uninspected.

The switch counts what it delivers by itself (table TAKE, by policy) and forgets it with its restart; a
connection ends without a word. So both are looked at each second, and what grew is added to accounts that
the store keeps together with the readings that they were made from: a kill loses and doubles nothing, and
accounts never fall. A learned flow lives for 2 s at least, so no connection is missed between two looks.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import structlog
from sqlite_utils import Database

from appliance.alerts.history import find_rows
from appliance.alerts.store import Store, StoreError
from appliance.assurance.connections import TakenConnection, pair_taken
from steering.accounting import Meter, parse_meter, read_growth, render_meter
from steering.counters import Counters
from steering.errors import HairpinError, SwitchError
from steering.model import Inspect, Machine, PolicySet, Trigger
from steering.shortcut import Taken, has_shortcuts

log = structlog.get_logger("shortcuts")

METER = "shortcut"
LOOK_SECONDS = 1.0
STORE_SECONDS = 5.0
"""At most so often the accounts are written; what grew since stands in the switch as well."""
ROUNDING_SECONDS = 0.01
"""Ages are told in milliseconds."""
GONE_SECONDS = 10.0
"""For so long it is known what ended: a reading that was under way meanwhile may show it still."""
MOST_ACCOUNTS = 4_000
_BUSY_SHARE = 10
"""A look that takes long is made as much more rarely."""

Key = tuple[str, Trigger]
"""A policy's name and its trigger."""


@dataclass(frozen=True, slots=True)
class Account:
    """Since Hairpin was installed: ``connections`` that took a shortcut, ``packets`` and ``bytes`` that went

    uninspected by it, ``returned`` connections that were sent back to inspection.
    """

    connections: int = 0
    packets: int = 0
    bytes: int = 0
    returned: int = 0

    def __add__(self, other: Account) -> Account:
        return Account(
            self.connections + other.connections,
            self.packets + other.packets,
            self.bytes + other.bytes,
            self.returned + other.returned,
        )


@dataclass(frozen=True, slots=True)
class Book:
    """All that is kept between looks. ``at`` (epoch): of the last look; None: there was none yet.

    ``triggers``: by policy, at the last look. ``counted``: connection -> when it began at the latest, and
    was seen last (`time.monotonic`); None: made by a process before this one, whose looks saw what began
    before ``at``.
    """

    meter: Meter = field(default_factory=Meter)
    accounts: Mapping[Key, Account] = field(default_factory=lambda: MappingProxyType({}))
    triggers: Mapping[str, Trigger] = field(default_factory=lambda: MappingProxyType({}))
    at: float | None = None
    counted: Mapping[str, tuple[float, float]] | None = None


def find_triggers(policies: PolicySet) -> dict[str, Trigger]:
    """By policy name, of those that allow a shortcut."""
    return {
        policy.name: policy.action.shortcut.after
        for policy in policies.policies
        if isinstance(policy.action, Inspect) and policy.action.shortcut is not None
    }


def record_look(
    book: Book,
    at: float,
    ticks: tuple[float, float],
    counters: Counters,
    connections: Sequence[TakenConnection],
    policies: PolicySet,
) -> Book:
    """The book after a look that ended at ``at`` (epoch): growth and new connections added.

    ``ticks`` (monotonic): between these two it was read, at a moment that nobody knows.
    """
    now = find_triggers(policies)
    growth, meter = read_growth(book.meter, counters)
    more: dict[Key, Account] = {}
    for name, count in growth.shortcut.items():
        # What a changed policy let pass, it let pass before: a change sends all back, and then none
        # takes a shortcut for a while.
        trigger = book.triggers.get(name) or now.get(name)
        if trigger is not None and (count.packets or count.bytes):
            _add(more, (name, trigger), Account(packets=count.packets, bytes=count.bytes))
    book = record_seen(book, at, ticks, connections)
    return Book(meter, _merge(book.accounts, more), MappingProxyType(now), at, book.counted)


def record_seen(
    book: Book, at: float, ticks: tuple[float, float], connections: Iterable[TakenConnection]
) -> Book:
    """Each connection counted that was not seen before; readings may come in another order than made."""
    before, after = ticks
    more: dict[Key, Account] = {}
    counted = {
        number: (began, seen)
        for number, (began, seen) in (book.counted or {}).items()
        if seen > after - GONE_SECONDS
    }
    for one in connections:
        earliest, latest = before - one.age, after - one.age
        known = counted.get(one.id)
        if book.counted is None:
            is_new = book.at is None or at - (after - before) - one.age > book.at
        else:
            # The same ends anew, only if it can't be the one that was counted.
            is_new = known is None or earliest > known[0] + ROUNDING_SECONDS
        began = latest if is_new or known is None else min(latest, known[0])
        counted[one.id] = began, after
        if is_new and one.policy is not None and one.trigger is not None:
            _add(more, (one.policy, one.trigger), Account(connections=1))
    return replace(book, accounts=_merge(book.accounts, more), counted=counted)


def record_returned(book: Book, connections: Iterable[TakenConnection]) -> Book:
    more: dict[Key, Account] = {}
    for one in connections:
        if one.policy is not None and one.trigger is not None:
            _add(more, (one.policy, one.trigger), Account(returned=1))
    return replace(book, accounts=_merge(book.accounts, more))


def _add(accounts: dict[Key, Account], key: Key, more: Account) -> None:
    accounts[key] = accounts.get(key, Account()) + more


def _merge(accounts: Mapping[Key, Account], more: Mapping[Key, Account]) -> Mapping[Key, Account]:
    """What grew last stands last; beyond the bound those are left out that have not grown for longest."""
    if not more:
        return accounts
    merged = {key: one for key, one in accounts.items() if key not in more}
    merged |= {key: accounts.get(key, Account()) + one for key, one in more.items()}
    kept = list(merged.items())[-MOST_ACCOUNTS:]
    return MappingProxyType(dict(kept))


def render_book(book: Book) -> dict[str, Any]:
    """For the store."""
    return {
        "at": book.at,
        "meter": render_meter(book.meter),
        "triggers": dict(book.triggers),
        "accounts": [
            [policy, trigger, one.connections, one.packets, one.bytes, one.returned]
            for (policy, trigger), one in book.accounts.items()
        ],
    }


def parse_book(stored: object) -> Book:
    """What `render_book` gave. Raises HairpinError for anything else."""
    try:
        if not isinstance(stored, dict):
            raise TypeError("no mapping")
        accounts: dict[Key, Account] = {}
        for policy, trigger, *counts in stored["accounts"]:
            if not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError(f"{counts!r} are not counts")
            accounts[str(policy), Trigger(trigger)] = Account(*counts)
        return Book(
            meter=parse_meter(stored["meter"]),
            accounts=MappingProxyType(accounts),
            triggers=MappingProxyType(
                {str(name): Trigger(one) for name, one in stored["triggers"].items()}
            ),
            at=None if stored["at"] is None else float(stored["at"]),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as fault:
        raise HairpinError(
            f"the stored accounts of shortcuts can't be read: {fault}",
            "they begin anew; what the switch still counts is told once more",
        ) from fault


@dataclass(frozen=True, slots=True)
class Memory:
    """What a service before this one kept beside the book: the last alert that it judged, and what each

    lane's connections were let go by (`management.shortcut`). None: nothing is known.
    """

    alert: int | None = None
    lanes: Mapping[str, str] | None = None


class ShortcutWatch:
    """Run it as one task, after `load`: `run`. ``connections`` are those of the last look."""

    def __init__(
        self,
        store: Store,
        read_taken: Callable[[], Awaitable[tuple[Taken, ...]]],
        read_counters: Callable[[], Awaitable[Counters]],
        read_policies: Callable[[], PolicySet],
        read_machines: Callable[[], Sequence[Machine]],
        clock: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._read_taken = read_taken
        self._read_counters = read_counters
        self._read_policies = read_policies
        self._read_machines = read_machines
        self._clock = clock
        self._tick = tick
        self._lock = asyncio.Lock()
        self._stored: tuple[Book, Memory] | None = None
        self._stored_at = float("-inf")
        self.book = Book()
        self.memory = Memory()
        self.connections: tuple[TakenConnection, ...] = ()
        self.fault = ""

    async def load(self) -> None:
        """What a service before this one counted. Raises StoreError."""
        rows = await self._store.read(
            lambda db: find_rows(db, "SELECT value FROM meters WHERE name = ?", (METER,))
        )
        for row in rows:
            try:
                stored = json.loads(row["value"])
                self.book, self.memory = parse_book(stored), _parse_memory(stored)
            except (HairpinError, ValueError) as fault:
                log.error("accounts of before are of no use", reason=str(fault))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            began = time.monotonic()
            try:
                await self.look()
                await self._keep()
                self.fault = ""
            except StoreError as fault:
                self.fault = fault.reason
                log.error("accounts of shortcuts not stored", reason=fault.reason)
            except SwitchError as fault:
                log.debug("shortcuts not read", reason=fault.reason)  # health tells of the switch
            except HairpinError as fault:
                if self.fault != fault.reason:
                    log.error("shortcuts not read", reason=fault.reason)
                self.fault = fault.reason
            took = time.monotonic() - began
            await asyncio.sleep(max(LOOK_SECONDS, _BUSY_SHARE * took))

    async def look(self) -> tuple[TakenConnection, ...]:
        """Read both, and count what is new. Raises SwitchError; HairpinError for foreign flows.

        While no policy allows a shortcut, and none did at the last look, the switch is not asked.
        """
        async with self._lock:
            policies = self._read_policies()
            if not (has_shortcuts(policies) or self.book.triggers or self.connections):
                return ()
            before = self._tick()
            counters, taken = await asyncio.gather(self._read_counters(), self._read_taken())
            ticks, at = (before, self._tick()), self._clock()
            found = await self._pair(taken, policies)
            self.book = record_look(self.book, at, ticks, counters, found, policies)
            self.connections = found
            return found

    async def peek(self) -> tuple[TakenConnection, ...]:
        """The connections alone. Raises SwitchError; HairpinError for foreign flows."""
        before = self._tick()
        taken = await self._read_taken()
        ticks, at = (before, self._tick()), self._clock()
        found = await self._pair(taken, self._read_policies())
        if self.book.counted is not None:
            self.book = record_seen(self.book, at, ticks, found)
        return found

    async def _pair(
        self, taken: Sequence[Taken], policies: PolicySet
    ) -> tuple[TakenConnection, ...]:
        if not taken:  # most of the time, and VMs may be many
            return ()
        return await asyncio.to_thread(pair_taken, taken, policies, self._read_machines())

    def note_returned(self, connections: Sequence[TakenConnection]) -> None:
        self.book = record_returned(self.book, connections)
        gone = {one.id for one in connections}
        self.connections = tuple(one for one in self.connections if one.id not in gone)

    async def _keep(self) -> None:
        kept = self.book, self.memory
        if self._tick() - self._stored_at < STORE_SECONDS or not self._has_news():
            return
        value = json.dumps({**render_book(kept[0]), "memory": _render_memory(kept[1])})
        at = self._clock()

        def write(db: Database) -> None:
            db.execute(
                "INSERT INTO meters (name, at, value) VALUES (?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET at = excluded.at, value = excluded.value",
                (METER, at, value),
            )

        await self._store.write(write)
        self._stored, self._stored_at = kept, self._tick()

    def _has_news(self) -> bool:
        """Whether a restart from what is stored would tell other figures."""
        if self._stored is None:
            return True
        book, memory = self._stored
        return (book.accounts, book.triggers, memory) != (
            self.book.accounts,
            self.book.triggers,
            self.memory,
        )


def _render_memory(memory: Memory) -> dict[str, Any]:
    return {
        "alert": memory.alert,
        "lanes": None if memory.lanes is None else dict(memory.lanes),
    }


def _parse_memory(stored: Mapping[str, Any]) -> Memory:
    """Raises HairpinError."""
    try:
        kept = stored["memory"]
        alert, lanes = kept["alert"], kept["lanes"]
        return Memory(
            None if alert is None else int(alert),
            None if lanes is None else {str(name): str(one) for name, one in lanes.items()},
        )
    except (TypeError, ValueError, KeyError, AttributeError) as fault:
        raise HairpinError(f"what is stored of shortcuts can't be read: {fault}", "") from fault
