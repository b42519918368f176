"""What the flow records miss, by the switch's own count of what it mirrored."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from appliance.api.documents import FlowAccounting, build_time
from appliance.visibility.state import Sample, build_sample, compare, is_fresh, read_state
from steering.errors import HairpinError

LOOK_SECONDS = 10.0


class FlowAccounts:
    """``state``: what the observer publishes. ``read_mirrored``: packets that the switch mirrored, None: unknown."""

    def __init__(self, state: Path, read_mirrored: Callable[[], int | None]) -> None:
        self._state = state
        self._read_mirrored = read_mirrored
        self._first: Sample | None = None

    def build(self) -> FlowAccounting | None:
        """Since the observer started to be watched; None while nothing can be compared."""
        last, first = self._take_sample(), self._first
        if last is None:
            return None
        if (
            first is None
            or first.started != last.started
            or first.switch_packets > last.switch_packets
        ):
            self._first = last
            return None
        report = compare(first, last)
        return FlowAccounting(
            since=build_time(first.at),
            until=build_time(last.at),
            switch_packets=report.switch_packets,
            recorded_packets=report.seen_packets,
            missed_packets=report.missed_packets,
            missed_percent=min(100.0, report.missed_ratio * 100),
        )

    def _take_sample(self) -> Sample | None:
        switch = self._read_mirrored()
        try:
            state = read_state(self._state)
        except HairpinError:
            return None
        if state is None or switch is None or not is_fresh(state, time.time()):
            return None
        return build_sample(state, switch)

    async def watch(self) -> None:
        """Take the first sample as soon as there is one; until cancelled."""
        while True:
            self.build()
            await asyncio.sleep(LOOK_SECONDS)
