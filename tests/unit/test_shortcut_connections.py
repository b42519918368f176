"""Two learned flows are one connection, with who opened it; whatever the switch lists, and in any order."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.assurance.connections import TakenConnection, find_named, pair_taken
from steering.decide import resolve_machines
from steering.errors import HairpinError
from steering.flows import build_match_id
from steering.model import (
    Family,
    PolicySet,
    PortRange,
    Protocol,
    Service,
    Shortcut,
    Trigger,
)
from steering.pipeline import build_policy_number
from steering.shortcut import (
    Connection,
    Return,
    Taken,
    build_return,
    find_held,
)
from steering.switch.openflow import parse_flow_counter, parse_taken
from tests.support.worlds import build_cut_policy, build_port, build_record

CUT = Shortcut(Trigger.ONE_MEGABYTE, max_flows=50)
PORTS = tuple(build_port(number) for number in (1, 2, 3))


WEB = Service(Protocol.TCP, (PortRange(80, 80),))
POLICIES = PolicySet(
    tuple(build_record(n) for n in (1, 2, 3)),
    (),
    (
        build_cut_policy("backup", CUT),
        build_cut_policy("web", CUT, WEB, source=2, destination=3),
        build_cut_policy("back", CUT, source=3, destination=2),
    ),
)
MACHINES = resolve_machines(POLICIES, PORTS)


def build_flow(
    policy: str,
    source: tuple[int, int],
    destination: tuple[int, int],
    *,
    six: bool = False,
    age: float = 5.0,
    idle: float = 1.0,
    packets: int = 10,
) -> Taken:
    """``source`` and ``destination``: VM and port."""
    (vm, sport), (peer, dport) = source, destination
    base, names = ("fd00::", ("ipv6_src", "ipv6_dst")) if six else ("10.0.0.", ("nw_src", "nw_dst"))
    match = (
        f"{'tcp6' if six else 'tcp'},in_port={vm},dl_dst=02:00:00:00:00:{peer:02x},"
        f"{names[0]}={base}{vm},{names[1]}={base}{peer},tp_src={sport},tp_dst={dport}"
    )
    number = build_policy_number(policy)
    return Taken(build_match_id(match), match, number, age, idle, packets, packets * 100)


def build_both(
    policy: str, source: tuple[int, int], destination: tuple[int, int], *, six: bool = False
) -> tuple[Taken, Taken]:
    return (
        build_flow(policy, source, destination, six=six, age=7.0, idle=3.0, packets=30),
        build_flow(policy, destination, source, six=six, age=6.0, idle=2.0, packets=4),
    )


@pytest.mark.parametrize("six", [False, True])
def test_both_directions_are_one_connection_that_its_policy_tells_the_opener_of(six: bool) -> None:
    flows = build_both("backup", (1, 40_000), (2, 873), six=six)
    (one,) = pair_taken(flows, POLICIES, MACHINES)
    assert pair_taken(flows[::-1], POLICIES, MACHINES) == (one,)
    assert (one.policy, one.trigger) == ("backup", Trigger.ONE_MEGABYTE)
    assert one.family is (Family.IPV6 if six else Family.IPV4)
    assert (one.source.vm, one.source.port, one.source.packets) == ("host-1", 40_000, 30)
    assert (one.destination.vm_id, one.destination.port, one.destination.packets) == (
        "vm-2",
        873,
        4,
    )
    assert (one.age, one.idle, one.packets, one.bytes) == (7.0, 2.0, 34, 3_400)


def test_a_direction_that_stands_alone_is_a_connection_with_the_same_id() -> None:
    forth, back = build_both("backup", (1, 40_000), (2, 873))
    (both,) = pair_taken((forth, back), POLICIES, MACHINES)
    for flow, sent in ((forth, (30, 0)), (back, (0, 4))):
        (one,) = pair_taken((flow,), POLICIES, MACHINES)
        assert (one.id, one.source.vm, one.destination.vm) == (both.id, "host-1", "host-2")
        assert (one.source.packets, one.destination.packets) == sent


def test_the_policy_says_who_opened_it_even_from_a_low_port() -> None:
    (one,) = pair_taken(build_both("web", (3, 80), (2, 79)), POLICIES, MACHINES)
    assert (one.source.vm, one.destination.vm) == ("host-2", "host-3")
    # Where the policy would have it neither way, the lower port is served.
    (one,) = pair_taken(build_both("web", (3, 443), (2, 40_000)), POLICIES, MACHINES)
    assert (one.source.vm, one.destination.port) == ("host-2", 443)


def test_one_tuple_of_two_pairs_of_vms_is_two_connections() -> None:
    """Addresses may be those of two networks."""
    first = build_both("backup", (1, 40_000), (2, 873))
    other = tuple(
        replace(flow, match=flow.match.replace(f"in_port={vm}", "in_port=3"), id=f"0000000{vm}")
        for vm, flow in enumerate(first, 1)
    )
    assert len(pair_taken((*first, *other[:1]), POLICIES, MACHINES)) == 2


def test_a_policy_that_is_gone_and_a_port_that_is_gone_are_told_as_such() -> None:
    (one,) = pair_taken(build_both("withdrawn", (1, 40_000), (2, 873)), POLICIES, MACHINES)
    assert (one.policy, one.trigger, one.source.vm) == (None, None, "host-1")
    (one,) = pair_taken([build_flow("backup", (9, 40_000), (2, 873))], POLICIES, MACHINES)
    assert (one.source.vm_id, one.source.address) == (None, "10.0.0.9")


@pytest.mark.parametrize("match", ["udp,in_port=1", "tcp,in_port=1", "", "tcp,in_port=x,dl_dst=y"])
def test_what_is_no_learned_flow_is_told_and_not_left_out(match: str) -> None:
    with pytest.raises(HairpinError, match="is none that it learns"):
        pair_taken([Taken("0", match, 1, 0.0, 0.0, 0, 0)], POLICIES, MACHINES)


ends = st.tuples(st.sampled_from([1, 2, 3]), st.integers(1, 65_535))
pairs = st.lists(
    st.tuples(st.sampled_from(["backup", "web", "back"]), ends, ends, st.booleans()).filter(
        lambda one: one[1][0] != one[2][0]
    ),
    max_size=12,
    unique_by=lambda one: (one[0], frozenset(one[1:3]), one[3]),
)


@given(pairs, st.randoms(use_true_random=False))
def test_every_flow_is_in_exactly_one_connection_in_any_order(
    wanted: list[tuple[str, tuple[int, int], tuple[int, int], bool]], random: Random
) -> None:
    flows = [flow for *one, six in wanted for flow in build_both(*one, six=six)]
    random.shuffle(flows)
    found = pair_taken(flows, POLICIES, MACHINES)
    assert len(found) == len(wanted)
    parts = [part for one in found for part in one.parts]
    assert sorted(parts) == sorted(flow.id for flow in flows)
    assert sum(one.packets for one in found) == sum(flow.packets for flow in flows)
    assert list(found) == sorted(found, key=lambda one: (-one.age, one.id))


def build_named() -> tuple[TakenConnection, ...]:
    flows = (
        *build_both("backup", (1, 1_000), (2, 873)),
        *build_both("web", (2, 2_000), (3, 80)),
        *build_both("back", (3, 3_000), (2, 9)),
    )
    return pair_taken(flows, POLICIES, MACHINES)


@pytest.mark.parametrize(
    ("wanted", "ports"),
    [
        (Return(), {1_000, 2_000, 3_000}),
        (Return(policies=frozenset({"web"})), {2_000}),
        (Return(vm_ids=frozenset({"vm-3"})), {2_000, 3_000}),
        (Return(vm_ids=frozenset({"vm-3"}), of_policies=frozenset({"back", "backup"})), {3_000}),
        (
            Return(
                connections=frozenset({Connection("", Family.IPV4, "10.0.0.2", 873, "10.0.0.1", 1_000)})
            ),
            {1_000},
        ),
        (Return(vm_ids=frozenset({"vm-9"})), set()),
    ],
)  # fmt: skip
def test_what_a_return_names_is_what_it_deletes(wanted: Return, ports: set[int]) -> None:
    """`find_named` tells what `build_return` does; the test on the switch shows what that does."""
    assert {one.source.port for one in find_named(wanted, build_named())} == ports


def test_of_a_vm_only_the_connections_of_some_policies() -> None:
    wanted = Return(vm_ids=frozenset({"vm-2"}), of_policies=frozenset({"backup"}))
    cookie = f"cookie=0x48500f00{build_policy_number('backup'):08x}/-1,table=25"
    assert build_return(wanted, MACHINES) == (
        f"flow delete {cookie},in_port=2",
        f"flow delete {cookie},dl_dst=02:00:00:00:00:02",
    )
    assert find_held(wanted, POLICIES, MACHINES) == {"backup"}
    everywhere = Return(vm_ids=frozenset({"vm-2"}))
    assert find_held(everywhere, POLICIES, MACHINES) == {"backup", "web", "back"}


LINE = (
    " cookie=0x48500f00{number:08x}, duration={age}s, table=25, n_packets=7, n_bytes=700, "
    "idle_timeout=60, idle_age={idle}, {more}priority=100,{match} actions=load:0x1->NXM_NX_REG7[]"
)


@given(
    st.integers(1, 2**31 - 1),
    st.floats(0, 1e6).map(lambda age: round(age, 3)),
    st.integers(0, 60),
    st.sampled_from(["", "hard_age=3, "]),
)
def test_a_learned_flow_is_read_as_the_package_reads_it(
    number: int, age: float, idle: int, more: str
) -> None:
    match = build_flow("backup", (1, 1), (2, 2)).match
    line = LINE.format(number=number, age=age, idle=idle, more=more, match=match)
    slow = parse_flow_counter(line)
    taken = parse_taken(line)
    assert taken is not None
    assert (taken.match, taken.packets, taken.bytes) == (slow.flow.key.match, 7, 700)
    assert (taken.policy_number, taken.age, taken.idle) == (number, age, idle)
    ended = line.replace(f"cookie=0x48500f00{number:08x}", "cookie=0x48500f0000000000")
    assert parse_taken(ended) is None, "a SYN ended it"
    with pytest.raises(HairpinError):
        parse_taken("no flow at all")
