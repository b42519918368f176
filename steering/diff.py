"""(wanted, present) -> the smallest bundle that turns one into the other. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from steering.flows import Flow, FlowKey, Group, Present, PresentFlow, Program, sort_flows
from steering.pipeline import DELIVER_GROUP, CookieKind, build_cookie

Kind = Literal["add", "modify", "delete"]


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a plan: what is done, to which flow or group as OVS writes it."""

    kind: Kind
    text: str
    command: str  # the line of `ovs-ofctl bundle` that does it


@dataclass(frozen=True, slots=True)
class Bundle:
    """Changes in the order in which they are sent; one OpenFlow bundle, all or nothing."""

    changes: tuple[Change, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)

    @property
    def text(self) -> str:
        """Input of ``ovs-ofctl bundle SWITCH -`` (ovs-ofctl(8), OpenFlow Switch Bundle Commands)."""
        return "".join(f"{change.command}\n" for change in self.changes)

    def count(self, kind: Kind) -> int:
        return sum(change.kind == kind for change in self.changes)

    def without(self, kind: CookieKind) -> Bundle:
        """The changes but those of flows of this kind."""
        head = f"cookie={build_cookie(kind):#x}"[:-8]  # less the number
        return Bundle(tuple(one for one in self.changes if not one.text.startswith(head)))


def _flow_command(verb: str, flow: Flow | PresentFlow) -> str:
    match = f",{flow.key.match}" if flow.key.match else ""
    head = f"flow {verb} table={flow.key.table},priority={flow.key.priority}{match}"
    if verb == "delete_strict":
        return head
    return f"{head},cookie={flow.cookie:#x},actions={flow.actions}"


def _delete_flow_command(flow: PresentFlow) -> str:
    # The cookie with a full mask: should somebody have replaced our flow by one of theirs, it stays.
    match = f",{flow.key.match}" if flow.key.match else ""
    return (
        f"flow delete_strict cookie={flow.cookie:#x}/-1,table={flow.key.table},"
        f"priority={flow.key.priority}{match}"
    )


def build_bundle(wanted: Program, present: Present) -> Bundle:
    """The changes from ``present`` to ``wanted``, in an order in which none refers to what is not there.

    Groups first (flows point to them), what others watch before what watches it; groups that go, last.
    """
    have = {flow.key: flow for flow in present.flows}
    want = (flow for piece in wanted.pieces for flow in piece.flows)
    return _build(want, have, wanted.groups, present.groups)


def build_change(wanted: Program, standing: Program) -> Bundle:
    """`build_bundle` where the switch has ``standing`` to the letter; looks at other pieces only."""
    before, after = set(standing.pieces), set(wanted.pieces)
    gone = (flow for piece in before - after for flow in piece.flows)
    have = {flow.key: PresentFlow(flow.key, flow.actions, flow.cookie) for flow in gone}
    want = (flow for piece in after - before for flow in piece.flows)
    return _build(want, have, wanted.groups, standing.groups)


def _build(
    want: Iterable[Flow],
    have: Mapping[FlowKey, PresentFlow],
    want_groups: tuple[Group, ...],
    have_groups: tuple[Group, ...],
) -> Bundle:
    changes: list[Change] = []
    if want_groups is not have_groups:
        changes += _build_group_changes(want_groups, have_groups)
    left = dict(have)
    other: dict[Flow, Kind] = {}
    for flow in want:
        old = left.pop(flow.key, None)
        if old is None:
            other[flow] = "add"
        elif (old.actions, old.cookie) != (flow.actions, flow.cookie):
            other[flow] = "modify"
    for flow in sort_flows(other):
        changes.append(Change(other[flow], str(flow), _flow_command("add", flow)))
    for old in sorted(left.values(), key=lambda flow: flow.key):
        changes.append(Change("delete", str(old), _delete_flow_command(old)))
    wanted_ids = {group.group_id for group in want_groups}
    gone = [group for group in have_groups if group.group_id not in wanted_ids]
    for group in sorted(gone, key=lambda group: group.group_id == DELIVER_GROUP):
        text = f"group delete group_id={group.group_id}"
        changes.append(Change("delete", str(group), text))
    return Bundle(tuple(changes))


def _build_group_changes(
    want_groups: tuple[Group, ...], have_groups: tuple[Group, ...]
) -> Iterable[Change]:
    have = {group.group_id: group for group in have_groups}
    for group in sorted(want_groups, key=lambda group: group.group_id != DELIVER_GROUP):
        old = have.get(group.group_id)
        if old is None:
            yield Change("add", str(group), f"group add {group}")
        elif old != group:
            yield Change("modify", str(group), f"group mod {group}")


def build_present(program: Program) -> Present:
    """What the switch has once ``program`` was applied to the letter."""
    return Present(
        tuple(PresentFlow(flow.key, flow.actions, flow.cookie) for flow in program.flows),
        program.groups,
    )
