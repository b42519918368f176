"""Every starter rule on real Suricata: it fires on the exploit and its disguises, not on near misses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from appliance.inspection.config import build_engine_config, render_engine_config
from appliance.rules.trial import render_test_config
from steering.model import Profile
from tests.lab.rule_samples import EXPLOITS, NEAR_MISSES, build_connections
from tests.support.rule_flows import FIRST_PORT, find_alerts
from tests.support.rule_pipelines import ENGINE_DATA, build_pipeline, build_settings

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]

CONNECTIONS = build_connections()
FAMILIES = ("IPv4", "IPv6")
Alerts = dict[Profile, dict[str, set[tuple[int, str]]]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rules-starter")


@pytest.fixture(scope="module")
def alerts(directory: Path) -> Alerts:
    """What each profile's own ruleset says of all samples: two runs of Suricata."""
    pipeline = build_pipeline(directory)
    asyncio.run(pipeline.ensure())
    config = directory / "suricata.yaml"
    config.write_text(
        render_test_config(ENGINE_DATA / "classification.config", ENGINE_DATA / "reference.config")
        + "outputs:\n  - eve-log: {enabled: yes, filename: eve.json, types: [alert, http, smb]}\n"
    )
    said: Alerts = {}
    for profile in (Profile.PREVENT, Profile.DETECT):
        rules = directory / "rules" / profile / "current" / "suricata.rules"
        work = directory / f"run-{profile}"
        work.mkdir()
        said[profile] = find_alerts(CONNECTIONS, rules, config, work)
    return said


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("sid", "name"), [(sid, name) for sid, samples in EXPLOITS.items() for name in samples]
)
def test_it_fires_on_the_exploit(alerts: Alerts, sid: int, name: str, family: str) -> None:
    connection = f"{sid} {name} ({family})"
    blocked, allowed = alerts[Profile.PREVENT][connection], alerts[Profile.DETECT][connection]
    assert (sid, "blocked") in blocked
    assert (sid, "allowed") in allowed
    # Only rules of the same exploit may fire beside it.
    assert {other // 100 for other, _ in blocked | allowed} == {sid // 100}
    assert {action for _, action in blocked} == {"blocked"}
    assert {action for _, action in allowed} == {"allowed"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_no_rule_fires_on_a_near_miss(alerts: Alerts, name: str, family: str) -> None:
    for said in alerts.values():
        assert said[f"near miss: {name} ({family})"] == set()


def test_every_starter_rule_has_an_exploit() -> None:
    files = (ENGINE_DATA / "rules").glob("*.rules")
    # Those are tried with frames that slip past: test_evasions.
    text = "".join(path.read_text() for path in files if path.name != "hairpin-wire.rules")
    assert [sid for sid in EXPLOITS if f"sid:{sid};" in text] == list(EXPLOITS)
    assert text.count("; sid:") == len(EXPLOITS)


def test_the_samples_were_understood_as_the_protocol_they_are(
    alerts: Alerts, directory: Path
) -> None:
    """A near miss that Suricata could not parse would prove nothing."""
    events = (directory / "run-prevent/eve.json").read_text()
    parsed = {
        json.loads(line)["src_port"]
        for line in events.splitlines()
        if '"event_type":"http"' in line
    }
    web = {
        FIRST_PORT + number
        for number, connection in enumerate(CONNECTIONS)
        if connection.name.startswith("near miss") and connection.server_port == 8080
    }
    assert len(web) > 40
    assert web <= parsed
    assert events.count('"event_type":"smb"') >= 4


def test_the_engine_s_own_configuration_says_the_same(alerts: Alerts, directory: Path) -> None:
    settings = build_settings(directory)
    [lane] = [lane for lane in settings.build_lanes() if lane.profile is Profile.PREVENT]
    config = directory / "engine.yaml"
    settings.lane_dir(lane).mkdir(parents=True)
    config.write_text(render_engine_config(build_engine_config(settings, lane), ENGINE_DATA))
    work = directory / "run-engine"
    work.mkdir()
    assert find_alerts(CONNECTIONS, settings.ruleset(lane), config, work) == alerts[Profile.PREVENT]
