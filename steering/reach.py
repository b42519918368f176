"""Where frames of a kind can get to in a compiled program, whatever else is true of them. Pure.

An over-approximation, for invariants: a flow is followed unless what is known of the frame rules its
match out, and lower priorities are followed too, unless what is known makes a match certain. So what
is not reached here is not reached in the switch either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from steering.flows import KEYWORDS, Flow, FlowKey, Program
from steering.model import Protocol
from steering.pipeline import Table

Fields = Mapping[str, str]

_STEP = re.compile(r"resubmit\(,(\d+)\)|ct\(table=(\d+)|set_field:(\w+)->(reg\d)|group:(\d+)")
# What stays true of a frame from table to table, so that having matched it is worth remembering.
_LASTING = ("in_port", "dl_src", "dl_dst", "family", "protocol")


@dataclass(frozen=True, slots=True)
class Reached:
    """Tables and groups (by id) that such frames may meet.

    ``lowest``: by table, the lowest priority whose flows were looked at; other flows have no say in it.
    """

    tables: frozenset[Table]
    groups: frozenset[int]
    lowest: Mapping[int, int] = field(default_factory=dict)

    def depends_on(self, flow: Flow) -> bool:
        """Whether it may be another one with this flow, or without it."""
        table = flow.key.table
        return table in self.lowest and flow.priority >= self.lowest[table]


ALL = 0x1_0000  # above every priority
# One of these, matched whole, rules out nearly every flow of a port.
_TELLING = ("in_port", "reg6", "dl_dst", "dl_src")


@dataclass(frozen=True, slots=True)
class _Entry:
    actions: str
    fields: Fields


@dataclass(slots=True)
class _Level:
    """The flows of one table and priority: by a telling field and its value, and the rest.

    ``unsure``: by telling field those that lead on; while the field is not known, the others lead nowhere.
    """

    rest: dict[FlowKey, _Entry] = field(default_factory=dict)
    bound: dict[tuple[str, str], dict[FlowKey, _Entry]] = field(default_factory=dict)
    unsure: dict[str, dict[FlowKey, _Entry]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rest or self.bound)

    def find(self, frame: Fields) -> Iterator[_Entry]:
        yield from self.rest.values()
        for name, unsure in self.unsure.items():
            found = self.bound.get((name, frame[name]), {}) if name in frame else unsure
            yield from found.values()


class FlowIndex:
    """Flows that frames of a kind may meet, by what may meet them.

    Kept from one program to the next, so a change costs what it changes. ``known``: as for `find_reached`.
    """

    def __init__(self, known: Fields, flows: Iterable[Flow] = ()) -> None:
        self.known = dict(known)
        here = re.escape(self.known["in_port"]) if "in_port" in known else "[^,]*"
        self._other = re.compile(rf"(?:^|,)in_port=(?!{here}(?:,|$))")
        self._tables: dict[int, dict[int, _Level]] = {}
        for flow in flows:
            self.add(flow)

    def add(self, flow: Flow) -> None:
        if self._other.search(flow.match):
            return
        levels = self._tables.setdefault(flow.key.table, {})
        level = levels.setdefault(flow.priority, _Level())
        entry = _Entry(flow.actions, _read_match(flow.match))
        telling = _find_telling(entry.fields)
        if telling is None:
            level.rest[flow.key] = entry
            return
        level.bound.setdefault(telling, {})[flow.key] = entry
        unsure = level.unsure.setdefault(telling[0], {})
        if _STEP.search(flow.actions):
            unsure[flow.key] = entry

    def remove(self, flow: Flow) -> None:
        if self._other.search(flow.match):
            return
        level = self._tables[flow.key.table][flow.priority]
        telling = _find_telling(_read_match(flow.match))
        if telling is None:
            del level.rest[flow.key]
        else:
            del level.bound[telling][flow.key]
            if not level.bound[telling]:
                del level.bound[telling]
            level.unsure[telling[0]].pop(flow.key, None)
        if not level:
            del self._tables[flow.key.table][flow.priority]

    def find_possible(
        self, table: int, frame: Fields, lowest: dict[int, int]
    ) -> Iterator[tuple[str, Fields]]:
        """Actions of each flow that such a frame may meet, and what is known of it then.

        To ``lowest`` is added how far down it was looked (see `Reached`).
        """
        levels = self._tables.get(table, {})
        before, lowest[table] = lowest.get(table, ALL), 0
        for priority in sorted(levels, reverse=True):
            certain = False
            for entry in levels[priority].find(frame):
                met = _compare(entry.fields, frame)
                if met is not False:
                    lasting = {n: entry.fields[n] for n in _LASTING if n in entry.fields}
                    yield entry.actions, {**frame, **lasting}
                certain = certain or met is True
            if certain:
                lowest[table] = min(before, priority)
                return


def _find_telling(fields: Fields) -> tuple[str, str] | None:
    """The telling field of a match, with its value as frames have it."""
    for name in _TELLING:
        value = fields.get(name)
        if value is not None and "/" not in value:
            return name, value if ":" in value else str(int(value, 0))
    return None


def find_reached(program: Program, known: Fields) -> Reached:
    """From CLASSIFY on. ``known``: fields as a match has them, e.g. ``{"in_port": "7"}``."""
    return find_reached_in(FlowIndex(known, program.flows))


def find_reached_in(index: FlowIndex) -> Reached:
    """`find_reached` of the flows of an index."""
    seen: set[tuple[int, frozenset[tuple[str, str]]]] = set()
    groups: set[int] = set()
    lowest: dict[int, int] = {}
    left: list[tuple[int, Fields]] = [(Table.CLASSIFY.number, index.known)]
    while left:
        number, frame = left.pop()
        state = number, frozenset(frame.items())
        if state in seen:
            continue
        seen.add(state)
        for actions, after in index.find_possible(number, frame, lowest):
            for step in _STEP.finditer(actions):
                table, tracked, value, register, group = step.groups()
                if register is not None:
                    after = {**after, register: str(int(value, 0))}
                elif group is not None:
                    groups.add(int(group))
                else:
                    left.append((int(table or tracked), after))
    numbers = {number for number, _ in seen}
    tables = frozenset(t for t in Table if t.number in numbers)
    return Reached(tables, frozenset(groups), lowest)


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
