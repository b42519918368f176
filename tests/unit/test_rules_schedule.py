"""Sources are read again by themselves where that is wanted, and no oftener."""

from __future__ import annotations

import asyncio

import pytest

from appliance.management import rulework
from appliance.rules.model import BUNDLE, RulesState
from appliance.rules.schedule import RETRY_SECONDS, is_update_due
from appliance.settings import Settings
from steering.errors import HairpinError
from steering.model import Profile
from tests.unit.test_rules_age import NOW, build_rules, build_state
from tests.unit.test_rulework import LANE, Disk, Told, build_work

HOUR = 3600.0
DAILY = 24 * HOUR
SOURCE = {"name": "own", "url": "file:///srv/own.tar.gz"}


@pytest.mark.parametrize(
    ("read_days_ago", "due"), [(0.0, False), (0.99, False), (1.0, True), (30.0, True)]
)
def test_it_is_due_that_long_after_a_source_was_read(read_days_ago: float, due: bool) -> None:
    rules = build_rules(build_state(own=read_days_ago, starter=90.0))
    assert is_update_due(rules, NOW, DAILY, None) is due


def test_without_the_setting_it_never_is() -> None:
    assert not is_update_due(build_rules(build_state(own=400.0)), NOW, None, None)


def test_where_no_source_was_read_yet_it_is_due() -> None:
    """Neither the starter rules nor a bundle count: no update reads them from anywhere."""
    assert is_update_due(build_rules(build_state(starter=0.0)), NOW, DAILY, None)
    bundle = build_rules(build_state(Profile.PREVENT, **{BUNDLE: 0.0}))
    assert is_update_due(bundle, NOW, DAILY, None)


def test_one_source_that_fails_does_not_make_it_due_each_moment() -> None:
    assert not is_update_due(build_rules(build_state(gone=40.0, own=0.5)), NOW, DAILY, None)


def test_one_that_failed_is_tried_again_after_half_an_hour() -> None:
    rules = build_rules(build_state(own=3.0))
    assert not is_update_due(rules, NOW, DAILY, NOW - RETRY_SECONDS + 1)
    assert is_update_due(rules, NOW, DAILY, NOW - RETRY_SECONDS)


def test_a_clock_that_was_set_back_does_not_stop_it() -> None:
    assert is_update_due(build_rules(build_state(own=-2.0)), NOW, DAILY, NOW + 2 * DAILY)


@pytest.mark.parametrize(
    ("rules", "seconds"),
    [
        ({"updateEveryHours": 6, "sources": [SOURCE]}, 6 * HOUR),
        ({"updateEveryHours": 6}, None),
        ({"sources": [SOURCE]}, None),
    ],
)
def test_only_sources_are_read_again(rules: dict[str, object], seconds: float | None) -> None:
    assert (
        Settings.model_validate({"rules": rules, "lanes": [LANE]}).rules.update_seconds == seconds
    )


class Rules(Disk):
    """A pipeline whose rules are as old as is said, and which is asked to update them."""

    def __init__(self, state: RulesState) -> None:
        super().__init__()
        self.state = state
        self.updates = 0

    def read_state(self) -> RulesState:
        return self.state

    async def update(self, progress: object, reload: object) -> None:
        self.updates += 1
        raise HairpinError("the source can't be read", "")


async def test_the_watch_starts_it_once_and_not_again_at_each_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rulework, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(rulework, "LOOK_SECONDS", 0.0)
    settings = Settings.model_validate(
        {"rules": {"updateEveryHours": 24, "sources": [SOURCE]}, "lanes": [LANE]}
    )
    disk, told = Rules(build_rules(build_state(own=30.0))), Told()
    keeping = asyncio.create_task(build_work(told, disk, settings=settings).keep())
    while disk.asked < 20:
        await asyncio.sleep(0)
        assert not keeping.done()
    keeping.cancel()
    assert disk.updates == 1
    assert told.events == [("rules.failed", "error", "rules not updated: the source can't be read")]
