"""Rulesets are looked after whatever happens to the disk, and none is loaded that was seen not to load."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest

from appliance.assurance.canary import CanaryWatch
from appliance.assurance.stages import Judgement, Stage
from appliance.inspection.publish import EngineState, Fault, InspectionState, LaneState
from appliance.inspection.rulesets import UNLOADABLE
from appliance.management import rulework
from appliance.management.rulework import RuleWork
from appliance.rules.model import RulesState
from appliance.rules.pipeline import RulePipeline
from appliance.settings import Settings
from steering.errors import HairpinError
from steering.model import Lane

LANE = {
    "profile": "prevent",
    "vlan": 3001,
    "legA": {"interface": "hp-prev-a", "device": "a"},
    "legB": {"interface": "hp-prev-b", "device": "b"},
    "queues": [0],
}
SETTINGS = Settings.model_validate({"lanes": [LANE]})


class Disk:
    """Stands for a pipeline on a disk whose faults come one after the other; a real one fills too late."""

    def __init__(self, *faults: Exception) -> None:
        self.faults = list(faults)
        self.asked = 0

    async def ensure(self) -> tuple[()]:
        self.asked += 1
        if self.faults:
            raise self.faults.pop(0)
        return ()

    async def adopt_bundle(self, reload: object) -> None:
        return None


class Told:
    """Takes events; refuses the first ``refused`` of them, as a store on a full disk."""

    def __init__(self, refused: int = 0) -> None:
        self.refused = refused
        self.events: list[tuple[str, str, str]] = []

    async def __call__(self, kind: str, severity: str, message: str) -> None:
        if self.refused:
            self.refused -= 1
            raise HairpinError("disk full", "")
        self.events.append((kind, severity, message))


def build_work(
    told: Told, disk: Disk, state: InspectionState | None = None, *, settings: Settings = SETTINGS
) -> RuleWork:
    pipeline = cast(RulePipeline, disk)
    return RuleWork(settings, pipeline, lambda: state, told, cast(CanaryWatch, None))


async def test_a_full_disk_neither_ends_the_watch_nor_is_told_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rulework, "KEEP_SECONDS", 0.0)
    full = OSError(28, "No space left on device")
    disk, told = Disk(full, full, full), Told(refused=1)
    keeping = asyncio.create_task(build_work(told, disk).keep())
    while disk.asked < 6:
        await asyncio.sleep(0)
        assert not keeping.done()
    keeping.cancel()
    text = "no ruleset could be made: [Errno 28] No space left on device"
    assert told.events == [("rules.failed", "error", text)]


def build_state(settings: Settings, fault: Fault) -> InspectionState:
    lane = settings.build_lanes()[0]
    engine: dict[str, Any] = {
        "number": lane.number,
        "name": lane.name,
        "state": EngineState.RUNNING,
        "pid": 1,
        "started": 1.0,
        "adopted": False,
        "restarts": 0,
        "version": "7.0.10",
        "hyperscan": True,
        "rules_loaded": 43,
        "rules_failed": 0,
        "queues": (),
        "counters": None,
        "faults": (fault,),
    }
    return InspectionState.model_construct(
        updated=1.0, lanes=(LaneState.model_construct(**engine),), faults=()
    )


async def test_a_ruleset_that_its_engine_refused_is_not_loaded_again_and_again() -> None:
    settings, told = SETTINGS, Told()
    fault = Fault(reason=f"{UNLOADABLE} at /r; the one before it is inspected by", mend="", since=1)
    await build_work(told, Disk(), build_state(settings, fault)).reload_lane(
        settings.build_lanes()[0]
    )
    assert told.events == []


class Canary:
    """Stands for the watch of a lane that a real host would have to bring down at a certain moment."""

    def __init__(self, judgement: Judgement, *forwarding: bool) -> None:
        self.judgement = judgement
        self.forwarding = list(forwarding)

    def is_forwarding(self, lane: Lane) -> bool:
        return self.forwarding.pop(0)

    @contextlib.asynccontextmanager
    async def hold(self, lane: Lane) -> AsyncIterator[Callable[[str], Awaitable[Judgement]]]:
        async def prove(cause: str) -> Judgement:
            return self.judgement

        yield prove


LOST = Judgement(Stage.BRIDGE, "the lane is down: BFD does not pass through it", shut_out=True)


@pytest.mark.parametrize(
    ("judgement", "forwarding", "accepted"),
    [
        (Judgement(), (True,), True),
        (LOST, (True,), False),  # these rules may have brought it down
        (LOST, (False, True), False),
        (LOST, (False, False), True),
        (Judgement(Stage.RULESET, "other rules"), (False, True), False),
        # The switch was lost, so that nothing was known of BFD; the canary took its way all the same.
        (Judgement(Stage.RULESET, "other rules"), (False, False), False),
    ],
)
async def test_rules_are_not_refused_for_a_lane_that_was_down_before(
    judgement: Judgement,
    forwarding: tuple[bool, ...],
    accepted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def load(socket: object) -> str:
        return "done"

    monkeypatch.setattr(rulework, "reload_rules", load)
    monkeypatch.setattr(rulework, "check_reload", lambda report, floor: ())
    canary = cast(CanaryWatch, Canary(judgement, *forwarding))
    pipeline = cast(RulePipeline, Rules())
    work = RuleWork(SETTINGS, pipeline, lambda: None, Told(), canary)
    verdict = await work._reload_engine(SETTINGS.build_lanes()[0])
    assert verdict.accepted is accepted
    assert (LOST.detail in verdict.reason) is (judgement is LOST)


class Rules(Disk):
    def read_state(self) -> RulesState:
        return RulesState((), None)
