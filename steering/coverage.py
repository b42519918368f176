"""Which pairs of VMs are inspected, which go direct, and which no policy names: the blind spots.

A pair is ordered: it stands for the connections that the source opens, answers included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from steering.decide import QUARANTINED, order_policies
from steering.membership import build_membership
from steering.model import (
    Action,
    Deny,
    Direct,
    Family,
    Inspect,
    Machine,
    Policy,
    PolicySet,
    Protocol,
    Service,
    Shortcut,
)
from steering.services import EVERYTHING, build_space


class Status(StrEnum):
    """What becomes of all that may pass between two VMs.

    ``inspected``: everything that passes is inspected (the rest is denied). ``partial``: some of it, or
    all of it until a connection takes a shortcut.
    ``denied``: nothing passes. Else nothing is inspected: ``direct`` by policies alone, or ``blind``,
    for some of it is named by no policy.
    """

    INSPECTED = "inspected"
    PARTIAL = "partial"
    DIRECT = "direct"
    DENIED = "denied"
    BLIND = "blind"


@dataclass(frozen=True, slots=True)
class ServiceCoverage:
    """What is done with a service of a pair. Action and policy are None for what no policy names."""

    service: Service
    families: tuple[Family, ...]
    action: Action | None
    policy: str | None


@dataclass(frozen=True, slots=True)
class MachineRef:
    vm_id: str
    name: str


@dataclass(frozen=True, slots=True)
class PairCoverage:
    """``services`` are read from the top: the first one that covers a connection decides it.

    ``gap`` says what passes uninspected and why; None where nothing does.
    """

    source: MachineRef
    destination: MachineRef
    status: Status
    services: tuple[ServiceCoverage, ...]
    gap: str | None


@dataclass(frozen=True, slots=True)
class Share:
    """``percent`` of the pairs that can reach each other, rounded down: 100.0 means every one."""

    count: int
    percent: float


@dataclass(frozen=True, slots=True)
class CoverageSummary:
    """Counts of ordered pairs. ``unreachable`` ones share no bridge and VLAN; no share counts them."""

    machines: int
    pairs: int
    inspected: Share
    partial: Share
    direct: Share
    denied: Share
    blind: Share
    unreachable: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """``pairs`` are those that can reach each other, sorted as the machines were."""

    summary: CoverageSummary
    pairs: tuple[PairCoverage, ...]


@dataclass(frozen=True, slots=True)
class _Treatment:
    status: Status
    services: tuple[ServiceCoverage, ...]
    gap: str | None


_SHUT_OFF = _Treatment(
    Status.DENIED, (ServiceCoverage(Service(), tuple(Family), QUARANTINED, None),), None
)


def build_coverage(policies: PolicySet, machines: Sequence[Machine]) -> Coverage:
    """The coverage of every ordered pair of found VMs that share a bridge and an access VLAN.

    Pairs to which the same policies apply are judged once, so the cost is that of listing the pairs.
    """
    ordered = order_policies(policies.policies)
    membership = build_membership(policies.zones, machines)
    opens = {machine.vm_id: 0 for machine in machines}
    answers = dict(opens)
    for number, policy in enumerate(ordered):
        for vm_id in membership.find_members(policy.sources):
            opens[vm_id] |= 1 << number
        for vm_id in membership.find_members(policy.destinations):
            answers[vm_id] |= 1 << number
    refs = {machine.vm_id: MachineRef(machine.vm_id, machine.name) for machine in machines}
    networks = {m.vm_id: frozenset((p.bridge, p.tag) for p in m.ports) for m in machines}
    judged: dict[int, _Treatment] = {}
    pairs: list[PairCoverage] = []
    unreachable = 0
    for source in refs:
        for destination in refs:
            if source == destination:
                continue
            if networks[source].isdisjoint(networks[destination]):
                unreachable += 1
                continue
            applying = opens[source] & answers[destination]
            found = judged.get(applying)
            if not policies.quarantined.isdisjoint((source, destination)):
                found = _SHUT_OFF
            if found is None:
                chosen = [policy for n, policy in enumerate(ordered) if applying >> n & 1]
                found = judged[applying] = _judge(chosen)
            pairs.append(
                PairCoverage(
                    refs[source], refs[destination], found.status, found.services, found.gap
                )
            )
    return Coverage(_summarise(len(refs), pairs, unreachable), tuple(pairs))


def _judge(policies: Sequence[Policy]) -> _Treatment:
    """What these policies, in order, do to a pair that all of them name."""
    left = dict.fromkeys(Family, EVERYTHING)
    services: list[ServiceCoverage] = []
    for policy in policies:
        for service in policy.services:
            space = build_space(service)
            families = tuple(f for f in Family if f in policy.families and left[f] & space)
            if not families:
                continue  # what comes before leaves nothing of it
            services.append(ServiceCoverage(service, families, policy.action, policy.name))
            for family in families:
                left[family] &= ~space
    unnamed = tuple(family for family in Family if left[family])
    if unnamed:
        services.append(ServiceCoverage(Service(), unnamed, None, None))
    return _Treatment(find_status(services), tuple(services), _describe_gap(services))


def find_status(services: Sequence[ServiceCoverage]) -> Status:
    kinds = {type(service.action) for service in services}
    if Inspect in kinds:
        whole = kinds <= {Inspect, Deny} and not any(map(find_shortcut, services))
        return Status.INSPECTED if whole else Status.PARTIAL
    if type(None) in kinds:
        return Status.BLIND
    return Status.DIRECT if Direct in kinds else Status.DENIED


def find_shortcut(one: ServiceCoverage) -> Shortcut | None:
    """How connections of this part may leave inspection; only TCP ones do."""
    if isinstance(one.action, Inspect) and one.service.protocol in (Protocol.ANY, Protocol.TCP):
        return one.action.shortcut
    return None


def _describe_gap(services: Sequence[ServiceCoverage]) -> str | None:
    by_policy: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    parts: list[str] = []
    for one in services:
        if isinstance(one.action, Direct) and one.policy is not None:
            by_policy.setdefault(one.policy, []).append(_describe(one))
            reasons[one.policy] = one.action.reason
    for policy, what in by_policy.items():
        parts.append(f"{', '.join(what)} by policy {policy}: {reasons[policy]}")
    last = services[-1]
    if last.action is None:
        # Of a service of "any", only what the services above it leave over is meant.
        what_else = "any" if len(services) == 1 else "everything else"
        only = "" if len(last.families) == len(Family) else f" {last.families[0]}"
        parts.append(f"{what_else}{only}, which no policy names")
    gaps = [f"goes direct, uninspected: {'; '.join(parts)}"] if parts else []
    cuts = {one.policy: cut for one in services if (cut := find_shortcut(one)) is not None}
    gaps += [
        f"TCP by policy {policy} leaves inspection after {cut.after}, at most {cut.max_flows} "
        "connections at a time"
        for policy, cut in cuts.items()
    ]
    return "; ".join(gaps) or None


def _describe(one: ServiceCoverage) -> str:
    only = "" if len(one.families) == len(Family) else f" {one.families[0]}"
    return f"{one.service}{only}"


def _summarise(machines: int, pairs: Sequence[PairCoverage], unreachable: int) -> CoverageSummary:
    counts = Counter(pair.status for pair in pairs)

    def share(status: Status) -> Share:
        count = counts[status]
        return Share(count, count * 1000 // len(pairs) / 10 if pairs else 0.0)

    return CoverageSummary(
        machines=machines,
        pairs=len(pairs),
        inspected=share(Status.INSPECTED),
        partial=share(Status.PARTIAL),
        direct=share(Status.DIRECT),
        denied=share(Status.DENIED),
        blind=share(Status.BLIND),
        unreachable=unreachable,
    )
