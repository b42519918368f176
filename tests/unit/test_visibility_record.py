"""Flow records: built from what nfstream metered, written as lines, read back bounded."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.visibility.orientation import Orientation
from appliance.visibility.record import (
    LINE_LIMIT,
    FlowRecord,
    build_flipped,
    build_record,
    parse_record,
    render_record,
)
from steering.errors import WrongInput
from steering.model import Family


def metered(**changes: Any) -> SimpleNamespace:
    """A flow as nfstream shows it."""
    values: dict[str, Any] = {
        "src_ip": "10.0.0.1",
        "src_mac": "02:00:00:00:00:0A",
        "src_port": 40000,
        "dst_ip": "10.0.0.2",
        "dst_mac": "02:00:00:00:00:0b",
        "dst_port": 80,
        "protocol": 6,
        "ip_version": 4,
        "vlan_id": 0,
        "expiration_id": 0,
        "bidirectional_first_seen_ms": 1_700_000_000_250,
        "bidirectional_last_seen_ms": 1_700_000_001_500,
        "src2dst_packets": 5,
        "src2dst_bytes": 400,
        "dst2src_packets": 4,
        "dst2src_bytes": 9000,
        "application_name": "HTTP",
        "application_category_name": "Web",
        "application_is_guessed": 0,
        "requested_server_name": "shop.example",
    }
    return SimpleNamespace(**{**values, **changes})


def test_a_line_of_the_spool() -> None:
    assert render_record(build_record(metered())) == (
        b'{"first_seen":1700000000.25,"last_seen":1700000001.5,"family":"ipv4",'
        b'"protocol_number":6,"protocol":"tcp",'
        b'"src_address":"10.0.0.1","src_port":40000,"src_mac":"02:00:00:00:00:0a",'
        b'"dst_address":"10.0.0.2","dst_port":80,"dst_mac":"02:00:00:00:00:0b","vlan":0,'
        b'"application":"HTTP","application_category":"Web","application_guessed":false,'
        b'"requested_server_name":"shop.example",'
        b'"src_packets":5,"src_bytes":400,"dst_packets":4,"dst_bytes":9000,"reason":"idle"}\n'
    )


@given(
    name=st.one_of(st.none(), st.text(max_size=200)),
    application=st.one_of(st.none(), st.text(max_size=60)),
    protocol=st.integers(0, 255),
    port=st.integers(0, 65535),
    vlan=st.integers(0, 4095),
    count=st.integers(0, 2**63 - 1),
    address=st.one_of(
        st.ip_addresses(v=4).map(lambda a: (4, str(a))),
        st.ip_addresses(v=6).map(lambda a: (6, str(a))),
    ),
    expiration=st.sampled_from([0, 1]),
)
def test_whatever_was_metered_is_a_line_that_reads_back_the_same(
    name: str | None,
    application: str | None,
    protocol: int,
    port: int,
    vlan: int,
    count: int,
    address: tuple[int, str],
    expiration: int,
) -> None:
    record = build_record(
        metered(
            requested_server_name=name,
            application_name=application,
            protocol=protocol,
            src_port=port,
            vlan_id=vlan,
            src2dst_packets=count,
            ip_version=address[0],
            src_ip=address[1],
            dst_ip=address[1],
            expiration_id=expiration,
        )
    )
    line = render_record(record)
    assert line.count(b"\n") == 1
    assert len(line) < LINE_LIMIT
    assert parse_record(line) == record
    assert record.requested_server_name.isprintable()
    assert build_flipped(build_flipped(record)) == record


def test_a_name_from_a_packet_cannot_break_a_terminal() -> None:
    record = build_record(metered(requested_server_name="a\x1b[2Jb\u202ec\n" + "x" * 500))
    assert record.requested_server_name.startswith("a?[2Jb?c?xxx")
    assert len(record.requested_server_name) == 80


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"src_port": 70000}, "src_port"),
        ({"protocol_number": 256}, "protocol_number"),
        ({"src_mac": "not a mac"}, "src_mac"),
        ({"src_address": "10.0.0.1.5"}, "(line)"),
        ({"dst_address": "fd00::1"}, "(line)"),
        ({"src_bytes": -1}, "src_bytes"),
        ({"first_seen": 1e300}, "first_seen"),
        ({"application": "x" * 81}, "application"),
        ({"reason": "tired"}, "reason"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_hostile_line_is_refused_with_its_place(change: dict[str, Any], path: str) -> None:
    values = json.loads(render_record(build_record(metered())))
    with pytest.raises(WrongInput) as refused:
        parse_record(json.dumps({**values, **change}).encode())
    assert [fault.path for fault in refused.value.faults] == [path]


@given(st.binary(max_size=300))
def test_no_bytes_do_worse_than_be_refused(line: bytes) -> None:
    with pytest.raises(WrongInput):
        parse_record(line)


@pytest.mark.parametrize(
    "line", [b"[" * 4000, b"[" * 10_000_000, b'{"src_port":' + b"9" * 4000 + b"}"]
)
def test_a_line_made_to_exhaust_the_reader_is_refused(line: bytes) -> None:
    with pytest.raises(WrongInput):
        parse_record(line)


class TestOrientation:
    """The pieces of a long flow are told the same way round."""

    def first(self) -> FlowRecord:
        return build_record(metered(expiration_id=1))

    def test_a_later_piece_that_begins_with_the_server_is_flipped(self) -> None:
        orientation = Orientation()
        first = orientation.build_oriented(self.first())
        second = orientation.build_oriented(build_flipped(self.first()))
        third = orientation.build_oriented(
            build_flipped(self.first()).model_copy(update={"reason": "idle"})
        )
        assert {record.src_address for record in (first, second, third)} == {"10.0.0.1"}
        assert third.dst_bytes == 9000

    def test_a_flow_that_ended_is_forgotten(self) -> None:
        orientation = Orientation()
        orientation.build_oriented(self.first())
        orientation.build_oriented(self.first().model_copy(update={"reason": "idle"}))
        back = build_flipped(self.first())
        assert orientation.build_oriented(back) == back
        assert len(orientation) == 1

    def test_memory_is_bounded(self) -> None:
        orientation = Orientation(limit=10)
        for port in range(100):
            orientation.build_oriented(self.first().model_copy(update={"src_port": port}))
        assert len(orientation) == 10


def test_a_record_knows_its_family() -> None:
    record = build_record(metered(ip_version=6, src_ip="FD00::0:1", dst_ip="fd00::2"))
    assert record.family is Family.IPV6
    assert record.src_address == "fd00::1"
    assert (record.packets, record.bytes) == (9, 9400)
