"""Invariants of a compiled program: what must hold of every one, whatever the policies. Pure.

Run before each bundle; a violation is a bug of ours, and nothing is sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from steering.flows import Flow, Program, go_to
from steering.model import Lane, OnFailure
from steering.pipeline import (
    COOKIE_PREFIX,
    GROUP_MASK,
    GROUP_PREFIX,
    Table,
    build_group_id,
    build_steer_key,
)
from steering.reach import find_reached

_RESUBMIT = re.compile(r"resubmit\(,(\d+)\)")
_OUTPUT = re.compile(r"output:(\d+)")
_LEARNED_TABLE = re.compile(r"learn\(table=(\d+)")
_RANK = {table.number: rank for rank, table in enumerate(Table)}


def check_program(program: Program, lanes: Sequence[Lane], canary: int = 0) -> tuple[str, ...]:
    """Every violated invariant as a sentence; empty when all hold. ``canary``: its ofport, 0 without."""
    return (
        *_check_order(program),
        *_check_return(program, lanes),
        *_check_lanes(program, lanes),
        *_check_shortcuts(program, lanes),
        *_check_ownership(program),
        *(_check_canary(program, lanes, canary) if canary > 0 else ()),
    )


def _check_order(program: Program) -> Iterator[str]:
    """Packets move forward through the tables only, so nothing loops (a guess may retry POLICY once)."""
    for flow in program.flows:
        for fault in _find_order_faults(flow.table, flow.actions):
            yield f"{fault}: {flow}"


@lru_cache(maxsize=32_768)
def _find_order_faults(table: Table, actions: str) -> tuple[str, ...]:
    """Remembered, since thousands of flows do the same."""
    faults: list[str] = []
    for number in map(int, _RESUBMIT.findall(actions)):
        if number not in _RANK:
            faults.append(f"resubmits to undeclared table {number}")
        elif _RANK[number] <= _RANK[table.number] and not (table is Table.POLICY is _table(number)):
            faults.append("resubmits backwards")
    return tuple(faults)


def _table(number: int) -> Table:
    return next(table for table in Table if table.number == number)


def _check_return(program: Program, lanes: Sequence[Lane]) -> Iterator[str]:
    """A frame from a leg is delivered or dropped: never steered again, never learned, never flooded."""
    third = _find_third_legs(lanes)
    two = {leg.ofport for lane in lanes for leg in (lane.leg_a, lane.leg_b) if leg.ofport > 0}
    legs = two | third
    for flow in program.flows:
        from_leg = _in_port(flow) in two
        if flow.table is Table.CLASSIFY and from_leg and flow.actions != "resubmit(,60)":
            yield f"a frame from a leg goes elsewhere than to RETURN: {flow}"
        if flow.table is Table.RETURN and flow.actions not in ("drop", "pop_vlan,resubmit(,70)"):
            yield f"RETURN does more than deliver: {flow}"
        if flow.table is Table.DELIVER:
            outputs = {int(port) for port in _OUTPUT.findall(flow.actions)}
            if outputs & legs or not (
                flow.actions == "drop" or re.fullmatch(r"output:\d+", flow.actions)
            ):
                yield f"DELIVER does more than deliver: {flow}"
        elif _OUTPUT.search(flow.actions):
            yield f"outputs outside DELIVER: {flow}"
    missing = legs - {
        port
        for flow in program.flows
        if flow.table is Table.CLASSIFY
        and flow.priority == 300
        and (port := _in_port(flow)) is not None
    }
    for leg in sorted(missing):
        yield f"leg {leg} is not told apart from a VM"


def _find_third_legs(lanes: Sequence[Lane]) -> set[int]:
    return {lane.leg_c.ofport for lane in lanes if lane.leg_c and lane.leg_c.ofport > 0}


def _check_shortcuts(program: Program, lanes: Sequence[Lane]) -> Iterator[str]:
    """A frame from a third leg is delivered, whatever it teaches; nothing else teaches a shortcut."""
    third = _find_third_legs(lanes)
    for flow in program.flows:
        if flow.table is Table.CLASSIFY and _in_port(flow) in third:
            if flow.actions != go_to(Table.LET_GO):
                yield f"a frame from a third leg goes elsewhere than to LET_GO: {flow}"
        elif flow.table is Table.LET_GO:
            if flow.actions != "drop" and _in_port(flow) not in third:
                yield f"takes other frames than a third leg's for let go: {flow}"
        elif "reg9" in flow.actions:
            yield f"says that the engine let a frame go: {flow}"
        elif flow.table is Table.SHORTCUTS:
            yield f"a shortcut that was not learned: {flow}"
        elif flow.table is Table.STEER and "reg9=" in flow.match:
            if flow.actions != go_to(Table.TEACH, Table.DELIVER):
                yield f"steers what came back already: {flow}"
        elif flow.table is Table.TAKE and "tcp_flags=+syn" in flow.match:
            if not flow.actions.endswith(f"set_field:0->reg7,{go_to(Table.CONNECTION)}"):
                yield f"lets a SYN take a shortcut: {flow}"
        elif flow.table is Table.TEACH and not {"reg7", "reg9"} <= set(_fields(flow.match)):
            yield f"teaches what no engine and no policy let go: {flow}"
        if str(Table.SHORTCUTS.number) in _LEARNED_TABLE.findall(flow.actions) and (
            flow.table not in (Table.TAKE, Table.TEACH)
        ):
            yield f"teaches a shortcut outside TEACH: {flow}"


def _fields(match: str) -> Iterator[str]:
    return (part.partition("=")[0] for part in match.split(","))


def _in_port(flow: Flow) -> int | None:
    found = re.search(r"in_port=(\d+)", flow.match)
    return int(found.group(1)) if found else None


def _check_lanes(program: Program, lanes: Sequence[Lane]) -> Iterator[str]:
    """Both directions take one lane with the legs swapped; closed groups have no way past the engine."""
    groups = {group.group_id: group for group in program.groups}
    for lane in lanes:
        for on_failure in OnFailure:
            for answer in (False, True):
                group = groups.get(build_group_id(build_steer_key(lane, on_failure, answer=answer)))
                leg = lane.leg_b if answer else lane.leg_a
                if group is None:
                    yield f"lane {lane.name} has no group for {on_failure}, answers {answer}"
                    continue
                into = [bucket for bucket in group.buckets if "output:" in bucket]
                if leg.ofport > 0 and not (
                    len(into) == 1
                    and f"output:{leg.ofport}" in into[0]
                    and f"watch_port:{leg.ofport}," in into[0]
                    and f"set_field:{0x1000 | lane.vlan}->vlan_vid" in into[0]
                ):
                    yield f"group {group} does not lead into lane {lane.name} by leg {leg.interface}"
                otherwise = [b.partition("actions=")[2] for b in group.buckets if b not in into]
                wanted = "resubmit(,70)" if on_failure is OnFailure.OPEN else "drop"
                if otherwise != [wanted] or group.buckets[: len(into)] != tuple(into):
                    yield f"group {group} does not fail {on_failure}"


def _check_canary(program: Program, lanes: Sequence[Lane], canary: int) -> Iterator[str]:
    """What the canary's port sends goes into a lane by its closed groups, or nowhere."""
    reached = find_reached(program, {"in_port": str(canary)})
    for table in (Table.DIRECT, Table.RETURN, Table.DELIVER):
        if table in reached.tables:
            yield f"the canary's port {canary} reaches {table.name}"
    closed = {
        build_group_id(build_steer_key(lane, OnFailure.CLOSED, answer=answer))
        for lane in lanes
        for answer in (False, True)
    }
    if reached.groups != closed:
        yield f"the canary's port {canary} reaches groups {sorted(reached.groups)}, not {sorted(closed)}"


def _check_ownership(program: Program) -> Iterator[str]:
    seen = set()
    for flow in program.flows:
        if flow.cookie >> 48 != COOKIE_PREFIX:
            yield f"carries a foreign cookie: {flow}"
        if flow.key in seen:
            yield f"stands twice: {flow}"
        seen.add(flow.key)
    for group in program.groups:
        if group.group_id & GROUP_MASK != GROUP_PREFIX:
            yield f"has a foreign id: {group}"
