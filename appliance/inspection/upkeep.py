"""Tends a running engine: bounds the files that grow, and looks whether its threads run where they should."""

from __future__ import annotations

import time
from collections.abc import Callable

from appliance.inspection import files
from appliance.inspection.faults import FaultBook
from appliance.inspection.launch import LanePaths
from appliance.inspection.placement import LanePlacement, build_placement, find_placement_faults
from appliance.inspection.process import EngineProcess, read_threads, write_group_nice
from appliance.inspection.publish import Placement
from appliance.inspection.socket import EngineRefused, EngineSilent, EngineSocket

PLACEMENT_PERIOD = 10.0
"""Seconds between two looks at an engine's threads."""
LOST_TOLD_SECONDS = 600.0
"""Seconds after the last EVE file that was deleted unread, until that no longer is a present fault."""


class EngineUpkeep:
    """`eve_limit` in bytes. `note` tells of a fault: its kind, reason and mend; in `faults` it is mended.

    `placed` is where the threads were last seen.
    """

    def __init__(
        self,
        paths: LanePaths,
        eve_limit: int,
        placement: LanePlacement,
        faults: FaultBook,
        note: Callable[[str, str, str], None],
    ) -> None:
        self._paths = paths
        self._eve_limit = eve_limit
        self._placement = placement
        self._faults = faults
        self._note = note
        self._lost_at = 0.0
        self._placed_at = -PLACEMENT_PERIOD
        self.placed = Placement()

    async def tend(self, process: EngineProcess, *, running: bool) -> None:
        """To be called at every beat. `running`: the engine has loaded its rules."""
        if running:
            self._look_at_threads(process)
        files.trim_log(self._paths.log)
        rotated = files.rotate_eve(self._paths.eve, self._eve_limit)
        if rotated or not self._paths.eve.exists():
            await self._reopen_logs()
        else:
            # An engine that was starting could not be asked, and has opened it by itself.
            self._faults.mend("rotation", time.time())
        if lost := files.remove_unread(self._paths.eve):
            self._note(
                "events lost",
                f"{len(lost)} EVE files were deleted unread, the last {lost[-1].name}",
                "see why the management service does not read them (`hairpin doctor`)",
            )
            self._lost_at = time.monotonic()
        elif time.monotonic() - self._lost_at > LOST_TOLD_SECONDS:
            self._faults.mend("events lost", time.time())

    def _look_at_threads(self, process: EngineProcess) -> None:
        """Read back where the threads run. A wrong place costs speed, not inspection: it is told, no more."""
        if time.monotonic() - self._placed_at < PLACEMENT_PERIOD:
            return
        self._placed_at = time.monotonic()
        refused = write_group_nice(process.pid, self._placement.nice)
        seen = read_threads(process.pid)
        self.placed = build_placement(self._placement, seen)
        faults = [*find_placement_faults(self._placement, seen), *filter(None, [refused])]
        if faults:
            mend = (
                "the lane inspects all the same; see what limits this process (cores, CAP_SYS_NICE), or set "
                "inspection.pinned to false or inspection.nice to 0"
            )
            self._note(
                "placement", f"the engine is not placed as it should be: {'; '.join(faults)}", mend
            )
        else:
            self._faults.mend("placement", time.time())

    async def _reopen_logs(self) -> None:
        try:
            await EngineSocket(self._paths.socket).reopen_log_files()
        except (EngineSilent, EngineRefused) as fault:
            # The engine goes on writing to the renamed file: late, not lost. The next beat tries again.
            self._note("rotation", f"the EVE file could not be reopened: {fault.reason}", "")
        else:
            self._faults.mend("rotation", time.time())
