"""A canary's frames, what is concluded from sightings of them, and the socket by which they are asked for."""

from __future__ import annotations

import asyncio
import json
import secrets
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether

from appliance.inspection import canary_client
from appliance.inspection.canary import (
    Sighting,
    Trace,
    build_checksum,
    build_expected,
    build_filter,
    build_frame,
    parse_frame,
    record_sighting,
)
from appliance.inspection.canary_door import AUXDATA, find_growth, parse_auxdata
from appliance.inspection.canary_service import CanaryService
from appliance.inspection.netfilter import QueueCounters
from appliance.settings import Settings, parse_settings
from steering.canary import PARTS, Part, build_payload
from steering.errors import HairpinError
from steering.model import Family, Lane, Leg, Profile

LANE = Lane(2, Profile.PREVENT, 3901, (4, 5), Leg("hp-a", "dev-a"), Leg("hp-b", "dev-b"))
TOKEN, PROBE = "0123456789abcdef", "f" * 32
parts = st.sampled_from(PARTS)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.name}-{part.hostile}")
def test_frame_is_what_scapy_reads_and_would_send(part: Part) -> None:
    frame = build_frame(LANE, part, TOKEN, PROBE, 20001)
    read = Ether(frame)
    assert read.src == "02:48:50:ca:00:00"
    assert read.dst == ("02:48:50:ca:02:02" if part.answer else "02:48:50:ca:02:01")
    if part.family is Family.IPV4:
        assert (read[IP].src, read[IP].dst, read[IP].ttl) == ("198.18.72.80", "198.18.72.81", 64)
    else:
        assert (read[IPv6].src, read[IPv6].dst) == ("fd48:5049:5250::80", "fd48:5049:5250::81")
        assert read[IPv6].hlim == 64
    assert (read[UDP].sport, read[UDP].dport) == (20001, 4850)
    assert bytes(read[UDP].payload) == build_payload(part, TOKEN, PROBE)
    # Without its checksums and lengths scapy computes them: they must be the same.
    for layer, fields in ((IP, ("chksum", "len")), (IPv6, ("plen",)), (UDP, ("chksum", "len"))):
        if layer in read:
            for field in fields:
                delattr(read[layer], field)
    assert bytes(read) == frame


@given(parts, st.integers(20000, 60999), st.integers(0, 4094))
def test_frame_is_parsed_with_and_without_a_tag(part: Part, port: int, vlan: int) -> None:
    frame = build_frame(LANE, part, TOKEN, PROBE, port)
    payload = build_payload(part, TOKEN, PROBE)
    assert parse_frame(frame) == (0, payload)
    tagged = frame[:12] + struct.pack("!HH", 0x8100, 0xE000 | vlan) + frame[12:]
    assert parse_frame(tagged) == (vlan, payload)
    assert Ether(tagged)[Dot1Q].vlan == vlan


@given(parts, st.binary(max_size=120), st.integers(0, 120))
def test_no_bytes_break_the_parser(part: Part, noise: bytes, kept: int) -> None:
    frame = build_frame(LANE, part, TOKEN, PROBE, 20000)
    for broken in (noise, frame[:kept] + noise, frame[:12] + noise):
        parsed = parse_frame(broken)
        assert parsed is None or (parsed[0] < 4096 and len(parsed[1]) <= len(broken) - 42)


def test_frames_of_other_senders_and_other_probes_are_none_of_ours() -> None:
    part = PARTS[0]
    frame = build_frame(LANE, part, TOKEN, PROBE, 20000)
    assert parse_frame(frame[:6] + b"\x02" * 6 + frame[12:]) is None
    other = parse_frame(build_frame(LANE, part, TOKEN, "0" * 32, 20000))
    assert other is not None
    assert other[1] not in build_expected(TOKEN, PROBE)


@given(st.binary(max_size=65))
def test_data_with_its_checksum_sums_up_to_zero(data: bytes) -> None:
    even = data + b"\0" * (len(data) % 2)
    assert build_checksum(even + struct.pack("!H", build_checksum(even))) == 0


def run_filter(frame: bytes) -> int:
    """A classic BPF machine of the four instructions that the filter uses."""
    at = held = 0
    program = build_filter()
    while True:
        code, yes, no, value = program[at]
        at += 1
        if code in (0x20, 0x28):
            size = 4 if code == 0x20 else 2
            if value + size > len(frame):
                return 0
            held = int.from_bytes(frame[value : value + size], "big")
        elif code == 0x15:
            at += yes if held == value else no
        else:
            return value


@given(st.binary(max_size=60))
def test_filter_takes_canaries_and_nothing_else(noise: bytes) -> None:
    frame = build_frame(LANE, PARTS[0], TOKEN, PROBE, 20000)
    assert run_filter(frame) > len(frame)
    assert bool(run_filter(noise)) == (noise[6:12] == frame[6:12])


def test_way_of_an_opener_and_of_an_answer() -> None:
    opener, answer = Part(Family.IPV4, False, False), Part(Family.IPV4, True, False)

    def follow(part: Part, *seen: tuple[str, bool, int]) -> Trace:
        trace = Trace()
        for device, leaving, vlan in seen:
            trace = record_sighting(trace, Sighting(device, leaving, vlan, part), LANE, "canary")
        return trace

    whole = Trace(entered=True, vlan=3901, left=True, returned=True)
    out, back = ("canary", True, 0), ("canary", False, 0)
    assert follow(opener, out, ("dev-a", False, 3901), ("dev-b", True, 3901), back) == whole
    assert follow(answer, out, ("dev-b", False, 3901), ("dev-a", True, 3901), back) == whole
    assert follow(opener, out) == Trace()
    assert follow(opener, out, ("dev-a", False, 7)) == Trace(entered=True, vlan=7)
    # The wrong leg, or out by the one it came in by, is no step of the way.
    assert follow(opener, ("dev-b", False, 3901), ("dev-a", True, 3901)) == Trace()


def test_vlan_that_the_kernel_took_out_of_the_frame() -> None:
    def said(status: int, tag: int) -> list[tuple[int, int, bytes]]:
        return [(263, 8, AUXDATA.pack(status, 90, 90, 0, 14, tag, 0x8100))]

    assert parse_auxdata(said(1 << 4 | 1, 0x2F3D)) == 0xF3D
    assert parse_auxdata(said(1, 3901)) == 0
    assert parse_auxdata([]) == 0


def test_growth_of_a_lanes_queues() -> None:
    before = (QueueCounters(4, 0, 1, 1, 100), QueueCounters(5, 0, 0, 0, 50))
    after = (QueueCounters(4, 3, 2, 2, 104), QueueCounters(9, 0, 0, 0, 70))
    assert find_growth(LANE, before, after) == (4, 2)
    # Bound anew by another engine: what it counts is all since then.
    assert find_growth(LANE, before, (QueueCounters(4, 0, 0, 0, 8),)) == (8, 0)
    assert find_growth(LANE, (), (QueueCounters(5, 0, 3, 0, 9),)) == (9, 3)


# --- the socket ------------------------------------------------------------------------------------


def build_settings(directory: Path) -> Settings:
    (directory / "state").mkdir()
    (directory / "run/inspect").mkdir(parents=True)
    return parse_settings(f"""
        stateDir: {directory}/state
        runDir: {directory}/run
        canary: {{interface: hp-canary, device: no-such-dev}}
        lanes:
          - {{profile: prevent, vlan: 9, queues: [1], legA: {{interface: a, device: no-leg-a}},
             legB: {{interface: b, device: no-leg-b}}}}
        """)


async def serve(settings: Settings) -> asyncio.Task[None]:
    told: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    service = CanaryService(
        settings, lambda: (), lambda reason, mend: told.put_nowait((reason, mend))
    )
    task = asyncio.create_task(service.run())
    assert await told.get() == ("", "")
    return task


async def exchange(path: Path, line: bytes) -> dict[str, object]:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(line)
    answer: dict[str, object] = json.loads(await reader.readline())
    writer.close()
    return answer


async def test_missing_device_is_named_with_what_to_do(tmp_path: Path) -> None:
    settings = build_settings(tmp_path)
    task = await serve(settings)
    probe = secrets.token_hex(16)
    report = await canary_client.probe(settings.canary_socket, "prevent", TOKEN, probe, 0.2)
    assert report.fault == (
        "there is no device `no-such-dev` in the service host; "
        "attach it, or correct canary.device and the lanes' legs in the settings"
    )
    assert (report.lane, report.probe, report.queued) == ("prevent", probe, 0)
    assert len(report.parts) == 8
    assert not any(part.sent for part in report.parts)
    assert stat.S_IMODE(settings.canary_socket.stat().st_mode) == 0o600
    task.cancel()
    await asyncio.wait([task])
    assert not settings.canary_socket.exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nonsense\n", "not a request: ("),
        (b"{}\n", "not a request: ('lane',): Field required"),
        (b"x" * 5000, "no line of at most 4096 bytes"),
        (
            b'{"version":1,"lane":"prevent","ruleset":"a b","probe":"'
            + b"0" * 32
            + b'","seconds":1}\n',
            "not a request: ('ruleset',): String should match pattern",
        ),
        (
            b'{"version":1,"lane":"prevent","ruleset":"a","probe":"'
            + b"0" * 32
            + b'","seconds":6}\n',
            "not a request: ('seconds',): Input should be less than or equal to 5",
        ),
        (
            b'{"version":1,"lane":"other","ruleset":"a","probe":"'
            + b"0" * 32
            + b'","seconds":1}\n',
            "there is no lane `other`",
        ),
    ],
)
async def test_wrong_request_is_told_why(tmp_path: Path, line: bytes, reason: str) -> None:
    settings = build_settings(tmp_path)
    task = await serve(settings)
    answer = await exchange(settings.canary_socket, line)
    assert str(answer["fault"]).startswith(reason)
    assert answer["parts"] == []
    task.cancel()
    await asyncio.wait([task])


async def test_ninth_request_at_once_is_refused(tmp_path: Path) -> None:
    settings = build_settings(tmp_path)
    task = await serve(settings)
    waiting = [await asyncio.open_unix_connection(settings.canary_socket) for _ in range(8)]
    await asyncio.sleep(0.05)
    answer = await exchange(settings.canary_socket, b"{}\n")
    assert answer["fault"] == "8 probes are asked for already; ask again later"
    for _, writer in waiting:
        writer.close()
    task.cancel()
    await asyncio.wait([task])


async def test_client_says_where_nobody_answers(tmp_path: Path) -> None:
    path = tmp_path / "canary.sock"
    with pytest.raises(HairpinError, match=r"can't be asked for a canary at .*canary\.sock"):
        await canary_client.probe(path, "prevent", TOKEN, PROBE, 0.1)
    with pytest.raises(HairpinError, match="no such probe can be asked for"):
        await canary_client.probe(path, "prevent", TOKEN, "short", 0.1)
