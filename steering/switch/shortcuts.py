"""Connections that take shortcuts: read from the switch, and sent back to inspection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

from steering.counters import Counters, build_counters, find_tallies
from steering.model import Lane, Machine, PolicySet
from steering.rush import Rush
from steering.shortcut import (
    HOLD_SECONDS,
    Hold,
    Return,
    Taken,
    build_port_return,
    build_return,
    build_untaught,
    find_held,
    has_shortcuts,
)
from steering.switch.openflow import OpenFlowSwitch


class Shortcuts:
    """``lock`` is held by who changes the switch; ``wake`` has the switch looked at again."""

    def __init__(
        self,
        switch: OpenFlowSwitch,
        lock: asyncio.Lock,
        wake: Callable[[], None],
        rush: Rush,
    ) -> None:
        self._switch = switch
        self._lock = lock
        self._wake = wake
        self._rush = rush
        self._hold = Hold()

    async def read(self) -> tuple[Taken, ...]:
        """Each direction by itself. Raises SwitchError."""
        return await self._switch.read_shortcuts()

    async def read_counters(self, policies: PolicySet, lanes: Sequence[Lane]) -> Counters:
        """Of all counters only ``shortcut``: cheap enough for each second. Raises SwitchError."""
        await self._rush.wait_free_async()
        flows = await self._switch.read_take_counters()
        read = [(item.flow.key, item.flow.cookie, item.packets, item.bytes) for item in flows]
        return build_counters(find_tallies(read, (), policies, lanes), policies, lanes)

    def find_untaught(self) -> frozenset[str]:
        """Policies whose connections learn no shortcut now."""
        return self._hold.find_untaught(time.monotonic())

    def hold(self, names: Iterable[str]) -> None:
        held = frozenset(names)
        if held:
            self._hold = self._hold.extend(held, time.monotonic())
            asyncio.get_running_loop().call_later(HOLD_SECONDS + 0.01, self._wake)

    def build_change(self, former: PolicySet, policies: PolicySet) -> tuple[str, ...]:
        """The lines for the bundle of a change of policies; holds what it sends back.

        Whatever a connection was let go under is to be judged by the new policies.
        """
        self.hold(find_held(Return(), policies, ()))
        return build_return(Return(), ()) if has_shortcuts(former, policies) else ()

    async def give_back(
        self, wanted: Return, policies: PolicySet, machines: Sequence[Machine]
    ) -> float:
        """Seconds until the switch had it. Raises SwitchError."""
        began = time.monotonic()
        held = find_held(wanted, policies, machines)
        self.hold(held)
        taken = await self._switch.read_shortcuts() if wanted.ids else ()
        lines = (*build_untaught(held), *build_return(wanted, machines, taken))
        await self._switch.send_lines(lines)
        seconds = time.monotonic() - began
        async with self._lock:
            # A reconcile that was under way may have taught them again meanwhile.
            self.hold(held)
            await self._switch.send_lines(lines)
        return seconds

    async def forget_ports(self, ofports: Sequence[int]) -> None:
        """Ports that are gone, or another VM's now. Raises SwitchError."""
        await self._switch.send_lines(build_port_return(ofports))
