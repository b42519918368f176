"""Attribution of many alerts: `attribute` asked once for each kind of connection, then remembered.

What `attribute` says depends on the addresses, on the ports only by the ranges that policies name, and
on the time only by when an address changed hands. So an answer holds for every alert of the same
addresses and the same port ranges within the time in which both addresses had one holder. What was told
by a tolerance, or not told for want of a holder, names times and is not remembered. A test holds both
together.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from appliance.alerts.attribute import Attributed, Context, Decide, Seen, attribute
from appliance.alerts.model import Endpoint, Opener
from steering.decide import Subject
from steering.model import Holding, PolicySet

_KEPT = 50_000


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """`Attributed` without what each alert has of its own; compared by identity."""

    source: Subject | None
    destination: Subject | None
    opener: Opener | None
    policy: str | None
    revision: int | None
    reasons: tuple[str, ...]


class Attributor:
    """Not for several threads at once: one for each lane."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self._context: Context | None = None
        self._bounds: tuple[int, ...] = ()
        self._known: dict[tuple[object, ...], tuple[float, float, Attribution]] = {}

    def attribute(self, alert: Seen, context: Context) -> Attribution:
        """As `attribute`."""
        if context is not self._context:
            if not _is_same(context, self._context):
                self._known.clear()
                self._bounds = find_port_bounds(context.policies)
            self._context = context
        key = (
            alert.source_address,
            alert.destination_address,
            self._classify(alert.source_port),
            self._classify(alert.destination_port),
            alert.protocol,
            # The family is that of the addresses; members of an Enum are slow to hash.
            alert.opener is Opener.SOURCE,
            alert.opener is None,
        )
        known = self._known.get(key)
        if known is not None and known[0] <= alert.at < known[1]:
            return known[2]
        found = shorten(attribute(alert, context, self._decide))
        least, most = -math.inf, math.inf
        for address in (alert.source_address, alert.destination_address):
            if address is not None:
                window = find_window(context.holdings.get(address, ()), alert.at)
                if window is None:
                    return found
                least, most = max(least, window[0]), min(most, window[1])
        if len(self._known) >= _KEPT:
            self._known.clear()
        self._known[key] = (least, most, found)
        return found

    def _classify(self, port: int | None) -> int | None:
        return None if port is None else bisect_right(self._bounds, port)


def shorten(found: Attributed) -> Attribution:
    return Attribution(
        _find_subject(found.source),
        _find_subject(found.destination),
        found.opener,
        found.policy,
        found.revision,
        found.reasons,
    )


def find_window(holdings: Sequence[Holding], at: float) -> tuple[float, float] | None:
    """From when until before when the one holding at ``at`` is alone; None where none or several are."""
    then = [h for h in holdings if h.since <= at and (h.until is None or at < h.until)]
    if len(then) != 1:
        return None
    (one,) = then
    least, most = one.since, math.inf if one.until is None else one.until
    for other in holdings:
        if other is one:
            continue
        if other.since > at:
            most = min(most, other.since)
        elif other.until is not None:
            least = max(least, other.until)
    return least, most


def find_port_bounds(policies: PolicySet) -> tuple[int, ...]:
    """Between two of these, in order, no policy tells one destination port from another."""
    bounds = {
        bound
        for policy in policies.policies
        for service in policy.services
        for piece in service.ports
        for bound in (piece.first, piece.last + 1)
    }
    return tuple(sorted(bounds))


def _find_subject(end: Endpoint) -> Subject | None:
    return None if end.vm_id is None else Subject(end.vm_id, end.vm or end.vm_id, end.zones)


def _is_same(one: Context, other: Context | None) -> bool:
    """Whether both are of the same knowledge, by identity: each change of it makes new values."""
    return (
        other is not None
        and one.machines is other.machines
        and one.policies is other.policies
        and one.holdings is other.holdings
        and one.lane == other.lane
        and one.revision == other.revision
    )
