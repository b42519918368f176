"""Would this connection be inspected, by which policy, through which tables, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from steering.decide import (
    NO_POLICY,
    QUARANTINED,
    Connection,
    Subject,
    decide,
    find_lane,
    find_mismatches,
    find_subject,
    order_policies,
)
from steering.documents import show, suggest
from steering.errors import FieldError, WrongInput
from steering.model import (
    Action,
    Deny,
    Inspect,
    Lane,
    Leg,
    Machine,
    OnFailure,
    Policy,
    PolicySet,
    Profile,
)
from steering.services import PORTED

# The tables up to the point where ways part, by their names in the pipeline.
TO_DIRECT = ("CLASSIFY", "GUARD", "DIRECT")
TO_ENDPOINT = ("CLASSIFY", "GUARD", "LEARN", "ENDPOINT")
TO_POLICY = (*TO_ENDPOINT, "CONNECTION", "SENDER", "RECEIVER", "POLICY")


class Verdict(StrEnum):
    INSPECTED = "inspected"
    DIRECT = "direct"
    DENIED = "denied"
    BLIND = "blind"


@dataclass(frozen=True, slots=True)
class Considered:
    """A policy that did not decide, and why."""

    policy: str
    priority: int
    action: Action
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A table of the pipeline, or a place outside the switch (``leg A``, ``service host``)."""

    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


@dataclass(frozen=True, slots=True)
class Explanation:
    """What becomes of a connection, and why.

    ``passed_over`` are the policies that were asked before the one that decided and don't name the
    connection, ``shadowed`` those that name it too but come after; both in the order of asking.
    ``forward`` is the way of what the source sends, ``answers`` that of what comes back; the latter
    is empty where there are none. ``reachable``: the two share a bridge and an access VLAN.
    """

    source: Subject
    destination: Subject
    connection: Connection
    reachable: bool
    verdict: Verdict
    policy: str | None
    priority: int | None
    action: Action | None
    profile: Profile | None
    on_failure: OnFailure | None
    lane: Lane | None
    reason: str
    passed_over: tuple[Considered, ...]
    shadowed: tuple[Considered, ...]
    forward: tuple[Step, ...]
    answers: tuple[Step, ...]

    @property
    def inspected(self) -> bool:
        return self.verdict is Verdict.INSPECTED


def explain(
    policies: PolicySet,
    machines: Sequence[Machine],
    lanes: Sequence[Lane],
    source: str,
    destination: str,
    connection: Connection,
) -> Explanation:
    """Explain the connection that ``source`` opens to ``destination``, each a VM's name or vm-id.

    Raises WrongInput with every fault: a VM that was not found on the switch (path ``source`` or
    ``destination``), the same VM twice, a port where the protocol has none or out of range.
    """
    ends = _find_ends(machines, source, destination, connection)
    opener, answerer = (find_subject(policies, machines, machine.vm_id) for machine in ends)
    decision = decide(policies, machines, opener.vm_id, answerer.vm_id, connection)
    passed_over: list[Considered] = []
    shadowed: list[Considered] = []
    decided = False
    for policy in order_policies(policies.policies):
        if policy is decision.policy:
            decided = True
            continue
        reasons = find_mismatches(policy, opener, answerer, connection)
        if decision.policy is None or not decided:
            passed_over.append(_build_considered(policy, reasons))
        elif not reasons:
            shadowed.append(_build_considered(policy, (f"{decision.policy.name} comes before it",)))
    action = decision.action
    lane = find_lane(lanes, action.profile) if isinstance(action, Inspect) else None
    verdict, reason = _find_verdict(action, lane, decision.reason)
    forward, answers = _build_ways(policies, opener, answerer, action, lane)
    networks = [{(port.bridge, port.tag) for port in machine.ports} for machine in ends]
    reachable = not networks[0].isdisjoint(networks[1])
    if not reachable:
        reason += "; but these VMs share no bridge and VLAN, so nothing passes between them here"
    return Explanation(
        source=opener,
        destination=answerer,
        connection=connection,
        reachable=reachable,
        verdict=verdict,
        policy=decision.policy.name if decision.policy else None,
        priority=decision.policy.priority if decision.policy else None,
        action=action,
        profile=action.profile if isinstance(action, Inspect) else None,
        on_failure=action.on_failure if isinstance(action, Inspect) else None,
        lane=lane,
        reason=reason,
        passed_over=tuple(passed_over),
        shadowed=tuple(shadowed),
        forward=forward,
        answers=answers,
    )


def _build_considered(policy: Policy, reasons: tuple[str, ...]) -> Considered:
    return Considered(policy.name, policy.priority, policy.action, reasons)


def _find_ends(
    machines: Sequence[Machine], source: str, destination: str, connection: Connection
) -> tuple[Machine, Machine]:
    faults: list[FieldError] = []
    found: list[Machine] = []
    for path, said in (("source", source), ("destination", destination)):
        machine = find_machine(machines, said)
        if machine is None:
            near = suggest(said, (machine.name for machine in machines))
            reason = f"no VM on the switch has the name or vm-id {show(said)}{near}"
            faults.append(FieldError(path, reason))
        else:
            found.append(machine)
    if len(found) == 2 and found[0].vm_id == found[1].vm_id:
        faults.append(
            FieldError("destination", "is the source too: a VM reaches itself without us")
        )
    port = connection.destination_port
    if port is not None and connection.protocol not in PORTED:
        faults.append(FieldError("port", f"{connection.protocol} has no ports"))
    elif port is not None and not 0 <= port <= 65_535:
        faults.append(FieldError("port", f"{show(port)} is not between 0 and 65535"))
    if faults:
        raise WrongInput(faults)
    return found[0], found[1]


def find_machine(machines: Sequence[Machine], said: str) -> Machine | None:
    """A found VM by its vm-id or its name."""
    return next((machine for machine in machines if machine.vm_id == said), None) or next(
        (machine for machine in machines if machine.name == said), None
    )


def _find_verdict(action: Action | None, lane: Lane | None, reason: str) -> tuple[Verdict, str]:
    match action:
        case None:
            return Verdict.BLIND, reason
        case Deny():
            return Verdict.DENIED, reason
        case Inspect() if lane is not None:
            return Verdict.INSPECTED, reason
        case Inspect():
            # Refused when applied; and if it ever is, the switch drops what it can't have inspected.
            return Verdict.DENIED, f"{reason}; but no lane has that profile, so it is dropped"
        case _:
            return Verdict.DIRECT, reason


def _build_ways(
    policies: PolicySet,
    opener: Subject,
    answerer: Subject,
    action: Action | None,
    lane: Lane | None,
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    if action is None:
        scoped = [
            any(
                end.is_named_by((*policy.sources, *policy.destinations))
                for policy in policies.policies
            )
            for end in (opener, answerer)
        ]
        return _build_blind_way(*scoped), _build_blind_way(*reversed(scoped))
    if action is QUARANTINED:
        return (Step("CLASSIFY", "dropped: quarantine"),), ()
    to_policy = tuple(Step(table) for table in TO_POLICY)
    if isinstance(action, Inspect) and lane is not None:
        return (
            (*to_policy, *_build_detour(lane, "A", lane.leg_a, "B", lane.leg_b)),
            (*to_policy, *_build_detour(lane, "B", lane.leg_b, "A", lane.leg_a)),
        )
    if isinstance(action, Inspect | Deny):
        drop = Step("POLICY", "drop; answers to connections that the other side opened pass")
        return (*to_policy[:-1], drop), ()
    direct = (*to_policy, Step("COMMIT"), Step("STEER"), Step("DIRECT"))
    return direct, direct


def _build_blind_way(sender_is_named: bool, receiver_is_named: bool) -> tuple[Step, ...]:
    """A VM that no policy names sends direct; one that is named is looked at first."""
    if not sender_is_named:
        return tuple(Step(table) for table in TO_DIRECT)
    tables = TO_POLICY if receiver_is_named else TO_ENDPOINT
    return (*(Step(table) for table in tables), Step("DIRECT", NO_POLICY.partition(":")[0]))


def _build_detour(lane: Lane, first: str, entered: Leg, second: str, left: Leg) -> tuple[Step, ...]:
    queues = ", ".join(map(str, lane.queues))
    return (
        Step("COMMIT"),
        Step("STEER", f"lane {lane.name}, VLAN {lane.vlan}"),
        Step(f"leg {first}", entered.interface),
        Step("service host", f"queue {queues}, engine {lane.name}"),
        Step(f"leg {second}", left.interface),
        Step("CLASSIFY", "from a leg"),
        Step("RETURN"),
        Step("DELIVER"),
    )
