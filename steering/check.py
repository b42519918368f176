"""Invariants of a compiled program: what must hold of every one, whatever the policies. Pure.

Run before each bundle; a violation is a bug of ours, and nothing is sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache

from steering.flows import Flow, FlowKey, Piece, Program, go_to
from steering.model import Lane, OnFailure
from steering.pipeline import (
    COOKIE_PREFIX,
    GROUP_MASK,
    GROUP_PREFIX,
    Register,
    Table,
    build_group_id,
    build_steer_key,
)
from steering.reach import FlowIndex, Reached, find_reached_in

_RESUBMIT = re.compile(r"resubmit\(,(\d+)\)")
_OUTPUT = re.compile(r"output:(\d+)")
_LEARNED_TABLE = re.compile(r"learn\(table=(\d+)")
_CONJUNCTION = "conj_id="
_RANK = {table.number: rank for rank, table in enumerate(Table)}


def check_program(program: Program, lanes: Sequence[Lane], canary: int = 0) -> tuple[str, ...]:
    """Every violated invariant as a sentence; empty when all hold. ``canary``: its ofport, 0 without."""
    return Checker().check(program, lanes, canary)


class Checker:
    """`check_program` of one program after another: of each only the pieces that the last one lacked.

    It holds what the invariants ask of all flows together: who has which key, and what may meet which.
    """

    def __init__(self) -> None:
        self._legs = _Legs()
        self._pieces: frozenset[Piece] = frozenset()
        self._keys: set[FlowKey] = set()
        self._conjunctions: dict[str, FlowKey] = {}
        self._canary = 0
        self._index = FlowIndex({})
        self._reached: Reached | None = None

    def check(self, program: Program, lanes: Sequence[Lane], canary: int = 0) -> tuple[str, ...]:
        """As `check_program`."""
        legs = _find_legs(lanes)
        if (legs, canary) != (self._legs, self._canary):
            self._legs, self._canary = legs, canary
            self._forget()
        faults = (
            *self._follow(program),
            *_check_legs(self._keys, legs),
            *_check_lanes(program, lanes),
            *_check_groups(program),
            *(_check_canary(self._find_reached(), lanes, canary) if canary > 0 else ()),
        )
        if faults:
            self._forget()  # what was passed as sound is all that may be left out the next time
        return faults

    def _forget(self) -> None:
        self._pieces, self._keys, self._conjunctions = frozenset(), set(), {}
        self._reached = None
        # Registers begin as 0; what the others carry is set on the way, if at all.
        begins = {Register.SHORTCUT.value: "0", Register.LET_GO.value: "0"}
        self._index = FlowIndex({"in_port": str(self._canary), **begins})

    def _find_reached(self) -> Reached:
        if self._reached is None:
            self._reached = find_reached_in(self._index)
        return self._reached

    def _note(self, flow: Flow) -> None:
        """A flow came or went: where the canary gets to is found anew if that may change it."""
        if self._reached is not None and self._reached.depends_on(flow):
            self._reached = None

    def _follow(self, program: Program) -> Iterator[str]:
        pieces = frozenset(program.pieces)
        if len(pieces) != len(program.pieces):
            yield "a piece stands twice"
        for piece in self._pieces - pieces:
            for flow in piece.flows:
                self._keys.discard(flow.key)
                if flow.match.startswith(_CONJUNCTION):
                    self._conjunctions.pop(flow.match, None)
                self._index.remove(flow)
                self._note(flow)
        for piece in pieces - self._pieces:
            for flow in piece.flows:
                if flow.key in self._keys:
                    yield f"stands twice: {flow}"
                    continue
                self._keys.add(flow.key)
                if flow.match.startswith(_CONJUNCTION):
                    yield from self._check_conjunction(flow)
                self._index.add(flow)
                self._note(flow)
                yield from _check_flow(flow, self._legs)
        self._pieces = pieces

    def _check_conjunction(self, flow: Flow) -> Iterator[str]:
        """OVS looks a met conjunction's id up in the whole table, not at the priority of its clauses."""
        if self._conjunctions.setdefault(flow.match, flow.key) != flow.key:
            yield f"two policies have one conjunction: {flow}"


def _check_flow(flow: Flow, legs: _Legs) -> Iterator[str]:
    if flow.cookie >> 48 != COOKIE_PREFIX:
        yield f"carries a foreign cookie: {flow}"
    # Packets move forward through the tables only, so nothing loops (a guess may retry POLICY once).
    for fault in _find_order_faults(flow.key.table, flow.actions):
        yield f"{fault}: {flow}"
    yield from _check_return(flow, legs)
    yield from _check_shortcut(flow, legs.third)


@lru_cache(maxsize=32_768)
def _find_order_faults(table: int, actions: str) -> tuple[str, ...]:
    """Remembered, since thousands of flows do the same."""
    faults: list[str] = []
    for number in map(int, _RESUBMIT.findall(actions)):
        if number not in _RANK:
            faults.append(f"resubmits to undeclared table {number}")
        elif _RANK[number] <= _RANK[table] and not (table == number == Table.POLICY.number):
            faults.append("resubmits backwards")
    return tuple(faults)


@dataclass(frozen=True, slots=True)
class _Legs:
    """Ofports. ``two``: of legs A and B, from which frames only return; ``third``: of legs C."""

    two: frozenset[int] = frozenset()
    third: frozenset[int] = frozenset()


def _find_legs(lanes: Sequence[Lane]) -> _Legs:
    two = frozenset(leg.ofport for lane in lanes for leg in (lane.leg_a, lane.leg_b))
    third = frozenset(lane.leg_c.ofport for lane in lanes if lane.leg_c is not None)
    return _Legs(two - {0, -1}, third - {0, -1})


def _check_return(flow: Flow, legs: _Legs) -> Iterator[str]:
    """A frame from a leg is delivered or dropped: never steered again, never learned, never flooded."""
    if (
        flow.table is Table.CLASSIFY
        and flow.actions != "resubmit(,60)"
        and _in_port(flow) in legs.two
    ):
        yield f"a frame from a leg goes elsewhere than to RETURN: {flow}"
    if flow.table is Table.RETURN and flow.actions not in ("drop", "pop_vlan,resubmit(,70)"):
        yield f"RETURN does more than deliver: {flow}"
    if flow.table is Table.DELIVER:
        outputs = {int(port) for port in _OUTPUT.findall(flow.actions)}
        if outputs & (legs.two | legs.third) or not (
            flow.actions == "drop" or re.fullmatch(r"output:\d+", flow.actions)
        ):
            yield f"DELIVER does more than deliver: {flow}"
    elif "output:" in flow.actions and _OUTPUT.search(flow.actions):
        yield f"outputs outside DELIVER: {flow}"


def _check_legs(keys: Set[FlowKey], legs: _Legs) -> Iterator[str]:
    for leg in sorted(legs.two | legs.third):
        if FlowKey(Table.CLASSIFY.number, 300, f"in_port={leg}") not in keys:
            yield f"leg {leg} is not told apart from a VM"


def _check_shortcut(flow: Flow, third: frozenset[int]) -> Iterator[str]:
    """A frame from a third leg is delivered, whatever it teaches; nothing else teaches a shortcut."""
    if flow.table is Table.CLASSIFY and _in_port(flow) in third:
        if flow.actions != go_to(Table.LET_GO):
            yield f"a frame from a third leg goes elsewhere than to LET_GO: {flow}"
    elif flow.table is Table.LET_GO:
        if flow.actions != "drop" and _in_port(flow) not in third:
            yield f"takes other frames than a third leg's for let go: {flow}"
    elif "->reg9" in flow.actions or "NXM_NX_REG9" in flow.actions:
        yield f"says that the engine let a frame go: {flow}"
    elif flow.table is Table.SHORTCUTS:
        yield f"a shortcut that was not learned: {flow}"
    elif flow.table is Table.STEER and "reg9=" in flow.match:
        if flow.actions != go_to(Table.TEACH, Table.DELIVER):
            yield f"steers what came back already: {flow}"
    elif flow.table is Table.TAKE and "tcp_flags=+syn" in flow.match:
        if not re.fullmatch(r"learn\([^()]*\),learn\([^()]*\)", flow.actions):
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


def _check_canary(reached: Reached, lanes: Sequence[Lane], canary: int) -> Iterator[str]:
    """What the canary's port sends goes into a lane by its closed groups, or nowhere."""
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


def _check_groups(program: Program) -> Iterator[str]:
    for group in program.groups:
        if group.group_id & GROUP_MASK != GROUP_PREFIX:
            yield f"has a foreign id: {group}"
