"""What is told of a running engine's files is told no longer than it is so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import pytest

from appliance.inspection.faults import FaultBook
from appliance.inspection.launch import LanePaths
from appliance.inspection.placement import LanePlacement
from appliance.inspection.process import EngineProcess
from appliance.inspection.upkeep import EngineUpkeep


@pytest.fixture
def paths(tmp_path: Path) -> LanePaths:
    return LanePaths(
        directory=tmp_path,
        config=tmp_path / "suricata.yaml",
        log=tmp_path / "engine.log",
        eve=tmp_path / "eve.json",
        socket=tmp_path / "command.socket",
        record=tmp_path / "prevent.json",
    )


async def test_an_engine_that_could_not_be_asked_and_opened_its_file_by_itself_is_no_fault(
    paths: LanePaths,
) -> None:
    """While an engine starts, nobody listens on its socket; its EVE file comes before it does."""
    faults = FaultBook()

    def note(kind: str, reason: str, mend: str) -> None:
        faults.note(kind, reason, mend, time.time())

    upkeep = EngineUpkeep(paths, 2**20, LanePlacement(queues=1), faults, note)
    process = cast(EngineProcess, None)  # its threads are looked at only once it runs
    await upkeep.tend(process, running=False)
    (told,) = faults.build(time.time())
    assert "the EVE file could not be reopened" in told.reason
    assert told.mended is None

    paths.eve.touch()
    await upkeep.tend(process, running=False)
    (told,) = faults.build(time.time())
    assert told.mended is not None
