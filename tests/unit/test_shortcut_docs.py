"""docs/shortcut.md says what the code does: its example is taken, its figures and tests are those there are."""

from __future__ import annotations

import re
from pathlib import Path

from appliance.assurance.metrics import SPECS
from appliance.management.shortcut import APART_SECONDS, BACKLOG_ALERTS
from steering.fields import SHORTCUT_FLOWS
from steering.model import Inspect, Shortcut, Trigger
from steering.parse import parse_documents
from steering.shortcut import HOLD_SECONDS, IDLE_SECONDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "shortcut.md").read_text()


def test_the_example_is_a_policy_with_a_shortcut() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (policy,) = parse_documents(text).policies
    assert isinstance(policy.action, Inspect)
    assert policy.action.shortcut == Shortcut(Trigger.TEN_MEGABYTES, 50)


def test_every_trigger_bound_and_metric_is_named() -> None:
    for trigger in Trigger:
        assert f"`{trigger}`" in PAGE
    for phrase in (
        f"`maxFlows` ({SHORTCUT_FLOWS[0]} to {SHORTCUT_FLOWS[1]:,})",
        f"{IDLE_SECONDS} s without a packet",
        f"teach nothing for {HOLD_SECONDS:.0f} s",
        f"more than {BACKLOG_ALERTS:,}",
        f"{APART_SECONDS} s apart",
    ):
        assert phrase in PAGE, phrase
    for name in SPECS:
        if name.startswith("hairpin_shortcut_"):
            assert name in PAGE or f"`...{name.removeprefix('hairpin_shortcut')}`" in PAGE, name


def test_the_tests_that_hold_the_guard_rails_are_there() -> None:
    named = set(re.findall(r"`(test_[a-z_]+)`", PAGE))
    assert named
    there = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert named <= there, named - there
