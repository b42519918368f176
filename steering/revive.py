"""Bring a lane back at once when its engine has returned; see `steering.switch.bfd`."""

from __future__ import annotations

from steering.model import Lane
from steering.switch.bfd import restart_sessions


class Reviver:
    """``ovsdb`` as for the `Reconciler`."""

    def __init__(self, ovsdb: str) -> None:
        self._ovsdb = ovsdb

    async def revive(self, lane: Lane) -> None:
        """Have the switch look at the lane's path anew. Raises SwitchError."""
        await restart_sessions(self._ovsdb, [lane.leg_a.interface, lane.leg_b.interface])
