"""A plain bridge in the place of a lane's engine, and a reconciler on a lab where nothing else runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from appliance.lab import LabState
from steering.events import SteeringEvent
from steering.model import PolicySet
from steering.reconcile import Reconciler
from steering.run import run

WIRE = "wire"


@contextmanager
def wire_first_lane(lab: LabState) -> Iterator[None]:
    """Everything that enters the first lane leaves it by the other leg; so BFD calls it forwarding."""
    lane = lab.settings.build_lanes()[0]
    link = ("ip", "-n", lab.service_host, "link")
    run([*link, "add", WIRE, "type", "bridge", "mcast_snooping", "0"])
    run([*link, "set", WIRE, "up"])
    for leg in (lane.leg_a, lane.leg_b):
        run([*link, "set", leg.device, "master", WIRE])
        run([*link, "set", leg.device, "up"])
        run([*link, "set", leg.device, "type", "bridge_slave", "learning", "off"])
    try:
        yield
    finally:
        run([*link, "del", WIRE])


@dataclass
class Follower:
    """A reconciler on the lab's bridge, and all that it told."""

    lab: LabState
    reconciler: Reconciler
    events: list[SteeringEvent] = field(default_factory=list)

    async def wait(self, condition: Callable[[], object], seconds: float = 5.0) -> None:
        """Until the condition is true; fails after the limit."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"not within {seconds} s; told: {self.events[-5:]}"
            await asyncio.sleep(0.02)


@asynccontextmanager
async def follow(
    lab: LabState, policies: PolicySet | None = None, *, keep: bool = False
) -> AsyncIterator[Follower]:
    """``policies`` in force, or none; none afterwards unless the flows are to be kept."""
    settings = lab.settings
    events: list[SteeringEvent] = []
    reconciler = Reconciler(
        ovsdb=lab.ovsdb,
        openflow=lab.openflow,
        bridge="br-int",
        lanes=settings.build_lanes(),
        on_event=events.append,
        canary=settings.canary.interface,
    )
    await reconciler.start(policies or PolicySet())
    follower = Follower(lab, reconciler, events)
    try:
        await follower.wait(lambda: reconciler.status.reachable)
        yield follower
    finally:
        if not keep:
            await reconciler.apply(PolicySet())
        await reconciler.close()
