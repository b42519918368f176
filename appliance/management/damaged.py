"""What answers in the place of the management service where its store is damaged: why, and what to do.

Policies and quarantines that can't be trusted are not used, so nothing is told to the switch: it goes on by what it
was told last, with the failure policy in its groups, and lanes inspect as long as `hairpin inspect` runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Never

from appliance.api.control import Unavailable
from appliance.api.documents import (
    ComponentHealth,
    Health,
    HealthComponents,
    HealthProblem,
    HealthSummary,
    RulesHealth,
    build_time,
)
from appliance.version import find_version
from steering.errors import HairpinError

UNKEPT = "not looked after: it goes on by what it was told last"


class DamagedManagement:
    """Implements `appliance.api.control.Control`: it has health; all else raises Unavailable with the fault."""

    def __init__(self, name: str, fault: HairpinError, at: float) -> None:
        self._name = name
        self._fault = fault
        self._at = at

    async def read_health(self) -> Health:
        since = build_time(self._at)
        return Health(
            status="failing",
            name=self._name,
            version=find_version(),
            started_at=since,
            components=HealthComponents(
                switch=ComponentHealth(status="failing", detail=UNKEPT, since=since),
                store=ComponentHealth(status="failing", detail=self._fault.reason, since=since),
                rules=RulesHealth(status="failing", detail="not looked after", since=since),
            ),
            problems=(
                HealthProblem(
                    reason=f"{self._fault.reason}; the switch is {UNKEPT}",
                    mend=self._fault.mend,
                    since=since,
                ),
            ),
        )

    async def read_status(self) -> HealthSummary:
        return HealthSummary(status="failing")

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Never]]:
        if name.startswith("_"):
            raise AttributeError(name)

        async def refuse(*_: object, **__: object) -> Never:
            raise Unavailable(self._fault.reason, self._fault.mend)

        return refuse
