"""What one lane's engine is started on: its files, its configuration and its command, and the test of these."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from appliance.inspection import config as engine_config
from appliance.inspection import engine, files
from appliance.inspection.placement import LanePlacement
from appliance.inspection.publish import write_atomically
from appliance.inspection.shortcut_lane import LaneShortcut
from appliance.paths import find_queue_library
from appliance.settings import Settings
from steering.errors import HairpinError
from steering.model import Lane
from steering.run import run_async

TEST_LIMIT = 300.0
"""Seconds that `suricata -T` may take."""


@dataclass(frozen=True, slots=True)
class LanePaths:
    """Where a lane's files are."""

    directory: Path
    config: Path
    log: Path
    eve: Path
    socket: Path
    record: Path


def find_lane_paths(settings: Settings, lane: Lane) -> LanePaths:
    """`record` is not in the engine's directory: the engine must not say who is adopted."""
    directory = settings.lane_dir(lane).absolute()
    return LanePaths(
        directory=directory,
        config=directory / "suricata.yaml",
        log=directory / "engine.log",
        eve=settings.eve_file(lane).absolute(),
        socket=settings.engine_socket(lane).absolute(),
        record=settings.run_dir.absolute() / "inspect" / f"{lane.name}.json",
    )


class EngineLaunch:
    """`library` is what the engine preloads for its queues; None where the lane needs none, or none was built.

    `digest` (SHA-256) tells one configuration, command and engine version from another; "" before `write`.
    """

    def __init__(
        self,
        settings: Settings,
        lane: Lane,
        facts: engine.EngineFacts,
        owner: files.Owner,
        placement: LanePlacement,
        shortcut: LaneShortcut,
    ) -> None:
        self._settings = settings
        self._lane = lane
        self._facts = facts
        self._owner = owner
        self._placement = placement
        self._shortcut = shortcut
        self.paths = find_lane_paths(settings, lane)
        wanted = settings.inspection.super_packets or lane.leg_c is not None
        self.library = find_queue_library() if wanted else None
        self.digest = ""

    def write(self, ruleset: Path | None = None) -> None:
        """The lane's directory and configuration. Raises OSError.

        `ruleset`: another one than the one in force, for a start; what a reload reads is put back.
        """
        files.write_lane_directory(self.paths.directory, self._owner)
        self._shortcut.write()
        self.paths.record.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        config = engine_config.build_engine_config(self._settings, self._lane, self._placement)
        text = engine_config.render_engine_config(config)
        argv = self.render_start()
        whole = "\0".join((text, *argv, self._facts.text))
        self.digest = hashlib.sha256(whole.encode()).hexdigest()
        if ruleset is not None and ruleset != config.ruleset:
            text = engine_config.render_engine_config(replace(config, ruleset=ruleset))
        write_atomically(self.paths.config, text, 0o644)

    def render_start(self) -> tuple[str, ...]:
        """The command that starts the engine."""
        urgency = engine.render_urgency(self._placement.nice)
        return urgency + engine.render_start(
            self._settings.inspection.suricata,
            self._settings.inspection.user,
            self._lane,
            self.paths.config,
            self.library,
            super_packets=self._settings.inspection.super_packets,
            shortcut=self._shortcut.path,
        )

    async def test(self) -> None:
        """`suricata -T` on configuration and rules. Raises HairpinError when they won't do."""
        ended = await run_async(
            engine.render_test(
                self._settings.inspection.suricata,
                self._settings.inspection.user,
                self.paths.config,
                self.paths.directory / "test",
            ),
            timeout=TEST_LIMIT,
            check=False,
        )
        report = engine.parse_test(ended.status, ended.stdout + ended.stderr)
        if not report.passed:
            raise HairpinError(
                f"the engine refuses its configuration or rules (status {report.status}, "
                f"{report.rules_loaded} rules): {report.complaint}",
                f"mend the ruleset, or see `suricata -T -c {self.paths.config}`",
            )
