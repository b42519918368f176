"""The coverage ledger: what traces of witness packets show, held against what they must show. Pure.

`steering.witnesses` says which packets are asked about, `steering.expected` what must become of them,
`steering.switch.trace` asks the switch, and this judges the answer. docs/coverage.md says what that
proves and what it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from steering.expected import Kind, Treatment
from steering.flows import FlowKey
from steering.model import Lane, OnFailure
from steering.pipeline import Table
from steering.witnesses import End, TraceRequest, Witness

MAX_LISTED = 100  # violations, gaps and foreign flows that a ledger lists; all are counted


# What a trace shows


@dataclass(frozen=True, slots=True)
class Output:
    """A frame that leaves the switch. ``ofport`` is 0 for a port of another bridge."""

    ofport: int
    name: str
    vlan: int | None = None

    def __str__(self) -> str:
        return self.name if self.vlan is None else f"{self.name} with VLAN {self.vlan}"


@dataclass(frozen=True, slots=True)
class GroupUse:
    """The bucket that a group used (None: none was live), and why those before it were not."""

    group_id: int
    bucket: int | None
    dead: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """Where one packet went.

    ``told`` are the ofports that the tables named; ``normal``: NORMAL took it, ``wide``: to more than
    one port, or by an action that does not tell its port. ``path``: (table, priority, cookie) met.
    ``fault``: why the translation broke off.
    """

    outputs: tuple[Output, ...] = ()
    told: frozenset[int] = frozenset()
    normal: bool = False
    wide: bool = False
    groups: tuple[GroupUse, ...] = ()
    path: tuple[tuple[int, int, int], ...] = ()
    fault: str = ""

    def __str__(self) -> str:
        if self.fault:
            return self.fault
        how = " (flooded)" if self.wide and self.outputs else ""
        return f"to {', '.join(map(str, self.outputs[:8]))}{how}" if self.outputs else "dropped"


# What is judged


class Result(StrEnum):
    INSPECTED = "inspected"
    DIRECT = "direct"
    DENIED = "denied"
    BYPASSED = "bypassed"  # let through by a failure policy, while its lane is down
    BLOCKED = "blocked"  # held back by a failure policy, while its lane is down
    VIOLATION = "violation"


@dataclass(frozen=True, slots=True)
class Verdict:
    """``treatment`` is the one that was met; of a violation, None. ``reason``: of all but the first three."""

    result: Result
    treatment: Treatment | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Violation:
    """A witness that went elsewhere than it must.

    ``source`` opens the connection; ``traced`` is ready for a shell, after `ovs-appctl ofproto/trace`.
    """

    source: str
    destination: str
    family: str
    service: str
    direction: str
    state: str
    expected: str
    seen: str
    traced: str
    reason: str


@dataclass(frozen=True, slots=True)
class Gap:
    """What passes by a failure policy, or can't be judged, and why.

    ``count`` is the witnesses concerned, 0 where none could be traced.
    """

    source: str
    destination: str
    reason: str
    count: int = 0


@dataclass(frozen=True, slots=True)
class ForeignFlow:
    """A flow that is not Hairpin's and may take packets before its flows do."""

    table: int
    flow: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """One run. ``at`` is when it ended, ``seconds`` how long it took.

    ``classes``: of (pair class, family, service, direction, state) there are; ``classes_traced`` of them
    had a witness. ``pairs`` and ``pairs_traced``: ordered pairs of ports. ``traced``: traces made.
    `inspected` to `blocked` and ``violation_count`` add up to the witnesses. Lists are cut at 100. ``by_copy``: a
    copy of the switch was asked.
    """

    at: float
    run: int
    classes: int
    classes_traced: int
    pairs: int
    pairs_traced: int
    traced: int
    inspected: int
    direct: int
    denied: int
    bypassed: int
    blocked: int
    violation_count: int
    violations: tuple[Violation, ...]
    gap_count: int
    gaps: tuple[Gap, ...]
    foreign_count: int
    foreign: tuple[ForeignFlow, ...]
    seconds: float
    by_copy: bool = False

    @property
    def witnesses(self) -> int:
        passed = self.inspected + self.direct + self.denied + self.bypassed + self.blocked
        return passed + self.violation_count


@dataclass(frozen=True, slots=True)
class Scene:
    """What a judge must know of the switch: lanes, which of them forward, and the ports of VMs."""

    lanes: tuple[Lane, ...]
    forwarding: Mapping[str, bool]
    vm_ports: frozenset[int]

    @property
    def legs(self) -> Mapping[int, str]:
        return {
            leg.ofport: leg.interface
            for lane in self.lanes
            for leg in (lane.leg_a, lane.leg_b)
            if leg.ofport > 0
        }

    def is_up(self, treatment: Treatment) -> bool:
        lane, leg = treatment.lane, treatment.entry
        if lane is None or leg is None or leg.ofport <= 0:
            return False
        return self.forwarding.get(lane.name, False)


def judge_entry(
    witness: Witness, expected: Sequence[Treatment], seen: Seen, scene: Scene
) -> Verdict:
    """What the trace of the packet as its sender sends it shows.

    INSPECTED holds only if it also comes back as it must: `judge_return`.
    """
    if seen.fault:
        return Verdict(Result.VIOLATION, None, seen.fault)
    faults: list[str] = []
    for treatment in expected:
        verdict = _judge_one(witness, treatment, seen, scene)
        if verdict.result is not Result.VIOLATION:
            return verdict
        faults.append(verdict.reason)
    return Verdict(Result.VIOLATION, None, "; or ".join(dict.fromkeys(faults)))


def judge_return(witness: Witness, treatment: Treatment, seen: Seen, scene: Scene) -> Verdict:
    """What the trace of the same packet shows as it comes out of the lane."""
    leg = treatment.exit.interface if treatment.exit is not None else "its leg"
    if seen.fault:
        return Verdict(Result.VIOLATION, None, f"back from {leg}: {seen.fault}")
    receiver, frames = witness.receiver, _find_frames(seen, scene)
    if [(frame.ofport, frame.vlan) for frame in frames] == [(receiver.ofport, None)]:
        return Verdict(Result.INSPECTED, treatment)
    return Verdict(
        Result.VIOLATION,
        None,
        f"back from {leg} it must leave once, by {receiver.interface}; it goes {_describe(frames)}",
    )


def _judge_one(witness: Witness, treatment: Treatment, seen: Seen, scene: Scene) -> Verdict:
    frames = _find_frames(seen, scene)
    match treatment.kind:
        case Kind.DENIED:
            if not frames:
                return Verdict(Result.DENIED, treatment)
            return _violated(f"it must be dropped; it goes {_describe(frames)}")
        case Kind.DIRECT:
            return _judge_direct(witness, treatment, seen, frames, scene)
        case Kind.INSPECTED:
            return _judge_inspected(witness, treatment, seen, frames, scene)


def _judge_direct(
    witness: Witness, treatment: Treatment, seen: Seen, frames: Sequence[Output], scene: Scene
) -> Verdict:
    legs = [frame for frame in frames if frame.ofport in scene.legs]
    if legs:
        return _violated(f"it must pass no lane; it goes {_describe(legs)}")
    reached = [frame.ofport for frame in frames].count(witness.receiver.ofport)
    if reached != 1:
        said = "does not reach" if not reached else f"reaches {reached} times"
        return _violated(f"it {said} {witness.receiver.interface}; it goes {_describe(frames)}")
    if len(frames) > 1 and not (seen.normal and seen.wide):
        return _violated(f"it must leave once; it goes {_describe(frames)}")
    return Verdict(Result.DIRECT, treatment)


def _judge_inspected(
    witness: Witness, treatment: Treatment, seen: Seen, frames: Sequence[Output], scene: Scene
) -> Verdict:
    lane, leg = treatment.lane, treatment.entry
    if lane is None or leg is None:
        raise AssertionError(f"{treatment} has no lane")
    went = [(frame.ofport, frame.vlan) for frame in frames]
    if leg.ofport > 0 and went == [(leg.ofport, lane.vlan)]:
        return Verdict(Result.INSPECTED, treatment)
    must = f"it must enter lane {lane.name} by {leg.interface} with VLAN {lane.vlan}, once"
    if scene.is_up(treatment):
        return _violated(f"{must}; it goes {_describe(frames)}")
    why = f"lane {lane.name} is down"
    if not frames and treatment.on_failure is OnFailure.CLOSED:
        return Verdict(Result.BLOCKED, treatment, f"{why}, and policy {treatment.policy} is closed")
    delivered = went == [(witness.receiver.ofport, None)] and not seen.normal and seen.groups
    if delivered and treatment.on_failure is OnFailure.OPEN:
        reason = f"bypassed by failure policy: {why}, and policy {treatment.policy} is open"
        return Verdict(Result.BYPASSED, treatment, reason)
    return _violated(
        f"{must}, or be {treatment.on_failure} while it is down; it goes {_describe(frames)}"
    )


def _violated(reason: str) -> Verdict:
    return Verdict(Result.VIOLATION, None, reason)


def _find_frames(seen: Seen, scene: Scene) -> tuple[Output, ...]:
    """Outputs without the copies that a mirror makes.

    A copy is what no table named, at a port that is neither a VM's nor a leg: mirrors are no flows, so a
    trace shows their copies only among the datapath's actions.
    """
    if seen.wide:
        return seen.outputs
    ours = scene.vm_ports | scene.legs.keys()
    return tuple(one for one in seen.outputs if one.ofport in ours or one.ofport in seen.told)


def _describe(frames: Sequence[Output]) -> str:
    return f"to {', '.join(map(str, frames[:8]))}" if frames else "nowhere"


def build_violation(
    witness: Witness,
    expected: Sequence[Treatment],
    request: TraceRequest,
    seen: Seen,
    reason: str,
) -> Violation:
    case = witness.case
    return Violation(
        source=witness.source.name,
        destination=witness.destination.name,
        family=str(case.family),
        service=case.service,
        direction=str(case.way),
        state=str(case.state),
        expected="; or ".join(map(str, expected)),
        seen=str(seen),
        traced=str(request),
        reason=reason,
    )


# Flows of others


def find_foreign(
    flows: Iterable[tuple[FlowKey, str, str]], ends: Sequence[End], lanes: Sequence[Lane]
) -> tuple[ForeignFlow, ...]:
    """Which of these flows (key, ``in_port`` or "", text), none of them ours, may go before ours.

    In table 0, from 200 up for VMs' packets and from 290 up for others'; in our other tables any may.
    """
    vms = {end.ofport for end in ends}
    legs = {leg.ofport for lane in lanes for leg in (lane.leg_a, lane.leg_b)}
    ours = {table.number: table.name for table in Table}
    found: list[ForeignFlow] = []
    for key, in_port, text in flows:
        if key.table not in ours:
            continue
        if key.table != Table.CLASSIFY.number:
            reason = f"it stands in Hairpin's table {ours[key.table]}"
            found.append(ForeignFlow(key.table, text, reason))
            continue
        port = int(in_port) if in_port.isdecimal() else None
        floor = 300 if port in legs else 200 if port is None or port in vms else 290
        if key.priority >= floor:
            whose = (
                "a leg's" if port in legs else "VMs'" if port in vms or port is None else "others'"
            )
            reason = (
                f"in table 0 it goes before Hairpin's flow for {whose} packets (priority {floor})"
            )
            found.append(ForeignFlow(key.table, text, reason))
    return tuple(found)
