"""Super-packets: what the preloaded library makes of hostile packets, and when they are said to be on."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.packet import Packet, Raw

from appliance.inspection.engine import render_start
from appliance.inspection.publish import EngineCounters, SuperPacketState
from appliance.inspection.superpackets import ACCEPTED, REFUSED, find_super_packets
from appliance.paths import find_queue_library
from steering.model import Lane, Leg, Profile

LANE = Lane(1, Profile.PREVENT, 3901, (0,), Leg("a", "dev-a"), Leg("b", "dev-b"))
ADDRESSES4 = {"src": "10.0.0.1", "dst": "10.0.0.2"}
ADDRESSES6 = {"src": "fd00::1", "dst": "fd00::2"}


@pytest.fixture(scope="module")
def fill() -> Callable[[bytes], tuple[bool, bytes]]:
    """The library's own function: (whether it computed a checksum, the packet afterwards)."""
    library = find_queue_library()
    assert library is not None, "run `make setup`"
    function = ctypes.CDLL(str(library)).hairpin_fill_checksum
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t]

    def call(packet: bytes) -> tuple[bool, bytes]:
        # A guard behind the packet shows a write beyond its end.
        buffer = ctypes.create_string_buffer(packet + b"GUARD", len(packet) + 5)
        done = function(buffer, len(packet))
        assert buffer.raw[len(packet) :] == b"GUARD"
        return bool(done), buffer.raw[: len(packet)]

    return call


def fold(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) // 2 * 2]))
    total += data[-1] << 8 if len(data) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def build_partial(packet: Packet, *, length: bool = True) -> bytes:
    """The packet as a sender leaves it to its card: the field holds the pseudo header's sum."""
    layer = TCP if TCP in packet else UDP
    size = len(bytes(packet[layer]))
    protocol = 6 if layer is TCP else 17
    pseudo = bytes(packet)[12:20] if IP in packet else bytes(packet)[8:40]
    pseudo += struct.pack(">HH", protocol, size if length else 0)
    packet[layer].chksum = fold(pseudo)
    return bytes(packet)


def build_whole(packet: Packet) -> bytes:
    layer = TCP if TCP in packet else UDP
    packet = packet.copy()
    packet[layer].chksum = None
    return bytes(packet)


PAYLOADS = st.integers(0, 65_000).map(lambda size: bytes(byte % 251 for byte in range(size)))
HEADERS = {
    "IPv4": IP(**ADDRESSES4),
    "IPv4, options": IP(**ADDRESSES4, options=[b"\x01" * 8]),
    "IPv6": IPv6(**ADDRESSES6),
    "IPv6, options": IPv6(**ADDRESSES6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(),
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("layer", [TCP, UDP])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 1460, 64_001])
def test_the_checksum_is_what_the_card_would_have_computed(
    fill: Callable[[bytes], tuple[bool, bytes]], header: str, layer: type[Packet], size: int
) -> None:
    whole = HEADERS[header] / layer(sport=1, dport=2) / Raw(bytes(i % 251 for i in range(size)))
    done, filled = fill(build_partial(whole))
    assert done
    # For UDP 0 means "none", so a sum of 0 is sent as 0xffff; both are the same number.
    assert filled == build_whole(whole)


def test_a_cut_packet_may_have_its_pseudo_header_without_a_length(
    fill: Callable[[bytes], tuple[bool, bytes]],
) -> None:
    packet = HEADERS["IPv4"] / TCP(sport=1, dport=2) / Raw(b"x" * 30_000)
    assert fill(build_partial(packet, length=False)) == (True, build_whole(packet))


FORGED = {
    "a wrong checksum": lambda: build_partial_with(0x1234),
    "a fragment": lambda: bytes(IP(**ADDRESSES4, flags="MF") / TCP() / Raw(b"x" * 40)),
    "a later fragment": lambda: bytes(IP(**ADDRESSES4, frag=9) / TCP() / Raw(b"x" * 40)),
    "a fragment of IPv6": lambda: bytes(IPv6(**ADDRESSES6) / IPv6ExtHdrFragment() / TCP()),
    "a header longer than the packet": lambda: b"\x4f" + b"\0" * 19,
    "a length beyond the packet": lambda: b"\x45\0\xff\xff" + b"\0" * 16,
    "no header": lambda: b"\x45",
    "nothing that is known": lambda: b"\x00" * 64,
    "another protocol": lambda: bytes(IP(**ADDRESSES4, proto=47) / Raw(b"x" * 40)),
}


def build_partial_with(checksum: int) -> bytes:
    return bytes(IP(**ADDRESSES4) / TCP(sport=1, dport=2, chksum=checksum) / Raw(b"attack"))


@pytest.mark.parametrize("name", FORGED)
def test_what_is_no_prepared_packet_stays_as_it_is(
    fill: Callable[[bytes], tuple[bool, bytes]], name: str
) -> None:
    packet = FORGED[name]()
    assert fill(packet) == (False, packet)


@given(packet=st.binary(max_size=200))
def test_any_bytes_are_survived(packet: bytes) -> None:
    library = find_queue_library()
    assert library is not None
    function = ctypes.CDLL(str(library)).hairpin_fill_checksum
    buffer = ctypes.create_string_buffer(packet + b"GUARD", len(packet) + 5)
    function(buffer, ctypes.c_size_t(len(packet)))
    assert buffer.raw[len(packet) :] == b"GUARD"


def test_the_engine_is_started_with_the_library() -> None:
    argv = render_start(Path("/s"), "u", LANE, Path("/c"), Path("/lib/q.so"))
    assert argv[argv.index("--") + 1 :] == (
        "env", "LD_PRELOAD=/lib/q.so", "/s", "-c", "/c", "-v", "-q", "0",
    )  # fmt: skip
    assert "env" not in render_start(Path("/s"), "u", LANE, Path("/c"))


def counters(largest: int) -> EngineCounters:
    return EngineCounters(pid=1, started=0.0, at=1.0, largest_packet=largest)


@pytest.mark.parametrize(
    ("wanted", "built", "log", "largest", "state", "reason"),
    [
        (False, True, ACCEPTED, 60_000, "off", "inspection.superPackets is false"),
        (True, False, "", 0, "off", "was not built"),
        (True, True, "", 0, "off", "without the library"),
        (True, True, f"{ACCEPTED}\n{REFUSED} by the kernel", 0, "off", "refuses them"),
        (True, True, f"i: x\n{ACCEPTED}\n", 1500, "ready", "none came yet"),
        (True, True, ACCEPTED, 1501, "on", ""),
    ],
)
def test_the_state_is_what_was_seen(
    wanted: bool, built: bool, log: str, largest: int, state: str, reason: str
) -> None:
    found = find_super_packets(wanted=wanted, built=built, log=log, counters=counters(largest))
    assert (found.state, found.largest) == (SuperPacketState(state), largest)
    assert reason in found.reason


def test_nothing_is_claimed_of_an_engine_that_was_not_asked() -> None:
    found = find_super_packets(wanted=True, built=True, log=ACCEPTED, counters=None)
    assert found.state is SuperPacketState.READY
