"""The syslog message: header, framing, JSON, and that it always fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.alerts.attribute import Attributed
from appliance.alerts.eve import parse_event
from appliance.alerts.model import Alert, Endpoint, EveAlert, Opener
from appliance.alerts.rows import parse_alert_row
from appliance.export.format import MESSAGE_LIMIT, build_hairpin, frame_message, render_message
from tests.support.alerts import build_table_row
from tests.support.eve import render_eve
from tests.support.worlds import LANES

WEB = Endpoint("10.9.0.1", 40000, "vm-1", "web1", ("web",))
APP = Endpoint("10.9.0.2", 80, "vm-2", "app1", ("app", "edge"))
HEADER = re.compile(
    rb"<(\d+)>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) ([a-z0-9-]+) hairpin - alert "
    rb'\[origin software="hairpin"\] (\{.*\})'
)


def build_alert(**changes: object) -> Alert:
    eve = parse_event(render_eve(**changes))
    assert isinstance(eve, EveAlert)
    attributed = Attributed(WEB, APP, Opener.SOURCE, "web-to-app", 7, ())
    row = build_table_row(eve, attributed, LANES[0], 5.0, (1, 0, 0))
    return parse_alert_row({**row, "id": 12})


def parse_message(message: bytes) -> tuple[int, str, dict[str, object]]:
    found = HEADER.fullmatch(message)
    assert found is not None, message
    return int(found[1]), found[2].decode(), json.loads(found[4])


def test_the_message_is_the_event_with_what_only_the_appliance_knows() -> None:
    priority, time, event = parse_message(render_message(build_alert(), "lab"))
    assert (priority, time) == (10 * 8 + 2, "2023-11-14T22:13:20.030000Z")
    assert event.pop("hairpin") == {
        "id": 12,
        "source": {"name": "web1", "vmId": "vm-1", "zones": ["web"]},
        "destination": {"name": "app1", "vmId": "vm-2", "zones": ["app", "edge"]},
        "opener": "source",
        "policy": "web-to-app",
        "revision": 7,
        "lane": "prevent",
        "profile": "prevent",
        "verdict": "blocked",
        "cves": ["CVE-2021-44228"],
    }
    assert event == json.loads(render_eve())


def test_an_end_that_is_no_vm_is_null() -> None:
    hairpin = build_hairpin(replace(build_alert(), source=Endpoint("10.0.0.1", 1)))
    assert hairpin["source"] is None


@pytest.mark.parametrize(("severity", "expected"), [(1, 82), (2, 84), (3, 85), (4, 86), (255, 86)])
def test_priorities(severity: int, expected: int) -> None:
    alert = build_alert()
    alert = replace(alert, signature=replace(alert.signature, severity=severity))
    assert parse_message(render_message(alert, "lab"))[0] == expected


def test_the_length_counts_octets() -> None:
    assert frame_message(b"<82>1 x") == b"7 <82>1 x"


def test_a_member_named_hairpin_in_the_event_does_not_pass_for_ours() -> None:
    message = render_message(build_alert(hairpin={"id": 1}), "lab")
    assert message.count(b'"hairpin":') == 1
    _, _, event = parse_message(message)
    hairpin = event["hairpin"]
    assert isinstance(hairpin, dict)
    assert hairpin["id"] == 12


@given(st.text(max_size=200), st.integers(0, 40_000))
def test_any_alert_gives_one_line_of_ascii_that_fits(text: str, size: int) -> None:
    alert = build_alert(
        payload="QUFB" * size, payload_printable=text * 50, http={"url": text, "hostname": text}
    )
    message = render_message(alert, "lab")
    assert len(message) <= MESSAGE_LIMIT
    assert b"\n" not in message
    assert b"\r" not in message
    assert b"\x00" not in message
    _, _, event = parse_message(message)
    assert event["event_type"] == "alert"


def test_what_was_left_out_is_named() -> None:
    _, _, event = parse_message(render_message(build_alert(payload="QUFB" * 5000), "lab"))
    assert "payload" not in event
    hairpin = event["hairpin"]
    assert isinstance(hairpin, dict)
    assert hairpin["omitted"] == ["payload"]
    assert event["payload_printable"]


def test_an_event_that_is_all_core_is_cut_to_its_identity() -> None:
    _, _, event = parse_message(render_message(build_alert(unknown_member="x" * 9000), "lab"))
    hairpin = event["hairpin"]
    assert isinstance(hairpin, dict)
    assert (event["event_type"], hairpin["omitted"], hairpin["id"]) == ("alert", ["*"], 12)
    assert event["src_ip"] == "10.9.0.1"
