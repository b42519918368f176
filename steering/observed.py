"""The switch as it was seen last: its ports, its lanes, whether it can be reached; and what is wrong with it.

A view is put in by whoever follows OVSDB; nothing is asked here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from steering.change import SwitchStatus, describe_fail_mode
from steering.compile import find_steerable_ports
from steering.decide import resolve_machines
from steering.events import LaneChanged, SteeringEvent, SwitchChanged
from steering.ghosts import Ghost, build_ghosts, find_fresh
from steering.model import Lane, Observed, PolicySet, Port
from steering.shortcut import find_shortcut_problems
from steering.switch.ovsdb import SwitchView
from steering.widths import find_width_problems


class ObservedSwitch:
    """``on_event`` is told of lanes whose BFD changed, and of a switch that was lost or is back.

    ``clock`` gives seconds since the epoch.
    """

    def __init__(
        self,
        bridge: str,
        lanes: Sequence[Lane],
        on_event: Callable[[SteeringEvent], None],
        clock: Callable[[], float],
    ) -> None:
        self._bridge = bridge
        self._lanes = tuple(lanes)
        self._on_event = on_event
        self._clock = clock
        self._view: SwitchView | None = None
        self._is_view_stale = False
        self._lost: tuple[str, float] | None = ("not connected yet", clock())
        self._forwarding: dict[str, bool] = {}
        self._ghosts: tuple[Ghost, ...] = ()
        self._widths: tuple[SwitchView, PolicySet, tuple[str, ...]] | None = None

    @property
    def view(self) -> SwitchView | None:
        """None: it was never seen."""
        return self._view

    @property
    def is_view_stale(self) -> bool:
        """Whether OVSDB is no longer followed: the view is what it said last."""
        return self._is_view_stale

    @property
    def is_bridge_found(self) -> bool:
        return self._view is not None and self._view.bridge_found

    @property
    def is_lost(self) -> bool:
        return self._lost is not None

    @property
    def observed(self) -> Observed:
        if self._view is None:
            return Observed(lanes=self._lanes)
        fresh = find_fresh(self._ghosts, time.monotonic())
        return replace(self._view.observed, ghosts=tuple(ghost.port for ghost in fresh))

    def is_forwarding(self, lane: Lane) -> bool:
        """Whether BFD passes through the lane's engine, seen from both legs.

        False while the switch is lost: what OVSDB says of BFD then stands still, and may be long past.
        """
        return self._lost is None and self._forwarding.get(lane.name, False)

    def is_down(self, lane: Lane) -> bool:
        """Whether BFD was seen not to pass; not the same as not `is_forwarding`, which is also said

        of a lane that was not looked at yet, and while the switch is lost.
        """
        return self._lost is None and self._forwarding.get(lane.name) is False

    def has_links(self, lane: Lane) -> bool:
        """Whether both legs' links are up; while one is down, nothing brings BFD back."""
        links = {leg.interface: leg.link_up for leg in self._view.legs} if self._view else {}
        return all(links.get(leg.interface, False) for leg in (lane.leg_a, lane.leg_b))

    @property
    def flaps(self) -> dict[str, int]:
        """By lane name: how often BFD changed on its legs since they were set up; from 0 again after a

        restart of the switch. It tells changes that came and went faster than OVSDB told of them.
        """
        count = {leg.interface: leg.flaps for leg in self._view.legs} if self._view else {}
        return {
            lane.name: count.get(lane.leg_a.interface, 0) + count.get(lane.leg_b.interface, 0)
            for lane in self._lanes
        }

    def build_status(self, policies: PolicySet, faults: Sequence[str]) -> SwitchStatus:
        """``policies``: those in force; ``faults``: what else is wrong, with those who ask the switch."""
        view, lost = self._view, self._lost
        problems = view.observed.problems if view is not None else ()
        if view is not None and view.bridge_found and view.fail_mode != "secure":
            problems = (*problems, "; ".join(describe_fail_mode(self._bridge, view.fail_mode)))
        return SwitchStatus(
            reachable=lost is None,
            reason=lost[0] if lost else "",
            since=lost[1] if lost else 0.0,
            fail_mode=view.fail_mode if view else "",
            ovs_version=view.ovs_version if view else "",
            datapath_type=view.datapath_type if view else "",
            problems=(*problems, *self._find_policy_problems(policies), *faults),
        )

    def _find_policy_problems(self, policies: PolicySet) -> tuple[str, ...]:
        """Found once per view and policies: the status is asked for often, and there may be many VMs."""
        view = self._view
        if view is None:
            return ()
        if self._widths is None or self._widths[0] is not view or self._widths[1] is not policies:
            machines, lanes = resolve_machines(policies, view.observed.ports), view.observed.lanes
            found = find_width_problems(
                policies, machines, lanes, view.mtus, super_packets=view.super_packets
            )
            found = (*found, *find_shortcut_problems(policies, lanes, machines))
            self._widths = view, policies, found
        return self._widths[2]

    def take_view(self, view: SwitchView) -> None:
        """OVSDB says this now."""
        self._is_view_stale = False
        before = find_steerable_ports(self.observed)
        self._view = view
        present = find_steerable_ports(view.observed)
        self._ghosts = build_ghosts(self._ghosts, before, present, time.monotonic())
        legs = {leg.interface: leg.forwarding for leg in view.legs}
        for lane in view.observed.lanes:
            up = legs.get(lane.leg_a.interface, False) and legs.get(lane.leg_b.interface, False)
            if self._forwarding.get(lane.name) != up:
                self._forwarding[lane.name] = up
                self._on_event(LaneChanged(self._clock(), lane.name, up))

    def remember(self, known: Iterable[Port]) -> None:
        """Ports that an earlier process steered: those that are gone leave ghosts, as if seen to go now."""
        present = find_steerable_ports(self.observed)
        self._ghosts = build_ghosts(self._ghosts, known, present, time.monotonic())

    def lose_view(self, reason: str) -> None:
        """OVSDB is no longer followed."""
        self._is_view_stale = True
        self.lose(reason)

    def lose(self, reason: str) -> None:
        """The switch can't be reached, or not be kept right."""
        if self._lost is None:
            self._lost = (reason, self._clock())
            self._on_event(SwitchChanged(self._clock(), False, reason))
        elif self._view is None or self._is_view_stale:
            self._lost = (reason, self._lost[1])

    def regain(self) -> None:
        """It can be reached, and is as it should be."""
        if self._lost is not None:
            self._lost = None
            self._on_event(SwitchChanged(self._clock(), True))
