"""How old the rules are, and that an appliance with old ones is not called healthy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.management.health import Facts, build_health
from appliance.management.status import KEPT_SECONDS, StatusCache
from appliance.rules.age import CLOCK_SLACK, DAY, find_age, judge_age, render_age
from appliance.rules.model import (
    STARTER,
    ProfileState,
    RevisionReport,
    RulesState,
    SourceReport,
)
from steering.change import SwitchStatus
from steering.model import PolicySet, Profile

NOW = 1_800_000_000.0
WEEK = 7 * DAY


def build_state(profile: Profile = Profile.PREVENT, **read: float) -> ProfileState:
    """A profile whose sources were read so many days ago; `starter` stands for the starter rules."""
    sources = tuple(
        SourceReport(
            STARTER if name == "starter" else name, "file:///x", "0" * 64, NOW - days * DAY, rules=1
        )
        for name, days in read.items()
    )
    report = RevisionReport(
        profile=profile, revision="0" * 16, created=NOW, sha256="0" * 64, loaded=2, skipped=0,
        drops=0, sources=sources, left_out=(), left_out_count=0, keys={},
    )  # fmt: skip
    return ProfileState(profile, report.revision, None, report, None)


def build_rules(*profiles: ProfileState) -> RulesState:
    return RulesState(profiles, None)


def build_facts(rules: RulesState, stale_after: float | None, now: float = NOW) -> Facts:
    return Facts(
        name="hairpin", version="0", now=now, started_at=now, revision=0, policies=PolicySet(),
        switch=SwitchStatus(True, "", NOW, "secure", "3.1.0", "system", ()), lanes=(), forwarding={},
        inspection=None, rules=rules, ingest=(), exporters=(), stale_after=stale_after,
    )  # fmt: skip


def test_the_most_neglected_source_tells_the_age_and_the_starter_rules_do_not() -> None:
    age = find_age(build_rules(build_state(starter=400, open=1, own=9)))
    assert age is not None
    assert (age.source, age.since, age.starter_only) == ("own", NOW - 9 * DAY, False)
    both = find_age(
        build_rules(build_state(starter=400), build_state(Profile.DETECT, starter=400, open=2))
    )
    assert both is not None
    assert (both.source, both.starter_only) == ("open", False)


def test_the_starter_rules_alone_have_the_age_of_their_making() -> None:
    age = find_age(build_rules(build_state(starter=400)))
    assert age is not None
    assert age.starter_only
    assert judge_age(age, NOW, None) == ""
    assert "were made 400 days ago" in judge_age(age, NOW, WEEK)
    assert find_age(build_rules(ProfileState(Profile.PREVENT, None, None, None, None))) is None


@pytest.mark.parametrize(
    ("days", "status"), [(0, "ok"), (6.99, "ok"), (7, "degraded"), (60, "degraded")]
)
def test_an_appliance_that_was_off_for_long_is_not_healthy(days: float, status: str) -> None:
    facts = build_facts(build_rules(build_state(starter=400, open=0)), WEEK, NOW + days * DAY)
    rules = build_health(facts).components.rules
    assert rules.status == status
    assert rules.updated_at is not None
    assert rules.updated_at.timestamp() == NOW
    told = [one for one in build_health(facts).problems if "last read" in one.reason]
    assert len(told) == (status == "degraded")
    for problem in told:
        assert f"of open were last read {render_age(days * DAY)} ago" in problem.reason
        assert "rules update" in problem.mend
        assert problem.since.timestamp() == NOW + WEEK
        assert build_health(facts).status != "ok"
    fresh = replace(facts, rules=build_rules(build_state(open=-days)))
    assert build_health(fresh).components.rules.status == "ok"


def test_a_clock_that_is_behind_makes_no_rules_young() -> None:
    facts = build_facts(build_rules(build_state(open=0)), WEEK, NOW - 400 * DAY)
    health = build_health(facts)
    assert health.components.rules.status == "degraded"
    assert any("how old they are can't be told" in one.reason for one in health.problems)
    slack = replace(facts, now=NOW - CLOCK_SLACK + 1)
    assert build_health(slack).components.rules.status == "ok"


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_an_age_is_told_in_whole_units(seconds: float, more: float) -> None:
    assert render_age(seconds)[0] in "123456789l"
    assert len(render_age(seconds)) < 20


def test_whoever_has_no_token_has_it_looked_at_once_a_second() -> None:
    looks: list[int] = []
    clock = [0.0]

    def build() -> object:
        looks.append(1)
        return build_health(build_facts(build_rules(build_state(open=8)), WEEK))

    cache = StatusCache(build, lambda: clock[0])  # type: ignore[arg-type]
    for _ in range(50):
        assert cache.read().status == "degraded"
    assert len(looks) == 1
    clock[0] += KEPT_SECONDS
    cache.read()
    assert len(looks) == 2
