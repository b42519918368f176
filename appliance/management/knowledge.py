"""What was known at a time: which VMs, policies and addresses, so that an old event finds its own.

Kept in memory by the management service; holdings also stand in the store.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from appliance.alerts.attribute import Context
from steering.model import Holding, Lane, Machine, PolicySet

SNAPSHOTS_KEPT = 1000
HOLDINGS_KEPT = 64  # per address; older ones stand in the store


@dataclass(frozen=True, slots=True)
class Snapshot:
    """In force from ``at`` until the next snapshot. ``revision`` 0: no policies were ever applied."""

    at: float
    machines: tuple[Machine, ...] = ()
    policies: PolicySet = field(default_factory=PolicySet)
    revision: int = 0


class Knowledge:
    """Written by the event loop, read from threads: each write replaces a whole frozen value."""

    def __init__(self, holdings: Mapping[str, tuple[Holding, ...]] | None = None) -> None:
        self._snapshots: tuple[Snapshot, ...] = (Snapshot(0.0),)
        self._contexts: dict[
            str, tuple[Snapshot, Mapping[str, tuple[Holding, ...]], Lane, Context]
        ] = {}
        self._holdings: Mapping[str, tuple[Holding, ...]] = MappingProxyType(dict(holdings or {}))

    @property
    def now(self) -> Snapshot:
        return self._snapshots[-1]

    @property
    def holdings(self) -> Mapping[str, tuple[Holding, ...]]:
        """By address, oldest first."""
        return self._holdings

    def add(self, snapshot: Snapshot) -> None:
        """Note what is in force from ``snapshot.at`` on."""
        last = self.now
        same = (last.machines, last.policies, last.revision)
        if same != (snapshot.machines, snapshot.policies, snapshot.revision):
            self._snapshots = (*self._snapshots[-SNAPSHOTS_KEPT + 1 :], snapshot)

    def take_address(self, address: str, vm_id: str, at: float, *, claimed: bool = True) -> bool:
        """``vm_id`` claimed ``address``; ends the former holder's interval. False: known already.

        Where it is not ``claimed``, only sent from, it counts if nobody holds the address: a packet's
        source is easily forged, and must not take an address from its holder.
        """
        known = self._holdings.get(address, ())
        current = known[-1] if known and known[-1].until is None else None
        if current is not None and (not claimed or current.vm_id == vm_id or at <= current.since):
            return False
        if current is not None:
            known = (*known[:-1], replace(current, until=at))
        kept = (*known[-HOLDINGS_KEPT + 1 :], Holding(address, vm_id, at))
        self._holdings = MappingProxyType({**self._holdings, address: kept})
        return True

    def drop_machine(self, vm_id: str, at: float) -> None:
        """``vm_id`` left the switch: it holds nothing from ``at`` on."""
        self._holdings = MappingProxyType(
            {
                address: tuple(
                    replace(holding, until=max(at, holding.since))
                    if holding.vm_id == vm_id and holding.until is None
                    else holding
                    for holding in known
                )
                for address, known in self._holdings.items()
            }
        )

    def find_addresses(self, vm_id: str) -> tuple[Holding, ...]:
        """What ``vm_id`` holds now, sorted by address."""
        return tuple(
            known[-1]
            for _, known in sorted(self._holdings.items())
            if known and known[-1].vm_id == vm_id and known[-1].until is None
        )

    def find_context(self, lane: Lane, at: float) -> Context:
        """What was known of a lane's VMs and policies at ``at`` (seconds since the epoch)."""
        snapshots = self._snapshots
        snapshot = snapshots[-1]
        if at < snapshot.at:
            index = bisect_right(snapshots, at, key=lambda snapshot: snapshot.at) - 1
            snapshot = snapshots[max(index, 0)]
        if not snapshot.machines:
            # Before this process saw the switch: the first thing it saw is the best there is.
            snapshot = next((s for s in snapshots if s.machines), snapshot)
        holdings = self._holdings
        last = self._contexts.get(lane.name)
        if last is not None and last[0] is snapshot and last[1] is holdings and last[2] == lane:
            return last[3]
        context = Context(
            machines=snapshot.machines,
            policies=snapshot.policies,
            revision=snapshot.revision or None,
            lane=lane,
            holdings=holdings,
        )
        # Of alerts in a row most have the same: whoever remembers what it told of one knows it again.
        self._contexts[lane.name] = (snapshot, holdings, lane, context)
        return context
