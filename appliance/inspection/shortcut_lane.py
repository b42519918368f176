"""One lane's shortcut as its supervisor keeps it: the file shared with the engine's library, and what is told."""

from __future__ import annotations

import time

import structlog

from appliance.inspection import files
from appliance.inspection.config import FLOW_TIMEOUT
from appliance.inspection.publish import Shortcut
from appliance.inspection.redirect import RedirectReport
from appliance.inspection.shortcut import (
    ALLOWED_SECONDS,
    STATE_SIZE,
    UNTIL_AT,
    build_state_file,
    build_until,
    find_shortcut,
    parse_state_file,
)
from appliance.rules.shortcut import has_marks
from appliance.settings import Settings
from steering.model import Lane

log = structlog.get_logger("inspection.shortcut")


class LaneShortcut:
    """``path`` is the shared file, None where the lane has no third leg: then nothing here does anything."""

    def __init__(self, settings: Settings, lane: Lane, owner: files.Owner) -> None:
        self.path = None if lane.leg_c is None else settings.shortcut_state(lane).absolute()
        self._ruleset = settings.ruleset(lane)
        self._owner = owner
        self._redirection = "device: leg C was not looked at yet"
        self._marks = False

    def write(self) -> None:
        """Before an engine starts, in the lane's directory. Raises OSError."""
        if self.path is not None:
            files.write_state_file(self.path, build_state_file(FLOW_TIMEOUT), self._owner)

    def shut(self) -> None:
        """From now on no connection is let go."""
        self._allow(0.0)

    def take_redirection(self, report: RedirectReport) -> None:
        """Let connections go for some seconds more, where they can leave by leg C and the rules are right."""
        self._redirection = report.off
        self._marks = has_marks(files.read_end(self._ruleset))
        allowed = self._marks and not report.off
        self._allow(time.monotonic() + ALLOWED_SECONDS if allowed else 0.0)

    def find(self, pid: int | None, *, built: bool) -> Shortcut:
        """What to tell; ``pid`` is the engine's, ``built``: the library is there."""
        content = b""
        if self.path is not None:
            content = files.read_state_file(self.path, STATE_SIZE, self._owner)
        return find_shortcut(
            wanted=self.path is not None,
            built=built,
            pid=pid,
            figures=parse_state_file(content),
            rules=self._marks,
            redirection=self._redirection,
        )

    def _allow(self, until: float) -> None:
        if self.path is None:
            return
        try:
            files.write_state_part(self.path, UNTIL_AT, build_until(until), self._owner)
        except OSError as fault:
            # Before the first start there is none. What is not renewed ends by itself, on the safe side.
            log.debug("shortcut's state not written", path=str(self.path), reason=str(fault))
