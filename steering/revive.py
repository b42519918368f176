"""Bring a lane back at once when its engine has returned; see `steering.switch.bfd`."""

from __future__ import annotations

from steering.model import Lane
from steering.switch.bfd import restart_sessions
from steering.tls import TlsFiles


class Reviver:
    """``ovsdb`` and ``tls`` as for the `Reconciler`."""

    def __init__(self, ovsdb: str, tls: TlsFiles | None = None) -> None:
        self._ovsdb = ovsdb
        self._tls = tls

    async def revive(self, lane: Lane) -> None:
        """Have the switch look at the lane's path anew. Raises SwitchError."""
        legs = [lane.leg_a.interface, lane.leg_b.interface]
        await restart_sessions(self._ovsdb, legs, self._tls)
