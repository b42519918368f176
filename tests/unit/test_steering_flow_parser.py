"""Dumps are read the same whether a line was seen before or not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from steering.compile import compile_program
from steering.decide import resolve_machines
from steering.switch.openflow import _PLAIN, FlowParser, parse_flow, parse_flow_counter
from tests.golden.test_flows import build_actions
from tests.support.pipeline_doc import build_example
from tests.support.worlds import LANES, build_port
from tests.unit.test_steering_shun import POLICIES

PROGRAM = compile_program(
    POLICIES, resolve_machines(POLICIES, tuple(map(build_port, (1, 2)))), LANES
)
LINES = [str(flow) for flow in PROGRAM.flows]


def with_stats(line: str, seconds: int, packets: int) -> str:
    """As dump-flows writes it."""
    head, rest = line.split(", table=")
    table, match = rest.split(", ", 1)
    return (
        f" {head}, duration={seconds}.5s, table={table}, n_packets={packets}, n_bytes={packets * 60}, "
        f"idle_age={seconds}, hard_age={seconds}, {match}"
    )


DUMPS = st.lists(
    st.tuples(st.sampled_from(LINES), st.integers(0, 99), st.integers(0, 9**9)), max_size=30
)


@given(DUMPS)
def test_a_line_means_the_same_the_second_time(dump: list[tuple[str, int, int]]) -> None:
    parser = FlowParser()
    lines = [with_stats(*one) for one in dump]
    expected = tuple(map(parse_flow_counter, lines))
    assert parser.parse(lines) == expected
    assert parser.parse(lines) == expected


def test_the_same_flow_is_known_with_and_without_statistics() -> None:
    parser = FlowParser()
    plain = parser.parse(f" {line}" for line in LINES)
    counted = parser.parse(with_stats(line, 3, 7) for line in LINES)
    assert [one.flow for one in plain] == [one.flow for one in counted]
    assert all(one.flow is other.flow for one, other in zip(plain, counted, strict=True))
    assert {(one.packets, one.bytes) for one in counted} == {(7, 420)}


def test_compiled_flows_are_taken_apart_as_the_package_does() -> None:
    lines = [*LINES, *map(str, build_actions().flows), *map(str, build_example().flows)]
    for line in lines:
        assert _PLAIN.fullmatch(f" {line}"), "the short way is taken"
        assert parse_flow(f" {line}") == parse_flow_counter(f" {line}").flow


def test_other_flows_are_left_to_the_package() -> None:
    for line, priority, match in (
        (" cookie=0x0, table=0, ip actions=drop", 32768, "ip"),
        (" cookie=0x1, table=40, hard_timeout=5, priority=9,tcp actions=drop", 9, "tcp"),
        (" cookie=0x1, table=40, send_flow_rem priority=9,tcp actions=drop", 9, "tcp"),
    ):
        assert _PLAIN.fullmatch(line) is None
        assert parse_flow(line).key[1:] == (priority, match)


def test_what_is_gone_is_forgotten() -> None:
    parser = FlowParser()
    parser.parse(f" {line}" for line in LINES)
    parser.parse([f" {LINES[0]}"])
    assert len(parser._known) == 1
