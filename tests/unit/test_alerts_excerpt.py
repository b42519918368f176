"""The excerpt of an alert shows the packet that made the rule fire."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from appliance.alerts.eve import PAYLOAD_LIMIT, parse_event
from appliance.alerts.excerpt import find_segment, read_base64
from appliance.alerts.model import EveAlert
from tests.support.eve import render_eve

FIRST, LATER = b"GET /first HTTP/1.1\r\n\r\n", b"GET /${jndi:x} HTTP/1.1\r\n\x00\xff\r\n"


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def parse(packet: bytes, stream: bytes, /, **more: object) -> EveAlert:
    event = {
        "stream": 1,
        "packet": encode(packet),
        "packet_info": {"linktype": 12},
        "payload": encode(stream),
        "payload_printable": stream.decode(),
        **more,
    }
    alert = parse_event(render_eve(**event))
    assert isinstance(alert, EveAlert)
    return alert


@pytest.mark.parametrize("header", [IP(), IPv6(), IP(options=b"\x01\x01\x01\x00")])
def test_the_packet_that_fired_ends_the_excerpt(header: IP | IPv6) -> None:
    packet = bytes(header / TCP(options=[("NOP", None)] * 4) / Raw(LATER))
    alert = parse(packet, FIRST)
    assert base64.b64decode(alert.payload) == FIRST + LATER
    assert alert.payload_printable == (FIRST + LATER).decode("latin-1").replace("\0", ".").replace(
        "\xff", "."
    )


def test_of_a_connection_that_returned_from_a_shortcut_the_tags_are_left_out() -> None:
    packet = b"\0\1\x81\0\0\0\x08\0" + bytes(IP() / TCP() / Raw(LATER))
    alert = parse(packet, FIRST, vlan=[1, 0], pkt_src="gre tunnel")
    assert base64.b64decode(alert.payload) == FIRST + LATER


def test_a_long_stream_is_cut_at_its_beginning() -> None:
    alert = parse(bytes(IP() / TCP() / Raw(LATER)), b"a" * 4096)
    assert base64.b64decode(alert.payload).endswith(LATER)
    assert len(base64.b64decode(alert.payload)) == len(alert.payload_printable) == PAYLOAD_LIMIT
    assert alert.payload_printable.endswith("${jndi:x} HTTP/1.1\r\n..\r\n")


def test_what_the_stream_already_holds_is_not_told_twice() -> None:
    alert = parse(bytes(IP() / TCP() / Raw(FIRST)), FIRST)
    assert alert.payload_printable == FIRST.decode()


@pytest.mark.parametrize(
    "more",
    [
        {"stream": 0},
        {"packet": encode(bytes(IP() / UDP() / Raw(LATER)))},
        {"packet": "not base64!"},
        {"packet": encode(bytes(IP() / TCP() / Raw(LATER))[:30])},
        {"packet_info": {"linktype": 1}},
        {"packet_info": None},
    ],
)
def test_without_such_a_packet_the_payload_is_as_the_engine_wrote_it(
    more: dict[str, object],
) -> None:
    alert = parse(bytes(IP() / TCP() / Raw(LATER)), FIRST, **more)
    assert alert.payload_printable == FIRST.decode()


@given(st.binary(max_size=120))
def test_any_bytes_are_survived(packet: bytes) -> None:
    event = {"stream": 1, "packet": encode(packet), "packet_info": {"linktype": 12}}
    assert find_segment(event) in packet
    assert read_base64(event["packet"]) == packet
