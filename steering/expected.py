"""What must become of a witness: the reference that the switch is held to. Pure.

It reads the policies as `steering.decide` does, packet by packet, and knows nothing of flows: the
compiler can't be wrong here and in the switch alike. To what `decide` says of connections it adds what
docs/pipeline.md says of single packets: whose direction is unknown, and of fragments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from steering.decide import Connection, Subject, find_lane, find_mismatches
from steering.model import (
    Action,
    Deny,
    Direct,
    Family,
    Inspect,
    Lane,
    Leg,
    OnFailure,
    Policy,
    PortRange,
    Profile,
    Protocol,
    Service,
)
from steering.services import covers
from steering.witnesses import EPHEMERAL, Case, Fragment, State, Way

EVERY_PORT = PortRange(0, 0xFFFF)


class Kind(StrEnum):
    INSPECTED = "inspected"
    DIRECT = "direct"
    DENIED = "denied"


@dataclass(frozen=True, slots=True)
class Treatment:
    """What may become of a packet. ``lane``, ``answer`` (by which leg) and ``on_failure``: of INSPECTED.

    ``why``: if it is not a policy's doing.
    """

    kind: Kind
    policy: str | None
    lane: Lane | None = None
    answer: bool = False
    on_failure: OnFailure = OnFailure.CLOSED
    why: str = ""

    @property
    def entry(self) -> Leg | None:
        """The leg by which it enters its lane."""
        if self.lane is None:
            return None
        return self.lane.leg_b if self.answer else self.lane.leg_a

    @property
    def exit(self) -> Leg | None:
        """The leg by which it comes back."""
        if self.lane is None:
            return None
        return self.lane.leg_a if self.answer else self.lane.leg_b

    def __str__(self) -> str:
        named = f"policy {self.policy}" if self.policy is not None else "no policy names it"
        why = self.why or named
        if self.lane is not None and self.entry is not None:
            return (
                f"inspected in lane {self.lane.name} by {self.entry.interface}, "
                f"{self.on_failure} on failure ({why})"
            )
        return f"{self.kind} ({why})"


SHUT_OFF = Treatment(Kind.DENIED, None, why="one of the two VMs is in quarantine")
BARRED = Treatment(Kind.DENIED, None, why="its document gives it no address of this family")


class _Reading(StrEnum):
    """What the switch can know of a packet's direction."""

    OPENER = "opener"
    ANSWER = "answer"
    UNKNOWN = "unknown"  # either
    GUESS = "guess"  # a first packet without a SYN


def find_expected(
    policies: Sequence[Policy],
    source: Subject,
    destination: Subject,
    case: Case,
    lanes: Iterable[Lane],
) -> tuple[Treatment, ...]:
    """What may become of this packet of a connection that ``source`` opens.

    Mostly one; more where policies of one rank take it and none of them is wrong.
    """
    lanes = tuple(lanes)
    # As the opener's: to the port that it is sent to. As an answer: from the port that was opened.
    there, back = (None, None) if case.port is None else (case.port, EPHEMERAL)
    sender, receiver = source, destination
    if case.way is Way.ANSWER:
        sender, receiver, there, back = destination, source, back, there
    opened = _Half(sender, receiver, case, there, lanes, answer=False)
    answered = _Half(receiver, sender, case, back, lanes, answer=True)
    reading = _read_direction(case)
    if reading is _Reading.OPENER:
        found = _find_first(policies, [opened], (Inspect, Direct, Deny), ())
    elif reading is _Reading.ANSWER:
        found = _find_first(policies, [answered], (), (Inspect, Direct, Deny))
    elif reading is _Reading.UNKNOWN:
        found = _find_first(policies, [opened, answered], (Inspect, Deny), (Inspect,))
    else:
        found = _find_first(policies, [opened], (Inspect, Direct, Deny), ()) or _find_first(
            policies, [answered], (), (Inspect,)
        )
    return found or (Treatment(Kind.DIRECT, None),)


def _read_direction(case: Case) -> _Reading:
    if case.state is State.ESTABLISHED:
        return _Reading.ANSWER if case.way is Way.ANSWER else _Reading.OPENER
    if case.fragment is Fragment.LATER:
        # No flags, and in IPv6 no protocol either.
        known = case.protocol is Protocol.TCP and case.family is Family.IPV4
        return _Reading.UNKNOWN if known else _Reading.GUESS
    if case.protocol is Protocol.TCP:
        return _Reading.OPENER if case.state is State.NEW else _Reading.UNKNOWN
    if case.protocol is Protocol.ANY and case.state is State.MIDSTREAM:
        return _Reading.UNKNOWN
    return _Reading.GUESS


@dataclass(frozen=True, slots=True)
class _Half:
    """A packet read as the opener's or as an answer: who opened, who answers, to which port."""

    opener: Subject
    answerer: Subject
    case: Case
    port: int | None
    lanes: tuple[Lane, ...]
    answer: bool

    def find_actions(self, policy: Policy) -> Iterator[Action]:
        """What the policy does with the packet; nothing if it does not name it."""
        case = self.case
        if case.fragment is not Fragment.WHOLE:
            named = self.opener.is_named_by(policy.sources) and self.answerer.is_named_by(
                policy.destinations
            )
            if named and case.family in policy.families:
                yield from find_fragment_actions(policy, case, self.lanes)
            return
        connection = Connection(case.family, case.protocol, self.port)
        if (
            next(iter(find_mismatches(policy, self.opener, self.answerer, connection)), None)
            is None
        ):
            yield policy.action


def _find_first(
    policies: Sequence[Policy],
    halves: Sequence[_Half],
    as_opened: tuple[type, ...],
    as_answered: tuple[type, ...],
) -> tuple[Treatment, ...]:
    """The treatments of the highest rank that takes the packet; at equal priority a deny goes first."""
    best: int | None = None
    found: list[Treatment] = []
    for policy in policies:
        rank = 2 * policy.priority + isinstance(policy.action, Deny)
        if best is not None and rank < best:
            continue
        for half in halves:
            if not isinstance(policy.action, as_answered if half.answer else as_opened):
                continue
            for action in half.find_actions(policy):
                if best is None or rank > best:
                    best, found = rank, []
                treatment = _build_treatment(policy.name, action, half)
                if treatment not in found:
                    found.append(treatment)
    return tuple(found)


def _build_treatment(name: str, action: Action, half: _Half) -> Treatment:
    match action:
        case Deny():
            return Treatment(Kind.DENIED, name)
        case Direct():
            return Treatment(Kind.DIRECT, name)
        case Inspect(profile=profile, on_failure=on_failure):
            lane = find_lane(half.lanes, profile)
            if lane is None:  # never direct for want of a lane
                return Treatment(Kind.DENIED, name)
            return Treatment(Kind.INSPECTED, name, lane, half.answer, on_failure)


def find_fragment_actions(policy: Policy, case: Case, lanes: Sequence[Lane]) -> Iterator[Action]:
    """What a policy that names the pair and the family does with a fragment (docs/pipeline.md).

    A service that covers a whole protocol takes its fragments as it takes the rest, for they tell their
    protocol (in IPv6 only a first one does, so there just "any" is whole). What inspects a part takes
    all that may be of it, in the lane that prevents, and with it those of the policy's other services in
    that family. What denies a part takes all that may be of it; what goes direct takes none.
    """
    older, later = case.family is Family.IPV4, case.fragment is Fragment.LATER
    protocol = Protocol.ANY if later and not older else case.protocol
    inspects = isinstance(policy.action, Inspect)
    parted = any(not _is_told(service, case.family) for service in policy.services)
    for service in policy.services:
        if _is_told(service, case.family) and not (inspects and parted):
            if covers(service, protocol, 0):
                yield policy.action
        elif isinstance(policy.action, Inspect):
            if not older or service.protocol in (protocol, Protocol.ANY):
                prevents = find_lane(lanes, Profile.PREVENT) is not None
                yield (
                    replace(policy.action, profile=Profile.PREVENT) if prevents else policy.action
                )
        elif isinstance(policy.action, Deny) and (
            service.protocol is protocol or protocol is Protocol.ANY
        ):
            yield policy.action


def _is_told(service: Service, family: Family) -> bool:
    every = not service.ports or EVERY_PORT in service.ports
    return every and (family is Family.IPV4 or service.protocol is Protocol.ANY)
