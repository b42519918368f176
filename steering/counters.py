"""What the switch counted, by meaning instead of by flow. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steering.flows import FlowKey
from steering.model import Lane, OnFailure, PolicySet
from steering.pipeline import (
    CookieKind,
    Table,
    build_group_id,
    build_policy_number,
    build_steer_key,
    parse_cookie,
)


@dataclass(frozen=True, slots=True)
class Count:
    """Since the flow or group that counts was installed."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.packets + other.packets, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class LaneCount:
    """Into the lane; passed uninspected because it was down (open policies); come back from it."""

    into: Count
    bypassed: Count
    returned: Count


@dataclass(frozen=True, slots=True)
class Counters:
    """``policies`` by policy name, ``lanes`` by lane name, ``spoofed`` and ``tagged`` by ofport;

    ``strays`` are unicast IP packets in frames for many, of VMs in scope.
    """

    policies: dict[str, Count]
    lanes: dict[str, LaneCount]
    spoofed: dict[int, Count]
    tagged: dict[int, Count]
    strays: Count = Count()


def build_counters(
    flows: Sequence[tuple[FlowKey, int, int, int]],
    groups: Sequence[tuple[int, tuple[tuple[int, int], ...]]],
    policies: PolicySet,
    lanes: Sequence[Lane],
) -> Counters:
    """From (key, cookie, packets, bytes) per flow and (id, (packets, bytes) per bucket) per group."""
    names = {build_policy_number(policy.name): policy.name for policy in policies.policies}
    by_policy = {policy.name: Count() for policy in policies.policies}
    spoofed: dict[int, Count] = {}
    tagged: dict[int, Count] = {}
    returned: dict[int, Count] = {}
    strays = Count()
    for key, cookie, packets, size in flows:
        owner = parse_cookie(cookie)
        if owner is None:
            continue
        kind, number = owner
        count = Count(packets, size)
        if kind is CookieKind.POLICY and key.match.startswith("conj_id=") and number in names:
            by_policy[names[number]] += count
        elif kind is CookieKind.SPOOF:
            spoofed[number] = spoofed.get(number, Count()) + count
        elif kind is CookieKind.TAGGED:
            tagged[number] = tagged.get(number, Count()) + count
        elif kind is CookieKind.STRAY:
            strays += count
        elif kind is CookieKind.LANE and key.table == Table.RETURN.number:
            returned[number] = returned.get(number, Count()) + count
    buckets = dict(groups)
    by_lane: dict[str, LaneCount] = {}
    for lane in lanes:
        into, bypassed = Count(), Count()
        for on_failure in OnFailure:
            for answer in (False, True):
                key_ = build_steer_key(lane, on_failure, answer=answer)
                counted = buckets.get(build_group_id(key_), ())
                leg = lane.leg_b if answer else lane.leg_a
                if leg.ofport > 0 and counted:
                    into += Count(*counted[0])
                    counted = counted[1:]
                for packets, size in counted:
                    bypassed += Count(packets, size)
        by_lane[lane.name] = LaneCount(into, bypassed, returned.get(lane.number, Count()))
    return Counters(by_policy, by_lane, spoofed, tagged, strays)
