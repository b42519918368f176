"""How soon there are rules at the first start; alone, for it is a matter of seconds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from appliance.rules.model import STARTER
from steering.model import Profile
from tests.lab.test_rules_pipeline import LOADED, STARTERS, read_link, read_ruleset
from tests.support.rule_pipelines import build_pipeline

pytestmark = pytest.mark.lab


async def test_the_first_start_needs_nothing_but_the_starter_rules(tmp_path: Path) -> None:
    pipeline = build_pipeline(tmp_path)
    started = time.monotonic()
    await pipeline.ensure()
    assert time.monotonic() - started < 3
    actions = [line.split()[0] for line in read_ruleset(tmp_path, Profile.PREVENT)]
    assert actions == ["drop"] * LOADED
    actions = [line.split()[0] for line in read_ruleset(tmp_path, Profile.DETECT)]
    assert actions == ["alert"] * STARTERS + ["drop"]
    prevent, detect = pipeline.read_state().profiles
    assert prevent.report is not None
    assert (prevent.report.loaded, prevent.report.drops) == (LOADED, STARTERS)
    assert detect.report is not None
    assert detect.report.drops == 0
    assert set(detect.report.keys) == {STARTER}
    files = [path for path in (tmp_path / "rules").rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in files if path.name != ".lock")
    before = read_link(tmp_path, Profile.PREVENT)
    await pipeline.ensure()
    assert read_link(tmp_path, Profile.PREVENT) == before
