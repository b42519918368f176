"""The ledger's reference against compiled programs, run by the simulator: two readings of one document."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from steering.compile import compile_program
from steering.decide import resolve_machines
from steering.ledger import GroupUse, Output, Result, Scene, Seen, judge_entry, judge_return
from steering.model import Family, PolicySet, Protocol
from steering.sampling import Chosen, Sample, choose_witnesses
from steering.witnesses import EPHEMERAL, NUMBERS, Fragment, State, Way, Witness
from tests.support.simulator import Conntrack, Frame, Journey, Simulator
from tests.support.worlds import LANES, build_port, policy_sets

PORTS = tuple(build_port(number) for number in range(1, 7))
LEGS = frozenset(leg.ofport for lane in LANES for leg in (lane.leg_a, lane.leg_b))
UP = Scene(LANES, {"prevent": True, "detect": True}, frozenset(range(1, 7)))
DOWN = replace(UP, forwarding={})
# Shrinking would walk hundreds of witnesses each time; what fails names the one witness anyway.
many = settings(
    max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
runs = st.integers(0, 1000)


def choose(policies: PolicySet, *, run: int = 0, budget: int = 1_000_000) -> Sample:
    machines = resolve_machines(policies, PORTS)
    return choose_witnesses(
        policies, machines, LANES, run=run, budget=budget, addresses={}, known={}
    )


def build_frame(witness: Witness) -> Frame:
    case = witness.case
    older = case.family is Family.IPV4
    number = NUMBERS[case.protocol][0 if older else 1]
    if not older and case.fragment is Fragment.LATER:
        number = 17  # conntrack knows the datagram; the tables don't, and the simulator hides it
    there, back = (0, 0) if case.port is None else (case.port, EPHEMERAL)
    if case.way is Way.ANSWER:
        there, back = back, there
    # The switch reads a fragment's ports as 0 (ovs-ofctl(8), set-frags).
    ports = (back, there) if case.fragment is Fragment.WHOLE else (0, 0)
    return Frame(
        in_port=witness.sender.ofport,
        dl_src=witness.sender.mac,
        dl_dst=witness.receiver.mac,
        ip=4 if older else 6,
        protocol=number,
        tp_src=ports[0],
        tp_dst=ports[1],
        syn=case.protocol is Protocol.TCP
        and case.state is State.NEW
        and case.fragment is not Fragment.LATER,
        ack=case.state is not State.NEW,
        fragment={Fragment.WHOLE: "no", Fragment.FIRST: "first", Fragment.LATER: "later"}[
            case.fragment
        ],
    )


def send(simulator: Simulator, chosen: Chosen, frame: Frame) -> Seen:
    """As the real switch's trace shows it: NORMAL knows where each VM is."""
    simulator.conntrack = Conntrack()
    if chosen.witness.case.state is State.ESTABLISHED:
        answer = chosen.witness.case.way is Way.ANSWER
        key = Conntrack.reverse(frame) if answer else Conntrack.key(frame)
        simulator.conntrack.opened[key] = chosen.witness.source.ofport
    journey: Journey = simulator.send(frame)
    outputs = [Output(port, f"port {port}", vlan) for port, vlan in journey.outputs]
    if journey.normal:
        outputs.append(Output(chosen.witness.receiver.ofport, "receiver"))
    return Seen(
        outputs=tuple(outputs),
        normal=journey.normal,
        groups=tuple(GroupUse(group, 0) for group in journey.groups),
    )


def judge(simulator: Simulator, chosen: Chosen, scene: Scene) -> Result:
    frame = build_frame(chosen.witness)
    verdict = judge_entry(chosen.witness, chosen.expected, send(simulator, chosen, frame), scene)
    treatment = verdict.treatment
    if verdict.result is Result.INSPECTED and treatment is not None:
        assert treatment.lane is not None
        assert treatment.exit is not None
        back = replace(frame, in_port=treatment.exit.ofport, vlan=treatment.lane.vlan)
        seen = send(simulator, chosen, back)
        verdict = judge_return(chosen.witness, treatment, seen, scene)
    assert verdict.result is not Result.VIOLATION, f"{chosen}: {verdict.reason}"
    return verdict.result


def can_simulate(chosen: Chosen) -> bool:
    case = chosen.witness.case
    # The simulator's conntrack calls other protocols invalid, always.
    return case.protocol in (Protocol.TCP, Protocol.UDP, Protocol.ICMP) or (
        case.protocol is Protocol.ANY and case.state is State.MIDSTREAM
    )


@many
@given(policy_sets(), runs)
def test_what_is_compiled_meets_what_is_expected(policies: PolicySet, run: int) -> None:
    program = compile_program(policies, resolve_machines(policies, PORTS), LANES)
    simulator = Simulator(program)
    results = {
        judge(simulator, chosen, UP)
        for chosen in choose(policies, run=run, budget=400).chosen
        if can_simulate(chosen)
    }
    assert results <= {Result.INSPECTED, Result.DIRECT, Result.DENIED}


@many
@given(policy_sets(), runs)
def test_with_dead_lanes_nothing_is_inspected_and_policies_say_what_passes(
    policies: PolicySet, run: int
) -> None:
    program = compile_program(policies, resolve_machines(policies, PORTS), LANES)
    simulator = Simulator(program, dead=LEGS)
    for chosen in choose(policies, run=run, budget=300).chosen:
        if can_simulate(chosen):
            assert judge(simulator, chosen, DOWN) is not Result.INSPECTED


@many
@given(policy_sets(), runs, st.integers(50, 3_000))
def test_a_sample_keeps_its_budget_and_is_the_same_again(
    policies: PolicySet, run: int, budget: int
) -> None:
    sample = choose(policies, run=run, budget=budget)
    assert sum(chosen.cost for chosen in sample.chosen) <= budget
    assert sample.chosen == choose(policies, run=run, budget=budget).chosen
    asked = [
        (c.witness.source.ofport, c.witness.destination.ofport, c.witness.case)
        for c in sample.chosen
    ]
    assert len(set(asked)) == len(asked), "no witness is traced twice"


@many
@given(policy_sets())
def test_with_budget_enough_every_pair_and_class_is_traced(policies: PolicySet) -> None:
    sample = choose(policies)
    pairs = {(c.witness.source.ofport, c.witness.destination.ofport) for c in sample.chosen}
    assert len(pairs) == sample.pairs == 30
    assert len({(c.pair_class, c.witness.case) for c in sample.chosen}) == sample.classes
