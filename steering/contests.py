"""Two VMs that claim one address: found from the claims as they are seen. Pure.

A VM that moved an address from another says just what one that steals it says, so it is told, not judged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeVar

CONTEST_SECONDS = 600.0
HELD_LIMIT = 20_000
TOLD_LIMIT = 2_000

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Claims:
    """Who claimed each address last (address -> vm-id), and which contests were told when

    ((address, holder, claimant) -> seconds of the clock that ``now`` is of). Both oldest first.
    """

    holders: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    told: Mapping[tuple[str, str, str], float] = field(default_factory=lambda: MappingProxyType({}))


def record_claim(
    claims: Claims, address: str, claimant: str, present: Collection[str], now: float
) -> tuple[Claims, str | None]:
    """The claims after this one, and the holder with whom it is contested, if that is to be told.

    ``present``: vm-ids on the switch; who is not there any more does not contest. Each pair and
    address is told once in CONTEST_SECONDS, whichever of the two claims.
    """
    holder = claims.holders.get(address)
    if holder == claimant:
        return claims, None
    after = replace(claims, holders=_put(claims.holders, address, claimant, HELD_LIMIT))
    if holder is None or holder not in present:
        return after, None
    pair = address, min(holder, claimant), max(holder, claimant)
    last = claims.told.get(pair)
    if last is not None and 0 <= now - last < CONTEST_SECONDS:
        return after, None
    return replace(after, told=_put(claims.told, pair, now, TOLD_LIMIT)), holder


def _put(former: Mapping[Key, Value], key: Key, value: Value, limit: int) -> Mapping[Key, Value]:
    kept = {one: what for one, what in former.items() if one != key}
    kept[key] = value
    while len(kept) > limit:
        del kept[next(iter(kept))]
    return MappingProxyType(kept)
