"""Sends connections that take a shortcut back to inspection, when their reason to be let go is gone.

By an operator's word; by alerts as they are stored; after an engine loaded other rules, or is another
one; when a VM is shut off. Policies that change send all back in their own bundle (`steering.reconcile`).
What the switch does not take is tried again until it does, and health tells.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

import structlog

from appliance.alerts.history import record_event, record_repeated
from appliance.alerts.ingest import Ingest
from appliance.alerts.model import Alert, Verdict
from appliance.alerts.query import find_alerts_after, find_latest_alert_id
from appliance.alerts.store import Store, StoreError
from appliance.api.control import NotFound
from appliance.api.documents import VmName
from appliance.api.queries import ShortcutFilter, ShortcutQuery
from appliance.api.shortcuts import (
    ShortcutAccount,
    ShortcutConnection,
    ShortcutEnd,
    ShortcutList,
    ShortcutReport,
)
from appliance.assurance.connections import End, TakenConnection, find_named
from appliance.assurance.shortcuts import Account, Key, ShortcutWatch
from appliance.inspection.publish import InspectionState
from appliance.management.pages import cut_page
from steering.errors import HairpinError, SwitchError
from steering.explain import find_machine
from steering.model import Inspect, PolicySet, Protocol, Shortcut
from steering.reconcile import Reconciler
from steering.shortcut import Connection, Return

log = structlog.get_logger("shortcut")

EVENT = "shortcut.returned"
BATCH_ALERTS = 500
BACKLOG_ALERTS = 5_000
"""So many alerts behind, they are not judged one by one: all is sent back."""
APART_SECONDS = 0.1
"""Between two returns by alerts: a storm of them is not to be one of commands to the switch."""
RETRY_SECONDS = 1.0
ENGINES_SECONDS = 1.0
AT_ONCE = 16
LOOK_SECONDS = 0.02
"""An operator's return waits so long for a look at what it ends; others go to the switch beside theirs."""
MOST_LINES = 2_000
"""Returns that would take more deletes than that send back all of their policies instead."""


class Cause(StrEnum):
    OPERATOR = "operator"
    ALERT = "alert"
    RULES = "rules"
    ENGINE = "engine"
    QUARANTINE = "quarantine"
    POLICIES = "policies"


@dataclass(frozen=True, slots=True)
class Order:
    """A return to be carried out. When it is: ``lane`` is vouched for by ``ruleset``, and alerts up to

    ``alert`` were judged.
    """

    cause: Cause
    why: str
    wanted: Return
    lane: str | None = None
    vouched: str = ""
    alert: int | None = None


def find_shortcuts(policies: PolicySet) -> dict[str, Shortcut]:
    """By policy name, of those that allow one."""
    return {
        policy.name: policy.action.shortcut
        for policy in policies.policies
        if isinstance(policy.action, Inspect) and policy.action.shortcut is not None
    }


def find_lane_policies(policies: PolicySet, lane: str) -> frozenset[str]:
    """The policies whose connections may be let go by the engine of that lane."""
    return frozenset(
        policy.name
        for policy in policies.policies
        if isinstance(policy.action, Inspect)
        and policy.action.shortcut is not None
        and str(policy.action.profile) == lane
    )


def find_returns(alerts: Sequence[Alert], policies: PolicySet) -> Return | None:
    """What these alerts send back; None for nothing. Pure.

    A VM's connections, where their policy says `returnOnAlert`; the very connection of which a packet was
    blocked, whatever it says. Where an end is of no known VM, rather too much: all of the policy.
    """
    cuts = find_shortcuts(policies)
    back = frozenset(name for name, cut in cuts.items() if cut.return_on_alert)
    vm_ids: set[str] = set()
    named: set[str] = set()
    connections: set[Connection] = set()
    for alert in alerts if cuts else ():
        if alert.verdict is Verdict.BLOCKED:
            connections.update(_find_blocked(alert, cuts))
        if back:
            known = {end.vm_id for end in (alert.source, alert.destination) if end.vm_id}
            vm_ids |= known
            if len(known) < 2:
                named |= back if alert.policy is None else back & {alert.policy}
    if not (vm_ids or named or connections):
        return None
    of_policies = frozenset() if len(back) == len(cuts) else back
    if len(vm_ids) * max(len(of_policies), 1) + len(connections) > MOST_LINES:
        return Return(policies=frozenset(cuts) if connections else back)
    return Return(
        policies=frozenset(named),
        vm_ids=frozenset(vm_ids),
        of_policies=of_policies if vm_ids else frozenset(),
        connections=frozenset(connections),
    )


def _find_blocked(alert: Alert, cuts: Mapping[str, Shortcut]) -> list[Connection]:
    """The connection of a blocked packet; under every policy where it is not known which it has."""
    source, destination = alert.source, alert.destination
    if (
        alert.family is None
        or alert.protocol.lower() != Protocol.TCP
        or source.address is None
        or source.port is None
        or destination.address is None
        or destination.port is None
    ):
        return []
    ends = source.address, source.port, destination.address, destination.port
    policies = [alert.policy] if alert.policy in cuts else sorted(cuts)
    return [Connection(policy or "", alert.family, *ends) for policy in policies]


def build_connection(one: TakenConnection) -> ShortcutConnection:
    return ShortcutConnection(
        id=one.id,
        policy=one.policy,
        reason=one.trigger,
        family=one.family,
        source=_build_end(one.source),
        destination=_build_end(one.destination),
        age_seconds=max(one.age, 0.0),
        idle_seconds=max(one.idle, 0.0),
        packets=one.packets,
        bytes=one.bytes,
    )


def _build_end(end: End) -> ShortcutEnd:
    vm = None if end.vm_id is None else VmName(vm_id=end.vm_id, name=end.vm or end.vm_id)
    return ShortcutEnd(
        vm=vm, address=end.address, port=end.port, packets=end.packets, bytes=end.bytes
    )


def build_accounts(
    accounts: Mapping[Key, Account], open_now: Sequence[TakenConnection], policies: PolicySet
) -> tuple[ShortcutAccount, ...]:
    """One for each policy that allows shortcuts, and for what others let go before; sorted by policy."""
    cuts = find_shortcuts(policies)
    keys = set(accounts) | {(name, cut.after) for name, cut in cuts.items()}
    standing = Counter((one.policy, one.trigger) for one in open_now)
    found = []
    for name, trigger in sorted(keys):
        one = accounts.get((name, trigger), Account())
        cut = cuts.get(name)
        cut = cut if cut is not None and cut.after is trigger else None
        found.append(
            ShortcutAccount(
                policy=name,
                reason=trigger,
                limit=None if cut is None else cut.max_flows,
                return_on_alert=None if cut is None else cut.return_on_alert,
                open=standing[name, trigger],
                connections=one.connections,
                returned=one.returned,
                packets=one.packets,
                bytes=one.bytes,
            )
        )
    return tuple(found)


def matches(one: TakenConnection, wanted: ShortcutFilter) -> bool:
    names = {name for end in (one.source, one.destination) for name in (end.vm, end.vm_id)}
    return wanted.policy in (None, one.policy) and (wanted.vm is None or wanted.vm in names)


class ShortcutWork:
    """``read_ruleset`` gives the revision of the rules in force on a lane, by its name.

    Run three tasks of it: `run_returns`, `run_alerts`, `run_engines`; and the watch's own.
    """

    def __init__(
        self,
        store: Store,
        ingest: Ingest,
        reconciler: Reconciler,
        watch: ShortcutWatch,
        read_policies: Callable[[], PolicySet],
        read_inspection: Callable[[], InspectionState | None],
        read_ruleset: Callable[[str], str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._ingest = ingest
        self._reconciler = reconciler
        self._watch = watch
        self._read_policies = read_policies
        self._read_inspection = read_inspection
        self._read_ruleset = read_ruleset
        self._clock = clock
        self._orders: list[Order] = []
        self._wake = asyncio.Event()
        self._undone: dict[Order, str] = {}
        self._engines: dict[str, str] = {}

    @property
    def fault(self) -> str:
        """Why connections that are to be inspected again are not yet; "" where all are."""
        for order, reason in self._undone.items():
            return f"connections are still to be sent back to inspection ({order.why}): {reason}"
        return ""

    # Asked by others

    def request(self, order: Order) -> None:
        """Carried out at once by `run_returns`, and tried again until the switch takes it."""
        self._orders.append(order)
        self._wake.set()

    def return_vm(self, vm_id: str, name: str) -> None:
        """A VM is shut off: none of its connections is to go on uninspected when it is let in again."""
        if find_shortcuts(self._read_policies()):
            wanted = Return(vm_ids=frozenset({vm_id}))
            self.request(Order(Cause.QUARANTINE, f"VM {name} is shut off", wanted))

    def return_lane(self, lane: str) -> None:
        """An engine was told to load rules, and what it did is judged: what older rules let go ends."""
        self._request_lane(Cause.RULES, f"the rules of lane {lane} were loaded", lane)

    def note_policies(self, before: PolicySet) -> tuple[TakenConnection, ...]:
        """Policies changed, and sent all back by themselves: those, for `tell_policies`."""
        found = self._watch.connections if find_shortcuts(before) else ()
        self._watch.note_returned(found)
        return found

    async def tell_policies(self, returned: Sequence[TakenConnection]) -> None:
        if returned:
            await self._tell(Cause.POLICIES, "policies changed", returned, None)

    async def find(self, query: ShortcutQuery) -> ShortcutList:
        """Raises SwitchError, WrongInput (cursor)."""
        connections = await self._watch.look()
        chosen = [one for one in connections if matches(one, query)]
        page, following = cut_page(chosen, query.cursor, query.limit)
        return ShortcutList(
            items=tuple(map(build_connection, page)),
            accounts=tuple(
                one for one in self.build_accounts() if query.policy in (None, one.policy)
            ),
            next=following,
        )

    def build_accounts(self) -> tuple[ShortcutAccount, ...]:
        return build_accounts(
            self._watch.book.accounts, self._watch.connections, self._read_policies()
        )

    async def return_filtered(self, wanted: ShortcutFilter) -> ShortcutReport:
        """Of a policy, of a VM, of both, or (neither) all. Raises NotFound, SwitchError."""
        policies = self._read_policies()
        if wanted.policy is not None and wanted.policy not in {
            policy.name for policy in policies.policies
        }:
            raise NotFound(
                f"no policy {wanted.policy}", "`hairpin policy show` lists those in force"
            )
        named = frozenset() if wanted.policy is None else frozenset({wanted.policy})
        what = "" if wanted.policy is None else f" of policy {wanted.policy}"
        if wanted.vm is None:
            return await self._return_asked(f"asked for those{what or ' of all'}", Return(named))
        machine = find_machine(self._reconciler.machines(), wanted.vm)
        if machine is None:
            raise NotFound(f"no VM {wanted.vm} on the switch", "`hairpin vms` lists those that are")
        vms = Return(vm_ids=frozenset({machine.vm_id}), of_policies=named)
        return await self._return_asked(f"asked for those{what} of VM {machine.name}", vms)

    async def return_one(self, shortcut_id: str) -> ShortcutReport:
        """Raises NotFound, SwitchError."""
        found = next((one for one in await self._watch.look() if one.id == shortcut_id), None)
        if found is None:
            raise NotFound(
                f"no connection {shortcut_id} takes a shortcut (it may have ended)",
                "`hairpin shortcut list` shows those that do",
            )
        wanted = Return(connections=frozenset({found.wanted}))
        return await self._return_asked("asked for this one", wanted)

    async def _return_asked(self, why: str, wanted: Return) -> ShortcutReport:
        found, seconds = await self._give_back(Cause.OPERATOR, why, wanted)
        return ShortcutReport(returned=len(found), seconds=seconds)

    # Done

    async def run_returns(self) -> None:
        """Until cancelled."""
        room = asyncio.Semaphore(AT_ONCE)

        async def carry_out(order: Order) -> None:
            try:
                await self._carry_out(order)
            finally:
                room.release()

        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._wake.wait()
                self._wake.clear()
                orders, self._orders = self._orders, []
                for order in orders:
                    await room.acquire()
                    # Not one after the other: the second half of a return waits for the reconciler.
                    tasks.create_task(carry_out(order))

    async def _carry_out(self, order: Order) -> None:
        while True:
            try:
                await self._give_back(order.cause, order.why, order.wanted)
                break
            except SwitchError as fault:
                self._undone[order] = fault.reason
                log.warning("not returned", cause=order.cause, reason=fault.reason)
                await asyncio.sleep(RETRY_SECONDS)
        self._undone.pop(order, None)
        self._note_done(order)

    def _note_done(self, order: Order) -> None:
        memory = self._watch.memory
        if order.lane is not None:
            lanes = {**(memory.lanes or {}), order.lane: order.vouched}
            memory = replace(memory, lanes=MappingProxyType(lanes))
        if order.alert is not None:
            memory = replace(memory, alert=max(order.alert, memory.alert or 0))
        self._watch.memory = memory

    async def _give_back(
        self, cause: Cause, why: str, wanted: Return
    ) -> tuple[tuple[TakenConnection, ...], float]:
        """Raises SwitchError."""
        known = {one.id: one for one in self._watch.connections}
        if cause is Cause.OPERATOR:  # who waits for the count, and has 50 ms for the return
            seen, waited = await self._peek(LOOK_SECONDS)
            seconds = waited + await self._reconciler.return_shortcuts(wanted)
        else:
            returning = asyncio.create_task(self._reconciler.return_shortcuts(wanted))
            try:
                await asyncio.sleep(0)  # the return goes first, and the look beside it
                seen, _ = await self._peek(None)
                seconds = await returning
            finally:
                returning.cancel()
        # The look may come too late for those: then the one before it, a second old, tells of them.
        found = find_named(wanted, (known | {one.id: one for one in seen}).values())
        if found:
            self._watch.note_returned(found)
            await self._tell(cause, why, found, seconds)
        return found, seconds

    async def _peek(self, seconds: float | None) -> tuple[tuple[TakenConnection, ...], float]:
        """Those on the switch now, or none where it does not answer in time; and how long it took."""
        began = time.monotonic()
        seen: tuple[TakenConnection, ...] = ()
        try:
            async with asyncio.timeout(seconds):
                seen = await self._watch.peek()
        except (HairpinError, TimeoutError) as fault:
            log.debug("not looked at before", reason=str(fault))
        return seen, time.monotonic() - began

    async def _tell(
        self,
        cause: Cause,
        why: str,
        found: Sequence[TakenConnection],
        seconds: float | None,
    ) -> None:
        """One event; by alerts one an hour, whose count grows."""
        at, count = self._clock(), len(found)
        policies = Counter(one.policy or "(not in force)" for one in found)
        took = "" if seconds is None else f", within {seconds:.3f} s"
        text = f"{count} connections that took a shortcut are inspected again{took}: {why}"
        detail = {"cause": cause.value, "connections": count, "policies": dict(policies)}
        log.info("returned", cause=cause, connections=count, why=why)
        try:
            if cause is Cause.ALERT:
                await self._store.write(
                    lambda db: record_repeated(
                        db, at, EVENT, "info", text, subject=cause, count=count, detail=detail
                    )
                )
            else:
                await self._store.write(
                    lambda db: record_event(
                        db, at, EVENT, "info", text, subject=cause, detail=detail
                    )
                )
        except StoreError as fault:
            log.error("event not stored", text=text, reason=fault.reason)

    # Alerts

    async def run_alerts(self) -> None:
        """Until cancelled; from where a service before this one was."""
        after = self._watch.memory.alert
        while True:
            try:
                if after is None:
                    after = await find_latest_alert_id(self._store)
                await self._ingest.wait_newer(after)
                after, order = await self._read_alerts(after)
            except StoreError as fault:
                log.warning("alerts not read", reason=fault.reason)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if order is not None:
                self.request(order)
                await asyncio.sleep(APART_SECONDS)

    async def _read_alerts(self, after: int) -> tuple[int, Order | None]:
        """How far alerts were read, and what they send back. Raises StoreError."""
        policies = self._read_policies()
        cuts = frozenset(find_shortcuts(policies))
        newest = await find_latest_alert_id(self._store)
        if newest - after > BACKLOG_ALERTS or not cuts:
            last, wanted, why = (
                newest,
                Return(cuts) if cuts else None,
                "more alerts than can be judged",
            )
        else:
            alerts, last = await find_alerts_after(self._store, after, limit=BATCH_ALERTS)
            wanted = find_returns(alerts, policies)
            why = _describe_alerts(alerts)
        if wanted is None:
            if cuts:
                self._watch.memory = replace(self._watch.memory, alert=last)
            return last, None
        return last, Order(Cause.ALERT, why, wanted, alert=last)

    # Engines

    async def run_engines(self) -> None:
        """Until cancelled."""
        while True:
            self.look_at_engines()
            await asyncio.sleep(ENGINES_SECONDS)

    def look_at_engines(self) -> None:
        """Once: what an engine that is gone let go is vouched for by none that runs.

        The new one may run other rules, and one that crashed or hung judged last when it was least to be
        trusted. It costs little: the new engine knows nothing of them, and may let them go again.
        """
        state = self._read_inspection()
        vouched = self._watch.memory.lanes
        for lane in state.lanes if state is not None else ():
            if not lane.inspecting or lane.pid is None:
                continue
            engine = _name_engine(lane.pid, lane.started)
            if lane.name in self._engines:
                is_new = self._engines[lane.name] != engine
            else:  # since the service began; the rules may be others, too
                now = f"{engine} {self._read_ruleset(lane.name)}"
                is_new = vouched is None or vouched.get(lane.name) != now
            self._engines[lane.name] = engine
            if is_new:
                why = f"the engine of lane {lane.name} is another one"
                self._request_lane(Cause.ENGINE, why, lane.name)

    def _request_lane(self, cause: Cause, why: str, lane: str) -> None:
        vouched = f"{self._engines.get(lane, '')} {self._read_ruleset(lane)}"
        policies = find_lane_policies(self._read_policies(), lane)
        order = Order(cause, why, Return(policies), lane=lane, vouched=vouched)
        if policies:
            self.request(order)
        else:
            self._note_done(order)  # an empty return would be one of all


def _name_engine(pid: int, started: float | None) -> str:
    return f"{pid}@{started or 0:.3f}"


def _describe_alerts(alerts: Sequence[Alert]) -> str:
    if not alerts:
        return ""
    blocked = sum(alert.verdict is Verdict.BLOCKED for alert in alerts)
    last = alerts[-1]
    ends = " -> ".join(end.vm or end.address or "?" for end in (last.source, last.destination))
    return (
        f"{len(alerts)} alerts ({blocked} blocked), the last of sid {last.signature.sid} on {ends}"
    )
