"""Alerts for exporters: stored straight into a database, numbered by it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from appliance.alerts.attribute import Attributed
from appliance.alerts.eve import parse_event
from appliance.alerts.model import Endpoint, EveAlert, Opener
from appliance.alerts.store import Store
from tests.support.alerts import store_alerts
from tests.support.eve import render_eve
from tests.support.worlds import LANES

ATTRIBUTED = Attributed(
    Endpoint("10.9.0.1", 40000, "vm-1", "web1", ("web",)),
    Endpoint("10.9.0.2", 80, "vm-2", "app1", ("app",)),
    Opener.SOURCE,
    "web-to-app",
    7,
    (),
)


class Alerts:
    """A store with a producer of alerts and the notice of new ones that exporters wait for."""

    def __init__(self, path: Path) -> None:
        self.store = Store(path)
        self.latest = 0
        self._condition = asyncio.Condition()
        event = parse_event(render_eve())
        assert isinstance(event, EveAlert)
        self._event = event

    async def add(self, count: int, event: EveAlert | None = None) -> None:
        stored = [(event or self._event, ATTRIBUTED, LANES[0])] * count
        await self.store.write_alerts(lambda write: store_alerts(write, stored))
        async with self._condition:
            self.latest += count
            self._condition.notify_all()

    async def wait_newer(self, last_id: int) -> int:
        async with self._condition:
            await self._condition.wait_for(lambda: self.latest > last_id)
            return self.latest
