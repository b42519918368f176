"""Whom a lane serves, and whether it forwards: views of policies and reconciler for the proofs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from appliance.assurance.failures import Concerned
from steering.decide import find_members
from steering.model import Inspect, Machine, OnFailure, PolicySet
from steering.reconcile import Reconciler


def find_concerned(policies: PolicySet, machines: Sequence[Machine], lane: str) -> Concerned:
    """The policies that inspect by the lane of that name, and the VMs that they name. Pure."""
    modes: dict[OnFailure, list[str]] = {mode: [] for mode in OnFailure}
    members: set[str] = set()
    for policy in policies.policies:
        if isinstance(policy.action, Inspect) and str(policy.action.profile) == lane:
            modes[policy.action.on_failure].append(policy.name)
            members |= find_members(policies, machines, (*policy.sources, *policy.destinations))
    return Concerned(
        open=tuple(sorted(modes[OnFailure.OPEN])),
        closed=tuple(sorted(modes[OnFailure.CLOSED])),
        vms=tuple(machine.name for machine in machines if machine.vm_id in members),
    )


class Forwarding(Mapping[str, bool]):
    """By lane name, as it is whenever it is read."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler

    def __getitem__(self, name: str) -> bool:
        for lane in self._reconciler.lanes:
            if lane.name == name:
                return self._reconciler.is_forwarding(lane)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter([lane.name for lane in self._reconciler.lanes])

    def __len__(self) -> int:
        return len(self._reconciler.lanes)
