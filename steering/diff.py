"""(wanted, present) -> the smallest bundle that turns one into the other. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steering.flows import Flow, Present, PresentFlow, Program
from steering.pipeline import DELIVER_GROUP

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
    changes: list[Change] = []
    have_groups = {group.group_id: group for group in present.groups}
    want_groups = {group.group_id: group for group in wanted.groups}
    for group in sorted(wanted.groups, key=lambda group: group.group_id != DELIVER_GROUP):
        old = have_groups.get(group.group_id)
        if old is None:
            changes.append(Change("add", str(group), f"group add {group}"))
        elif old != group:
            changes.append(Change("modify", str(group), f"group mod {group}"))
    have = {flow.key: flow for flow in present.flows}
    want = {flow.key: flow for flow in wanted.flows}
    for key, flow in want.items():
        old_flow = have.get(key)
        if old_flow is None:
            changes.append(Change("add", str(flow), _flow_command("add", flow)))
        elif (old_flow.actions, old_flow.cookie) != (flow.actions, flow.cookie):
            changes.append(Change("modify", str(flow), _flow_command("add", flow)))
    for key, old_flow in have.items():
        if key not in want:
            changes.append(Change("delete", str(old_flow), _delete_flow_command(old_flow)))
    for gone in sorted(have_groups.keys() - want_groups.keys(), key=lambda g: g == DELIVER_GROUP):
        text = str(have_groups[gone])
        changes.append(Change("delete", text, f"group delete group_id={gone}"))
    return Bundle(tuple(changes))


def build_present(program: Program) -> Present:
    """What the switch has once ``program`` was applied to the letter."""
    return Present(
        tuple(PresentFlow(flow.key, flow.actions, flow.cookie) for flow in program.flows),
        program.groups,
    )
