"""Documents read again: only those are looked into that the last text lacked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from steering.documents import MAX_DOCUMENTS, MAX_TEXT_BYTES, Faults, ItemReader, build_mapping
from steering.errors import WrongInput
from steering.fields import MAX_MACHINES, MAX_POLICIES, MAX_ZONES
from steering.model import MachineRecord, PolicySet, Zone
from steering.parse import (
    check_contradictions,
    check_names,
    check_numbers,
    parse_documents,
    parse_objects,
    read_head,
    read_machine,
    read_zone,
)
from steering.parse_policy import Names, read_policy
from steering.pieces import split_list

SOON_CHARACTERS = 512 * 1024
SOON_UNKNOWN = 40
"""What `DocumentReader.read_soon` takes on: about 1 ms of new documents, and a few of listing the old ones."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Known:
    """A document without fault. Of a policy only the head was read: what it names may be gone by now."""

    name: str
    read: MachineRecord | Zone | None
    document: Mapping[str, object] = field(repr=False)


class DocumentReader:
    """`parse_documents` of one text after another; it remembers the documents of the last one.

    As long as no VM changes, ``machines`` of what it returns is the same tuple, and so are ``zones``: what
    was made of them holds. Not for two threads at once.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, _Known] = {}
        self._last = PolicySet()

    def read(self, text: str) -> PolicySet:
        """As `parse_documents`. Raises WrongInput."""
        found = self._read_pieces(text, MAX_DOCUMENTS)
        return parse_documents(text) if found is None else found

    def read_soon(self, text: str) -> PolicySet | None:
        """`read`, if it takes 2 ms at most; None: it would take longer, or there is something to refuse."""
        return self._read_pieces(text, SOON_UNKNOWN) if len(text) <= SOON_CHARACTERS else None

    def _read_pieces(self, text: str, most_unknown: int) -> PolicySet | None:
        """None wherever there is any doubt: the whole is then read at once, and all its faults told."""
        size = len(text) if text.isascii() else len(text.encode(errors="replace"))
        parts = split_list(text) if size <= MAX_TEXT_BYTES else None
        if parts is None or len(parts.items) > MAX_DOCUMENTS:
            return None
        try:
            # Without items it must be sound: that it is a List, of our version, and each key once.
            parse_objects(json.loads(parts.rest, object_pairs_hook=build_mapping))
        except (WrongInput, ValueError):
            return None
        known: dict[bytes, _Known] = {}
        listed: list[_Known] = []
        for raw in parts.items:
            one = self._known.get(raw)
            if one is None:
                most_unknown -= 1
                one = _read_alone(raw) if most_unknown >= 0 else None
                if one is None:
                    return None
            known[raw] = one
            listed.append(one)
        found = self._join(listed)
        if found is not None:
            self._known, self._last = known, found
        return found

    def _join(self, listed: list[_Known]) -> PolicySet | None:
        names, faults = Names(), Faults()
        machines: list[MachineRecord] = []
        zones: list[Zone] = []
        for number, one in enumerate(listed):
            match one.read:
                case MachineRecord() as record:
                    machines.append(record)
                    names.machines[one.name] = names.vm_ids[record.vm_id] = number
                case Zone() as zone:
                    zones.append(zone)
                    names.zones[one.name] = number
                case None:
                    names.policies[one.name] = number
        count = len(machines) + len(zones) + len(names.policies)
        twice = len(names.machines) + len(names.zones) + len(names.policies) != count
        many = (
            len(machines) > MAX_MACHINES
            or len(zones) > MAX_ZONES
            or len(names.policies) > MAX_POLICIES
        )
        if count != len(listed) or twice or many or len(names.vm_ids) != len(machines):
            return None
        check_names(faults, machines, names)
        policies = [
            (number, read_policy(ItemReader(faults, number), one.name, one.document, names))
            for number, one in enumerate(listed)
            if one.read is None
        ]
        sound = [(number, policy) for number, policy in policies if policy is not None]
        found = PolicySet(
            _keep(self._last.machines, machines),
            _keep(self._last.zones, zones),
            tuple(policy for _, policy in sound),
        )
        try:
            check_numbers(faults, sound)
            check_contradictions(faults, found, [number for number, _ in sound])
            faults.raise_any()
        except WrongInput:
            return None
        return found


def _keep(last: tuple[T, ...], now: list[T]) -> tuple[T, ...]:
    """``now``, as the same tuple if it has the same things in it."""
    if len(last) == len(now) and all(a is b for a, b in zip(last, now, strict=True)):
        return last
    return tuple(now)


def _read_alone(raw: bytes) -> _Known | None:
    """A document by itself; None if anything is wrong with it."""
    try:
        value = json.loads(raw, object_pairs_hook=build_mapping)
    except (ValueError, RecursionError):
        return None
    faults = Faults()
    reader = ItemReader(faults, 0)
    head = read_head(reader, value)
    if head is None:
        return None
    kind, name, document = head
    read: MachineRecord | Zone | None = None
    if kind == "VirtualMachine":
        read = read_machine(reader, name, document, Names())
    elif kind == "Zone":
        read = read_zone(reader, name, document)
    try:
        faults.raise_any()
    except WrongInput:
        return None
    if name is None or (kind != "SteeringPolicy" and read is None):
        return None
    return _Known(name, read, document)
