"""The shortcut's rules and rules with `bypass`, on the real suricata-update and the real Suricata."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.inspection.config import build_engine_config, render_engine_config
from appliance.rules.canary import find_token
from appliance.rules.parse import parse_rule
from appliance.rules.shortcut import build_shortcut_rules, has_marks
from appliance.rules.trial import run_trial
from steering.model import Profile
from tests.lab.test_rules_pipeline import LOADED, quiet, read_ruleset
from tests.support.rule_pipelines import (
    ATTACK,
    CRITICAL,
    SURICATA,
    build_pipeline,
    rule,
    source,
    write_feed,
)

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]


async def test_a_lane_with_a_third_leg_has_the_shortcuts_rules_and_they_load(
    tmp_path: Path,
) -> None:
    feed = write_feed(
        tmp_path / "feed.tar.gz",
        rule(1, "bypass;"),
        rule(2, f"bypass; {ATTACK}", metadata=CRITICAL),
        rule(3),
    )
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)], third_leg=True)
    report = await pipeline.update(quiet)
    prevent, detect = report.profiles
    own = list(build_shortcut_rules())
    for profile, theirs in ((Profile.PREVENT, own), (Profile.DETECT, [])):
        ruleset = read_ruleset(tmp_path, profile)
        assert [
            line for line in ruleset[:-1] if "HAIRPIN shortcut" in line or line in own
        ] == theirs
        assert find_token("\n".join(ruleset)) is not None
        assert not any("bypass" in line for line in ruleset)
    assert [[one.sid for one in one.rewritten] for one in report.profiles] == [[1, 2], [1, 2]]
    assert has_marks("\n".join(read_ruleset(tmp_path, Profile.PREVENT)))
    assert (prevent.loaded, detect.loaded) == (LOADED + 3 + len(own), LOADED + 3)
    texts = {info.sid: info.text for info in pipeline.find_rules(Profile.PREVENT)}
    assert not set(texts) & {parse_rule(line).sid for line in own}
    assert "nfq_set_mark:0x2000000/0x2000000; flowbits:set,hairpin.rule;" in texts[1]
    # One that drops lets nothing go, and in a lane without a third leg none does.
    assert texts[2].startswith("drop")
    assert "nfq_set_mark" not in texts[2]
    assert not any("nfq_set_mark" in line for line in read_ruleset(tmp_path, Profile.DETECT))
    # The whole of it, as the engine gets it, by the engine's own configuration.
    lane = pipeline._settings.build_lanes()[0]
    config = tmp_path / "suricata.yaml"
    config.write_text(render_engine_config(build_engine_config(pipeline._settings, lane)))
    whole = tmp_path / "rules/prevent/current/suricata.rules"
    trial = await run_trial(SURICATA, config, whole, tmp_path / "log")
    assert (trial.status, trial.failed, trial.faults) == (0, 0, ())
    assert trial.loaded == prevent.loaded
