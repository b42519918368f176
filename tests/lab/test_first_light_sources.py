"""Rules come in, alerts go out: sources beside the starter rules, and a SIEM that comes and goes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from appliance import lab as the_lab
from appliance.lab import LabState
from tests.lab.test_export_rsyslog import Rsyslog
from tests.support.appliance import (
    BLOCKED,
    EXPLOIT_SID,
    Appliance,
    build_base,
    build_policy,
    inspect,
)
from tests.support.lab import build_name, wait_until
from tests.support.rule_pipelines import ATTACK, CRITICAL, rule, write_feed

# No promise is about how long an update takes: limits are for a machine that has other work, too.
pytestmark = [
    pytest.mark.lab,
    pytest.mark.side_by_side,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
UPDATE_SECONDS = 400.0

SHARED = Path(os.environ.get("HAIRPIN_SHARED", Path(__file__).parents[3] / "shared"))
FEED = SHARED / "data/rules/emerging.rules.tar.gz"
OWN_SID = 9100001


@contextmanager
def standing(
    name: str, directory: Path, lanes: tuple[str, ...] = ("prevent",), **overrides: Any
) -> Iterator[Appliance]:
    """A lab with other settings, nginx in app-1, and a policy from web to app."""
    lab: LabState = the_lab.bring_up(name, 2, overrides=overrides)
    try:
        appliance = Appliance(lab, directory)
        appliance.start_web("app-1")
        appliance.apply(
            [*build_base(lab), build_policy("web-to-app", "web", "app", inspect("prevent"))]
        )
        assert wait_until(lambda: all(map(appliance.is_forwarding, lanes)), 30)
        yield appliance
    finally:
        the_lab.take_down(name)


def expect_the_scenario(appliance: Appliance) -> None:
    before = appliance.find_latest_alert()
    for family in (4, 6):
        assert appliance.curl("web-1", "app-1", family=family).stdout == "hello from app-1\n"
        assert appliance.attack("web-1", "app-1", family=family).status == BLOCKED
    alerts = appliance.wait_alerts(before, 2, query=f"&sid={EXPLOIT_SID}")
    assert {alert["verdict"] for alert in alerts} == {"blocked"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sources")
    for above in (directory, *directory.parents):
        if above.is_relative_to("/tmp") and above != Path("/tmp"):
            above.chmod(0o755)  # what the service reads as a user of its own
    return directory


def test_rules_of_a_source_are_taken_and_renewed(directory: Path) -> None:
    feed = directory / "own.tar.gz"
    write_feed(feed, rule(OWN_SID, ATTACK, msg="ours", metadata=CRITICAL))
    sources = [{"name": "own", "url": feed.as_uri()}]
    with standing(build_name("r"), directory, rules={"sources": sources}) as appliance:
        marked = ("-A", f"agent {OWN_SID}")
        done = appliance.cli("rules", "update", "--json", timeout=UPDATE_SECONDS)
        assert done.status == 0, done.stderr
        found = appliance.read("rules", "show", "--sid", str(OWN_SID))["items"]
        assert {(one["lane"], one["source"]) for one in found} >= {("prevent", "own")}
        shown = {one["lane"]: one for one in appliance.read("rules", "show")["lanes"]}
        assert shown["prevent"]["failed"] == 0
        assert {source["name"] for source in shown["prevent"]["sources"]} >= {"own"}
        before = appliance.find_latest_alert()
        assert wait_until(
            lambda: appliance.curl("web-1", "app-1", "-m", "1.2", *marked).status == BLOCKED, 30
        )
        alerts = appliance.wait_alerts(before, query=f"&sid={OWN_SID}")
        assert (alerts[0]["verdict"], alerts[0]["signature"]["message"]) == ("blocked", "ours")
        expect_the_scenario(appliance)
        # A source that breaks is told; what was in force stays in force.
        feed.write_bytes(b"not an archive")
        appliance.cli("rules", "update", "--json", timeout=UPDATE_SECONDS)
        assert appliance.read("rules", "show", "--sid", str(OWN_SID))["items"] == found
        assert "own" in appliance.cli("rules", "show").stderr
        assert appliance.curl("web-1", "app-1", "-m", "1.2", *marked).status == BLOCKED
        expect_the_scenario(appliance)


@pytest.mark.skipif(not FEED.is_file(), reason=f"no rule feed at {FEED} (HAIRPIN_SHARED)")
def test_the_scenario_works_with_a_whole_feed(directory: Path) -> None:
    feed = directory / FEED.name
    feed.write_bytes(FEED.read_bytes())
    feed.chmod(0o644)
    sources = [{"name": "feed", "url": feed.as_uri()}]
    with standing(build_name("f"), directory / "feed", rules={"sources": sources}) as appliance:
        began = time.monotonic()
        done = appliance.cli("rules", "update", "--json", timeout=UPDATE_SECONDS)
        assert done.status == 0, done.stderr
        print(f"\nupdated in {time.monotonic() - began:.0f} s")
        lane = appliance.read("rules", "show")["lanes"][0]
        assert lane["lane"] == "prevent"
        assert lane["loaded"] > 15_000
        assert lane["failures"]
        assert all(one["sid"] and one["reason"] for one in lane["failures"])
        assert wait_until(
            lambda: (
                appliance.api("/health").document["components"]["lanes"][0]["rulesLoaded"]
                == lane["loaded"]
            ),
            120,
        )
        assert wait_until(lambda: appliance.is_forwarding("prevent"), 30)
        expect_the_scenario(appliance)


def test_a_siem_gets_every_alert_though_it_was_away(directory: Path, tmp_path: Path) -> None:
    siem = Rsyslog(tmp_path)
    siem.start()
    export = [{"name": "siem", "transport": "tcp", "host": "127.0.0.1", "port": siem.port}]
    try:
        with standing(build_name("x"), directory / "export", export=export) as appliance:
            appliance.attack("web-1", "app-1", path="/one")
            assert wait_until(lambda: len(siem.count_ids()) == 1, 10)
            siem.stop()
            for number in range(2):
                appliance.attack("web-1", "app-1", path=f"/away-{number}")
            appliance.wait_alerts(0, 3)
            assert appliance.api("/health").document["status"] in ("ok", "degraded")
            siem.start()
            appliance.attack("web-1", "app-1", path="/back", family=6)
            ids = {alert["id"] for alert in appliance.wait_alerts(0, 4)}
            assert wait_until(lambda: set(siem.count_ids()) == ids, 30), siem.count_ids()
            for event in siem.read():
                hairpin = event["hairpin"]
                assert isinstance(hairpin, dict)
                assert event["event_type"] == "alert"
                assert hairpin["source"]["name"] == "web-1"
                assert hairpin["destination"]["zones"] == ["app"]
                assert (hairpin["policy"], hairpin["lane"]) == ("web-to-app", "prevent")
                assert hairpin["verdict"] == "blocked"
    finally:
        siem.stop()
