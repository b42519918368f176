"""Which witnesses a run of the ledger traces, when there are more than its budget. Pure.

VMs' ports that are in one network and named by the same policies, as sources and as destinations, are
of one class, since nothing but their own flows tells them apart. So a run takes, in this order:

1. each port that changed with one of each class, then one pair of each pair of classes, all cases,
2. each port once as a source and once as a destination, with a few cases: its own flows,
3. all other pairs of ports that changed,
4. all other pairs with a few cases, then with all.

Which pair stands for a class, and where the stages begin, moves on with the number of the run; an eighth of
the budget is always the fourth's, so in time every pair is traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from steering.decide import Subject, find_members, find_subject, order_policies
from steering.expected import BARRED, SHUT_OFF, Kind, Treatment, find_expected
from steering.model import Family, Lane, Machine, Peer, Policy, PolicySet
from steering.witnesses import Case, End, State, Way, Witness, build_cases, find_ends

NEAR = 100  # others that are looked at for a partner

FEW_COST = 8  # traces of the few cases, at most

PairClass = tuple[int, int]
Prospect = tuple[Case, tuple[Treatment, ...]]  # and what must become of it


@dataclass(frozen=True, slots=True)
class Chosen:
    """A witness, the class that it stands for, and what may become of it."""

    witness: Witness
    pair_class: PairClass
    expected: tuple[Treatment, ...]

    @property
    def cost(self) -> int:
        """Traces: of what is inspected the way back, too."""
        return 2 if any(one.kind is Kind.INSPECTED for one in self.expected) else 1


@dataclass(frozen=True, slots=True)
class Sample:
    """What a run traces. ``classes`` and ``pairs`` are all there are; ``without``: VMs that can't be traced."""

    chosen: tuple[Chosen, ...]
    ends: tuple[End, ...]
    classes: int
    pairs: int
    without: tuple[tuple[str, str], ...]
    fingerprints: Mapping[tuple[str, str], int]


@dataclass(slots=True)
class Survey:
    """Ports, their classes, and what follows for pairs of them; what it finds out it remembers."""

    policies: tuple[Policy, ...]
    lanes: tuple[Lane, ...]
    ends: tuple[End, ...]
    subjects: Mapping[str, Subject]
    opens: Mapping[str, int]
    answers: Mapping[str, int]
    quarantined: frozenset[str] = frozenset()
    members: list[list[End]] = field(default_factory=list)
    class_of: dict[int, int] = field(default_factory=dict)
    _cases: dict[tuple[int, int], tuple[Prospect, ...]] = field(default_factory=dict)

    def find_class(self, source: End, destination: End) -> PairClass:
        return self.class_of[source.ofport], self.class_of[destination.ofport]

    def find_cases(self, source: End, destination: End) -> tuple[Prospect, ...]:
        """The cases of a pair and what must become of each."""
        there = self.opens[source.vm_id] & self.answers[destination.vm_id]
        back = self.opens[destination.vm_id] & self.answers[source.vm_id]
        # All that matters of two VMs to their packets is which policies name them, and in which role.
        found = self._cases.get((there, back))
        if found is None:
            concerned = self._select(there | back)
            ends = self.subjects[source.vm_id], self.subjects[destination.vm_id]
            found = self._cases[there, back] = tuple(
                (
                    case,
                    find_expected(concerned, *ends, case, self.lanes),
                )
                for case in build_cases(self._select(there))
            )
        return found

    def is_named(self, source: End, destination: End) -> bool:
        return bool(self.opens[source.vm_id] & self.answers[destination.vm_id])

    def is_barred(self, witness: Witness) -> bool:
        """Whether its sender, if any policy names it, may use no address of the packet's family."""
        sender = witness.sender
        named = self.opens[sender.vm_id] | self.answers[sender.vm_id]
        return bool(named) and witness.case.family in sender.barred

    def _select(self, mask: int) -> tuple[Policy, ...]:
        return tuple(policy for n, policy in enumerate(self.policies) if mask >> n & 1)


def build_survey(
    policies: PolicySet, machines: Sequence[Machine], lanes: Sequence[Lane], ends: tuple[End, ...]
) -> Survey:
    ordered = order_policies(policies.policies)
    opens = dict.fromkeys((machine.vm_id for machine in machines), 0)
    answers = dict(opens)
    found: dict[tuple[Peer, ...], frozenset[str]] = {}
    for number, policy in enumerate(ordered):
        for peers, masks in ((policy.sources, opens), (policy.destinations, answers)):
            if peers not in found:
                found[peers] = find_members(policies, machines, peers)
            for vm_id in found[peers]:
                masks[vm_id] |= 1 << number
    subjects = {vm_id: find_subject(policies, machines, vm_id) for vm_id in opens}
    survey = Survey(ordered, tuple(lanes), ends, subjects, opens, answers, policies.quarantined)
    numbers: dict[tuple[object, int, int], int] = {}
    for end in ends:
        key = (end.network, opens[end.vm_id], answers[end.vm_id])
        number = numbers.setdefault(key, len(numbers))
        if number == len(survey.members):
            survey.members.append([])
        survey.members[number].append(end)
        survey.class_of[end.ofport] = number
    return survey


def choose_witnesses(
    policies: PolicySet,
    machines: Sequence[Machine],
    lanes: Sequence[Lane],
    *,
    run: int,
    budget: int,
    addresses: Mapping[str, Sequence[str]],
    known: Mapping[tuple[str, str], int],
) -> Sample:
    """``known`` are the fingerprints of the last sample: a port that has another one now goes first."""
    declared = {record.vm_id: record.addresses for record in policies.machines}
    ends, without = find_ends(machines, addresses, declared)
    survey = build_survey(policies, machines, lanes, ends)
    fingerprints = {(end.vm_id, end.interface): find_fingerprint(survey, end) for end in ends}
    changed = {
        end.ofport
        for end in ends
        if known and known.get((end.vm_id, end.interface)) != fingerprints[end.vm_id, end.interface]
    }
    pair_classes = list(_find_pair_classes(survey, run))
    classes = sum(len(survey.find_cases(*pair)) for pair in pair_classes)
    most = 2 * max((len(survey.find_cases(*pair)) for pair in pair_classes), default=1)
    tray = _Tray(survey, budget * 5 // 8)  # no stage may take what the later ones need
    for source, destination in _find_changed(survey, changed, run):
        if tray.is_full:
            break
        tray.add_pair(source, destination)
    begin = run * (budget // most) % max(len(pair_classes), 1)
    for source, destination in (*pair_classes[begin:], *pair_classes[:begin]):
        tray.add_pair(source, destination)
    tray.allow(budget * 7 // 8)
    for source, destination in _find_partners(survey, tray, run):
        tray.add_pair(source, destination, few=run)
    networks = _find_networks(ends)
    pairs = sum(len(members) * (len(members) - 1) for members in networks)
    for source, destination in _list_changed(networks, changed):
        if tray.is_full:
            break
        tray.add_pair(source, destination)
    tray.allow(budget)
    steps = max(budget // 8 // FEW_COST, 1)  # so many there is always room for: none is skipped
    for few in (run, None):
        for step in range(pairs):
            if tray.is_full:
                break
            source, destination = _find_pair(networks, (run * steps + step) % pairs)
            tray.add_pair(source, destination, few=few)
    return Sample(tuple(tray.chosen), ends, classes, pairs, without, fingerprints)


def find_fingerprint(survey: Survey, end: End) -> int:
    """Changes with the port itself and with every policy that names its VM."""
    named = (
        tuple(policy for n, policy in enumerate(survey.policies) if mask >> n & 1)
        for mask in (survey.opens[end.vm_id], survey.answers[end.vm_id])
    )
    return hash((end, *named))


class _Tray:
    """Collects witnesses until their traces are as many as the budget."""

    def __init__(self, survey: Survey, budget: int) -> None:
        self._survey = survey
        self._budget = budget
        self._done: set[tuple[int, int, Case]] = set()
        self.chosen: list[Chosen] = []
        self.cost = 0
        self.is_full = False
        self.sources: set[int] = set()
        self.destinations: set[int] = set()

    def allow(self, budget: int) -> None:
        self._budget, self.is_full = budget, False

    def add_pair(self, source: End, destination: End, *, few: int | None = None) -> None:
        """All cases of the pair, or the few of this run."""
        apart = source.network != destination.network
        if self.is_full or apart or source.vm_id == destination.vm_id:
            return
        pair_class = self._survey.find_class(source, destination)
        cases = self._survey.find_cases(source, destination)
        for case, expected in cases if few is None else _select_few(cases, few):
            if (source.ofport, destination.ofport, case) in self._done:
                continue
            witness = Witness(source, destination, case)
            if self._survey.is_barred(witness):
                expected = (BARRED,)
            if not self._survey.quarantined.isdisjoint((source.vm_id, destination.vm_id)):
                expected = (SHUT_OFF,)
            one = Chosen(witness, pair_class, expected)
            if self.cost + one.cost > self._budget:
                self.is_full = True
                return
            self._done.add((source.ofport, destination.ofport, case))
            self.cost += one.cost
            self.chosen.append(one)
            self.sources.add(source.ofport)
            self.destinations.add(destination.ofport)


def _select_few(cases: Sequence[Prospect], run: int) -> Iterator[Prospect]:
    """Four that meet all flows of two ports: in each family a first packet, and an established one each way.

    What is inspected is preferred, since it meets the most.
    """
    one, other = tuple(Family) if run % 2 else tuple(Family)[::-1]
    for family, way, state in (
        (one, Way.OPENER, State.NEW),
        (one, Way.OPENER, State.ESTABLISHED),
        (other, Way.OPENER, State.NEW),
        (other, Way.ANSWER, State.ESTABLISHED),
    ):
        fitting = [
            prospect
            for prospect in cases
            if (prospect[0].family, prospect[0].way, prospect[0].state) == (family, way, state)
        ]
        inspected = [prospect for prospect in fitting if prospect[1][0].kind is Kind.INSPECTED]
        chosen = inspected or fitting
        yield chosen[run % len(chosen)]


def _find_pair_classes(survey: Survey, run: int) -> Iterator[tuple[End, End]]:
    """One pair of each pair of classes between which there is any."""
    for sources in survey.members:
        for destinations in survey.members:
            if sources[0].network != destinations[0].network:
                continue
            count = len(sources) * len(destinations)
            # At most a whole class is one VM's, so a few steps find two that are not.
            for step in range(min(count, len(sources) + len(destinations))):
                place = (run + step) % count
                source = sources[place % len(sources)]
                destination = destinations[(place // len(sources) + place) % len(destinations)]
                if source.vm_id != destination.vm_id:
                    yield source, destination
                    break


def _find_changed(survey: Survey, changed: set[int], run: int) -> Iterator[tuple[End, End]]:
    """Each port that changed with one of each class, both ways."""
    for end in survey.ends:
        if end.ofport not in changed:
            continue
        for members in survey.members:
            others = [other for other in members if other.vm_id != end.vm_id]
            if others and others[0].network == end.network:
                other = others[run % len(others)]
                yield end, other
                yield other, end


def _find_partners(survey: Survey, tray: _Tray, run: int) -> Iterator[tuple[End, End]]:
    """Pairs for the ports that were not yet a source, or not yet a destination; policies' pairs rather."""
    for members in _find_networks(survey.ends):
        # Another beginning in each run, should the budget not do for all.
        begin = run * 997 % len(members)
        turned = [*members[begin:], *members[:begin]]
        for here, end in enumerate(turned):
            others = [*turned[here + 1 :], *turned[:here]]
            for is_source, mine, theirs in (
                (True, tray.sources, tray.destinations),
                (False, tray.destinations, tray.sources),
            ):
                if end.ofport in mine:
                    continue
                found = _find_partner(survey, end, others, theirs, is_source=is_source)
                if found is not None:
                    yield (end, found) if is_source else (found, end)


def _find_partner(
    survey: Survey, end: End, others: Sequence[End], done: set[int], *, is_source: bool
) -> End | None:
    """Of the next ones the first that a policy names and that still lacks its part; else one named; else any."""
    apart = (other for other in others if other.vm_id != end.vm_id)
    near = list(islice(apart, NEAR))
    named = [
        other
        for other in near
        if (survey.is_named(end, other) if is_source else survey.is_named(other, end))
    ]
    return next((other for other in named if other.ofport not in done), (*named, *near, None)[0])


def _find_networks(ends: Sequence[End]) -> list[list[End]]:
    networks: dict[tuple[str, int | None], list[End]] = {}
    for end in ends:
        networks.setdefault(end.network, []).append(end)
    return list(networks.values())


def _find_pair(networks: Sequence[Sequence[End]], place: int) -> tuple[End, End]:
    """Ordered pair number ``place`` of all networks' pairs."""
    for members in networks:
        count = len(members) * (len(members) - 1)
        if place < count:
            source, other = divmod(place, len(members) - 1)
            return members[source], members[other + (other >= source)]
        place -= count
    raise IndexError(place)


def _list_changed(
    networks: Sequence[Sequence[End]], changed: set[int]
) -> Iterator[tuple[End, End]]:
    for members in networks:
        for end in members:
            if end.ofport in changed:
                for other in members:
                    if other is not end:
                        yield end, other
                        yield other, end
