"""A real rule feed of 19,946 rules, as a `file://` source."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from steering.model import Profile
from tests.support.rule_pipelines import ROOT, build_pipeline, source

pytestmark = [
    pytest.mark.lab,
    pytest.mark.side_by_side,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

SHARED = Path(os.environ.get("HAIRPIN_SHARED", ROOT.parent / "shared"))
FEED = SHARED / "data/rules/emerging.rules.tar.gz"
UNPARSABLE = {2014302, 2023146, 2025232}


@pytest.mark.skipif(not FEED.is_file(), reason=f"no rule feed at {FEED} (HAIRPIN_SHARED)")
async def test_the_unparsable_are_named_and_the_rest_loads(tmp_path: Path) -> None:
    pipeline = build_pipeline(tmp_path, sources=[source("et-open", FEED)], floor=19_000)
    first = await pipeline.update(print)
    for one in first.profiles:
        print(f"{one.profile}: {one.loaded} rules, {one.drops} drops, {one.seconds:.1f} s")
        assert {left.sid for left in one.left_out} == UNPARSABLE
        assert all("sticky buffer" in left.reason for left in one.left_out)
        assert one.loaded == 19_946 - len(UNPARSABLE) + 43  # starters, canary
    prevent, detect = first.profiles
    assert 5_000 < prevent.drops < 10_000
    assert detect.drops == 0
    lines = (tmp_path / "rules/prevent/current/suricata.rules").read_text().splitlines()
    assert not [line for line in lines if line.startswith("drop") and "noalert" in line]
    # Rated Informational though the feed itself ships it as a drop.
    informational = [line for line in lines if "signature_severity Informational" in line]
    assert informational
    assert not [line for line in informational if line.startswith("drop")]
    started = time.monotonic()
    found = pipeline.find_rules(Profile.PREVENT, cve="CVE-2021-44228", limit=1000)
    print(f"{len(found)} rules on Log4Shell in {time.monotonic() - started:.2f} s")
    assert {info.source for info in found} == {"et-open", "hairpin/starter"}
    second = await pipeline.update(print)
    assert [one.revision for one in second.profiles] == [one.revision for one in first.profiles]
    assert not any(one.changed.any for one in second.profiles)
