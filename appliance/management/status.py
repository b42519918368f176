"""Health in a word for whoever asks, without a token: looked at once a second at most."""

from __future__ import annotations

import time
from collections.abc import Callable

from appliance.api.documents import Health, HealthSummary

KEPT_SECONDS = 1.0


class StatusCache:
    """``build`` costs reading of files: who may not ask for more must not make it be done at will."""

    def __init__(self, build: Callable[[], Health], clock: Callable[[], float] = time.monotonic):
        self._build = build
        self._clock = clock
        self._kept: tuple[float, HealthSummary] | None = None

    def read(self) -> HealthSummary:
        now = self._clock()
        if self._kept is None or now - self._kept[0] >= KEPT_SECONDS:
            self._kept = (now, HealthSummary(status=self._build().status))
        return self._kept[1]
