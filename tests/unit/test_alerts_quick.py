"""The short way into the store says what the reference says, of whatever the engine or an attacker writes."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.alerts.attribute import Context, attribute
from appliance.alerts.attributor import Attributor, find_window, shorten
from appliance.alerts.eve import RAW_LIMIT, parse_event
from appliance.alerts.model import EveAlert, Malformed, Verdict
from appliance.alerts.quick import Sighting, parse_line, parse_quickly, sight
from appliance.management.knowledge import Knowledge, Snapshot
from steering.canary import SID
from steering.decide import decide
from steering.model import (
    Family,
    Holding,
    Inspect,
    Machine,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Profile,
    Protocol,
    Service,
)
from tests.bench.events import Lines
from tests.support.eve import build_eve, render_eve
from tests.support.worlds import LANES

FIELDS = (
    "at",
    "source_address",
    "destination_address",
    "source_port",
    "destination_port",
    "protocol",
    "family",
    "opener",
    "blocked",
    "url",
    "printable",
    "raw",
)


def compare(line: bytes) -> Sighting | None:
    """Both ways of one line; the short one may decline, and must not differ."""
    quick, event = parse_quickly(line), parse_event(line)
    if quick is None:
        return None
    if quick == ():
        assert event is None
        return None
    (seen,) = quick
    assert isinstance(event, EveAlert)
    reference = sight(event)
    for name in FIELDS[:-1]:
        assert getattr(seen, name) == getattr(reference, name), name
    assert seen.raw.decode(errors="replace") == event.raw
    assert seen.known.rule == reference.known.rule
    assert not reference.shrunk
    return seen


def test_what_the_engine_writes_goes_the_short_way_and_means_the_same() -> None:
    lines = [line.rstrip(b"\n") for line in islice(Lines(7), 300)]
    assert all(compare(line) is not None for line in [*lines, render_eve()])


MEMBERS = st.sampled_from([*sorted(build_eve()), "packet", "packet_info", "stream", "verdict"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=40)
    | st.sampled_from(
        ["10.9.0.2", "::ffff:1.2.3.4", "fe80::1%eth0", "to_client", "alert", "ICMPv6"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "src_ip",
                    "src_port",
                    "url",
                    "action",
                    "linktype",
                    "signature_id",
                    "gid",
                    "metadata",
                    "cve",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)


@given(st.dictionaries(MEMBERS, VALUES, max_size=4))
@settings(max_examples=400, deadline=None)
def test_both_ways_agree_on_every_event_that_both_take(changes: dict[str, Any]) -> None:
    compare(json.dumps({**build_eve(), **changes}).encode())


@given(st.binary(max_size=60), st.integers(0, 900))
@settings(max_examples=300, deadline=None)
def test_both_ways_agree_on_damaged_lines(noise: bytes, place: int) -> None:
    line = render_eve()
    damaged = line[:place] + noise.replace(b"\n", b"") + line[place + len(noise) :]
    quick, event = parse_quickly(damaged), parse_event(damaged)
    if quick and isinstance(event, EveAlert):
        compare(damaged)


@pytest.mark.parametrize(
    "line",
    [
        render_eve(timestamp="yesterday"),
        render_eve(src_ip="nowhere"),
        render_eve(alert={"signature_id": "1"}),
        render_eve()[:200],
        b"{}",
    ],
)
def test_what_is_no_event_is_malformed_either_way(line: bytes) -> None:
    assert parse_quickly(line) is None
    (fault,) = parse_line(line)
    assert isinstance(fault, Malformed)


def test_a_canary_and_an_event_beyond_the_limit_are_read_as_a_whole() -> None:
    (canary,) = parse_line(render_eve(alert={"signature_id": SID, "action": "blocked"}))
    assert isinstance(canary, Sighting)
    assert canary.event is not None
    (long,) = parse_line(render_eve(x="y" * RAW_LIMIT))
    assert isinstance(long, Sighting)
    assert long.event is not None
    assert long.shrunk
    assert len(long.raw) <= RAW_LIMIT


# Attribution

PORTS = st.sampled_from([None, 0, 52, 53, 79, 80, 81, 442, 443, 8080, 65535])
ADDRESSES = ("10.9.0.1", "10.9.0.2", "10.9.0.3")
TIMES = st.integers(0, 40).map(float)


@st.composite
def contexts(draw: st.DrawFn) -> Context:
    services = st.builds(
        Service,
        st.sampled_from([Protocol.TCP, Protocol.UDP, Protocol.ANY]),
        st.sampled_from([(), (PortRange(80, 80),), (PortRange(53, 79), PortRange(443, 8079))]),
    )
    peers = st.lists(
        st.sampled_from([Peer(vm=f"vm-{n}") for n in range(4)]), min_size=1, max_size=3
    )
    policies = [
        Policy(
            f"p{n}",
            100 + n,
            tuple(draw(peers)),
            tuple(draw(peers)),
            (draw(services),),
            tuple(Family),
            Inspect(draw(st.sampled_from([Profile.PREVENT, Profile.DETECT])), OnFailure.CLOSED),
        )
        for n in range(draw(st.integers(0, 3)))
    ]
    holdings = {}
    for address in ADDRESSES:
        known = []
        for _ in range(draw(st.integers(0, 3))):
            since = draw(TIMES)
            until = draw(st.none() | TIMES)
            known.append(Holding(address, f"vm-{draw(st.integers(0, 3))}", since, until))
        holdings[address] = tuple(sorted(known, key=lambda one: one.since))
    machines = tuple(Machine(f"vm-{n}", f"web{n}", {}, (), ()) for n in range(3))
    return Context(machines, PolicySet((), (), tuple(policies)), 3, LANES[0], holdings)


@given(
    contexts(),
    st.lists(
        st.tuples(st.sampled_from(ADDRESSES), st.sampled_from(ADDRESSES), PORTS, PORTS, TIMES),
        max_size=30,
    ),
)
@settings(max_examples=150, deadline=None)
def test_what_is_remembered_of_attribution_is_what_it_would_say_again(
    context: Context, packets: list[tuple[str, str, int | None, int | None, float]]
) -> None:
    attributor = Attributor(decide)
    for source, destination, source_port, destination_port, at in packets:
        (seen,) = parse_line(
            render_eve(
                src_ip=source, dest_ip=destination, src_port=source_port, dest_port=destination_port
            )
        )
        assert isinstance(seen, Sighting)
        seen.at = at
        told = attributor.attribute(seen, context)
        expected = shorten(attribute(seen, context, decide))
        for name in ("source", "destination", "opener", "policy", "revision", "reasons"):
            assert getattr(told, name) == getattr(expected, name), name


def test_an_answer_lasts_as_long_as_one_holder_is_alone() -> None:
    held = (Holding("a", "vm-1", 1.0, 10.0), Holding("a", "vm-2", 10.0, None))
    assert find_window(held, 5.0) == (1.0, 10.0)
    assert find_window(held, 10.0) == (10.0, float("inf"))
    assert find_window(held, 0.5) is None
    both = (Holding("a", "vm-1", 1.0, None), Holding("a", "vm-2", 10.0, None))
    assert find_window(both, 5.0) == (1.0, 10.0)
    assert find_window(both, 11.0) is None


def test_the_verdict_of_another_rule_counts() -> None:
    line = render_eve(alert={"signature_id": 5, "action": "allowed"}, verdict={"action": "drop"})
    (seen,) = parse_line(line)
    event = parse_event(line)
    assert isinstance(seen, Sighting)
    assert isinstance(event, EveAlert)
    assert seen.blocked
    assert event.verdict is Verdict.BLOCKED


def test_one_context_is_given_out_until_something_changes() -> None:
    knowledge = Knowledge()
    machines = (Machine("vm-1", "web1", {}, (), ()),)
    knowledge.add(Snapshot(10.0, machines, PolicySet(), 1))
    first = knowledge.find_context(LANES[0], 11.0)
    assert knowledge.find_context(LANES[0], 12.0) is first
    assert knowledge.find_context(LANES[1], 12.0).lane is LANES[1]
    assert knowledge.take_address("10.9.0.1", "vm-1", 12.0)
    second = knowledge.find_context(LANES[0], 11.0)
    assert "10.9.0.1" in second.holdings
    knowledge.add(Snapshot(20.0, machines, PolicySet(), 2))
    assert knowledge.find_context(LANES[0], 21.0).revision == 2
    assert knowledge.find_context(LANES[0], 19.0).revision == 1
