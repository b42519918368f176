"""Faults as a lane's supervisor keeps them: one for each kind, kept a while after it was mended."""

from __future__ import annotations

from appliance.inspection.publish import Fault

KEPT = 600.0
"""Seconds for which a mended fault is still told."""
MOST = 32


class FaultBook:
    """The faults of one subject, by kind. Times are passed in, in seconds since the epoch."""

    def __init__(self) -> None:
        self._faults: dict[str, Fault] = {}

    def note(self, kind: str, reason: str, mend: str, now: float) -> None:
        """Something is wrong; told again, it keeps the time of its beginning."""
        present = self._faults.pop(kind, None)
        open_since = present.since if present is not None and present.mended is None else now
        self._faults[kind] = Fault(reason=reason, mend=mend, since=open_since)
        while len(self._faults) > MOST:
            self._faults.pop(next(iter(self._faults)))

    def note_mended(self, kind: str, reason: str, mend: str, now: float) -> None:
        """Something was wrong and was mended at once."""
        self.note(kind, reason, mend, now)
        self.mend(kind, now)

    def mend(self, kind: str, now: float) -> None:
        present = self._faults.get(kind)
        if present is not None and present.mended is None:
            self._faults[kind] = present.model_copy(update={"mended": now})

    def build(self, now: float) -> tuple[Fault, ...]:
        """What is to be told: open faults, and those mended not long ago."""
        return tuple(
            fault
            for fault in self._faults.values()
            if fault.mended is None or now - fault.mended <= KEPT
        )
