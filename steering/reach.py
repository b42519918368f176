"""Where frames of a kind can get to in a compiled program, whatever else is true of them. Pure.

An over-approximation, for invariants: a flow is followed unless what is known of the frame rules its
match out, and lower priorities are followed too, unless what is known makes a match certain. So what
is not reached here is not reached in the switch either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from steering.flows import KEYWORDS, Flow, Program
from steering.model import Protocol
from steering.pipeline import Table

Fields = Mapping[str, str]

_STEP = re.compile(r"resubmit\(,(\d+)\)|ct\(table=(\d+)|set_field:(\w+)->(reg\d)|group:(\d+)")
# What stays true of a frame from table to table, so that having matched it is worth remembering.
_LASTING = ("in_port", "dl_src", "dl_dst", "family", "protocol")


@dataclass(frozen=True, slots=True)
class Reached:
    """Tables and groups (by id) that such frames may meet."""

    tables: frozenset[Table]
    groups: frozenset[int]


def find_reached(program: Program, known: Fields) -> Reached:
    """From CLASSIFY on. ``known``: fields as a match has them, e.g. ``{"in_port": "7"}``."""
    flows: dict[int, list[Flow]] = {}
    for flow in program.flows:  # sorted by table and falling priority
        flows.setdefault(flow.table.number, []).append(flow)
    seen: set[tuple[int, frozenset[tuple[str, str]]]] = set()
    groups: set[int] = set()
    left: list[tuple[int, Fields]] = [(Table.CLASSIFY.number, dict(known))]
    while left:
        number, frame = left.pop()
        state = number, frozenset(frame.items())
        if state in seen:
            continue
        seen.add(state)
        for actions, after in _find_possible(flows.get(number, ()), frame):
            for step in _STEP.finditer(actions):
                table, tracked, value, register, group = step.groups()
                if register is not None:
                    after = {**after, register: str(int(value, 0))}
                elif group is not None:
                    groups.add(int(group))
                else:
                    left.append((int(table or tracked), after))
    numbers = {number for number, _ in seen}
    return Reached(frozenset(t for t in Table if t.number in numbers), frozenset(groups))


def _find_possible(flows: Sequence[Flow], frame: Fields) -> Iterator[tuple[str, Fields]]:
    """Actions of each flow that such a frame may meet, and what is known of it then."""
    for flow in flows:
        fields = _read_match(flow.match)
        met = _compare(fields, frame)
        if met is not False:
            lasting = {name: fields[name] for name in _LASTING if name in fields}
            yield flow.actions, {**frame, **lasting}
        if met:
            return


def _compare(fields: Fields, frame: Fields) -> bool | None:
    """Whether the frame matches; None while too little is known of it."""
    sure = True
    for name, wanted in fields.items():
        if name not in frame:
            # A register that nothing wrote could be 0 only, but this asks less of the reader.
            sure = False
        elif not _is_equal(wanted, frame[name]):
            return False
    return True if sure else None


def _is_equal(wanted: str, value: str) -> bool:
    if value.isdecimal():
        want, _, mask = wanted.partition("/")
        bits = int(mask, 0) if mask else 0xFFFF_FFFF
        return int(value) & bits == int(want, 0) & bits
    return wanted == value


def _read_match(match: str) -> dict[str, str]:
    """``tcp,in_port=3`` -> ``{"family": "ipv4", "protocol": "tcp", "in_port": "3"}``."""
    fields: dict[str, str] = {}
    for part in filter(None, match.split(",")):
        name, _, value = part.partition("=")
        if value:
            fields[name] = value
        elif name == "arp":
            fields["family"] = name
        else:
            fields |= _KEYWORD_FIELDS[name]
    return fields


_KEYWORD_FIELDS = {
    keyword: {"family": str(family)}
    | ({} if protocol is Protocol.ANY else {"protocol": str(protocol)})
    for family, keywords in KEYWORDS.items()
    for protocol, keyword in keywords.items()
}
