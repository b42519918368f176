"""What the switch counted, by meaning instead of by flow. Pure.

A `Tally` is one counter of the switch: a flow's or a group's bucket's. Each is reset by itself (a group's
when the group is modified, all when the switch restarts), so growth is made from tallies
(`steering.accounting`), and `Counters` are their sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

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
    """Since the flow or group that counts was installed, or since another reading."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.packets + other.packets, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Tally:
    """One counter. ``name`` is the same in each reading; ``kind`` and ``key`` say what it counts,

    e.g. ``into`` and ``prevent``, ``spoofed`` and ``7``.
    """

    name: str
    kind: str
    key: str | int
    count: Count


@dataclass(frozen=True, slots=True)
class LaneCount:
    """What was steered to the lane's groups; of that: into the lane; passed uninspected because it was

    down (open policies); dropped because it was down (closed ones). ``returned`` came back from it.
    What the groups count is from the same packets as ``steered``, but each may start anew by itself.
    """

    steered: Count = Count()
    into: Count = Count()
    bypassed: Count = Count()
    blocked: Count = Count()
    returned: Count = Count()


@dataclass(frozen=True, slots=True)
class Counters:
    """``policies`` by policy name, ``lanes`` by lane name, ``spoofed`` and ``tagged`` by ofport;

    ``strays`` are unicast IP packets in frames for many, of VMs in scope. ``canary_port``: what entered
    the switch by the canary's port; ``canary``, by lane name: what of it was steered into that lane.
    ``ghosts``: dropped since it was from or to a VM in scope whose port is gone.
    ``claims``, by the ofport of an address's holder (0: it is gone): dropped ARP and ND of others that
    claimed an address which the documents give to the holder's VM.
    ``unread``, by the sender's ofport: dropped unicast frames between VMs in scope that are neither IP nor
    ARP. ``quarantined``, by ofport: dropped since it was from or to a quarantined VM. ``shunned``, by
    policy: dropped by the switch since the engine had blocked its flow, of flows that are shunned now.
    ``many``: broadcast and multicast of VMs in scope, which went direct; without ARP and ND.
    ``shortcut``, by policy: delivered uninspected, since their connections took a shortcut.
    """

    policies: dict[str, Count]
    lanes: dict[str, LaneCount]
    spoofed: dict[int, Count]
    tagged: dict[int, Count]
    strays: Count = Count()
    canary_port: Count = Count()
    canary: dict[str, Count] = field(default_factory=dict)
    ghosts: Count = Count()
    claims: dict[int, Count] = field(default_factory=dict)
    unread: dict[int, Count] = field(default_factory=dict)
    quarantined: dict[int, Count] = field(default_factory=dict)
    shunned: dict[str, Count] = field(default_factory=dict)
    many: Count = Count()
    shortcut: dict[str, Count] = field(default_factory=dict)
    tallies: tuple[Tally, ...] = ()


# Back from a lane: by one of its two legs, or by the third.
_RETURNED = (Table.RETURN.number, Table.LET_GO.number)


def find_tallies(
    flows: Sequence[tuple[FlowKey, int, int, int]],
    groups: Sequence[tuple[int, tuple[tuple[int, int], ...]]],
    policies: PolicySet,
    lanes: Sequence[Lane],
) -> Iterator[Tally]:
    """From (key, cookie, packets, bytes) per flow and (id, (packets, bytes) per bucket) per group."""
    names = {build_policy_number(policy.name): policy.name for policy in policies.policies}
    lane_names = {lane.number: lane.name for lane in lanes}
    for key, cookie, packets, size in flows:
        meaning = _find_meaning(key, cookie, names, lane_names)
        if meaning is not None:
            name = f"{meaning[0]} {meaning[1]}: {key.table}/{key.priority}/{key.match}"
            yield Tally(name, *meaning, Count(packets, size))
    counted = dict(groups)
    for lane in lanes:
        for on_failure in OnFailure:
            for answer in (False, True):
                group = build_group_id(build_steer_key(lane, on_failure, answer=answer))
                buckets = counted.get(group, ())
                # The last bucket is for a lane that is down; without its leg a lane has no other.
                last = "bypassed" if on_failure is OnFailure.OPEN else "blocked"
                kinds = ("into", last)[-len(buckets) :]
                for kind, (packets, size) in zip(kinds, buckets, strict=False):
                    name = f"{kind} {lane.name}: {group:#x}"
                    yield Tally(name, kind, lane.name, Count(packets, size))


def _find_meaning(
    key: FlowKey, cookie: int, policies: dict[int, str], lanes: dict[int, str]
) -> tuple[str, str | int] | None:
    owner = parse_cookie(cookie)
    if owner is None:
        return None
    kind, number = owner
    table = key.table
    match kind:
        case CookieKind.POLICY if key.match.startswith("conj_id=") and number in policies:
            return "policies", policies[number]
        case CookieKind.SPOOF:
            return "spoofed", number
        case CookieKind.TAGGED:
            return "tagged", number
        case CookieKind.STRAY:
            return "strays", ""
        case CookieKind.CLAIM:
            return "claims", number
        case CookieKind.UNREAD:
            return "unread", number
        case CookieKind.SHUN if number in policies:
            return "shunned", policies[number]
        case CookieKind.SHORTCUT if table == Table.TAKE.number and number in policies:
            return "shortcut", policies[number]
        case CookieKind.QUARANTINE:
            return "quarantined", number
        case CookieKind.MANY:
            return "many", ""
        case CookieKind.GHOST:
            return "ghosts", ""
        case CookieKind.LANE if table in _RETURNED and number in lanes:
            return "returned", lanes[number]
        case CookieKind.LANE if table == Table.STEER.number and number in lanes:
            return "steered", lanes[number]
        case CookieKind.CANARY if table == Table.CLASSIFY.number:
            return "canary_port", ""
        case CookieKind.CANARY if table == Table.POLICY.number and number in lanes:
            return "canary", lanes[number]
    return None


def build_counters(
    tallies: Iterable[Tally], policies: PolicySet, lanes: Sequence[Lane]
) -> Counters:
    """The sums. Every policy and lane is in them, with 0 where nothing was counted."""
    return add_tallies(
        tuple(tallies), [policy.name for policy in policies.policies], [lane.name for lane in lanes]
    )


def add_tallies(
    tallies: tuple[Tally, ...], policies: Iterable[str], lanes: Iterable[str]
) -> Counters:
    """`build_counters` by the names of policies and lanes."""
    sums: dict[tuple[str, str | int], Count] = {}
    for tally in tallies:
        meaning = tally.kind, tally.key
        sums[meaning] = sums.get(meaning, Count()) + tally.count

    def find(kind: str, key: str = "") -> Count:
        return sums.get((kind, key), Count())

    def find_ports(wanted: str) -> dict[int, Count]:
        return {int(key): count for (kind, key), count in sums.items() if kind == wanted}

    lanes = tuple(lanes)
    return Counters(
        policies={name: find("policies", name) for name in policies},
        lanes={
            name: LaneCount(
                *(find(k, name) for k in ("steered", "into", "bypassed", "blocked", "returned"))
            )
            for name in lanes
        },
        spoofed=find_ports("spoofed"),
        tagged=find_ports("tagged"),
        strays=find("strays"),
        canary_port=find("canary_port"),
        canary={name: find("canary", name) for name in lanes},
        ghosts=find("ghosts"),
        claims=find_ports("claims"),
        unread=find_ports("unread"),
        quarantined=find_ports("quarantined"),
        shunned={str(key): count for (kind, key), count in sums.items() if kind == "shunned"},
        many=find("many"),
        shortcut={name: find("shortcut", name) for name in policies},
        tallies=tallies,
    )
