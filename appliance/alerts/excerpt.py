"""The bytes that made a rule fire, as far as an alert carries them. Pure; all of it is hostile.

When a rule fires on a TCP stream, EVE's `payload` is what the stream held *before* the packet that
completed the attack; that packet itself stands in `packet` (Suricata 7, inline). An excerpt of the
payload's beginning would show the first request of a kept-alive connection, never the attack.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

RAW_IP = 12  # DLT_RAW of libpcap: the packet begins at its IP header
TCP = 6
_IPV6_HEADER = 40
_PRINTABLE = bytes(one if 32 <= one < 127 or one in (10, 13) else ord(".") for one in range(256))


def find_segment(event: Mapping[str, Any]) -> bytes:
    """What the alert's TCP packet carries, if the rule fired on a stream; else nothing."""
    info = event.get("packet_info")
    if event.get("stream") != 1 or not isinstance(info, dict) or info.get("linktype") != RAW_IP:
        return b""
    return cut_segment(
        cut_tags(read_base64(event.get("packet")), event.get("vlan"), event.get("pkt_src"))
    )


def cut_tags(packet: bytes, vlan: object, source: object) -> bytes:
    """The packet from its IP header on, of a connection that returned from a shortcut too.

    Of such a one the tags by which the engine tells it from others stand before it (docs/inspection.md).
    """
    if isinstance(vlan, list) and source == "gre tunnel":
        return packet[4 * len(vlan) :]
    return packet


def cut_segment(packet: bytes) -> bytes:
    """What a TCP packet (from its IP header on) carries; nothing where it is none."""
    if not packet:
        return b""
    version = packet[0] >> 4
    if version == 4 and len(packet) >= 20 and packet[9] == TCP:
        start, end = (packet[0] & 0xF) * 4, int.from_bytes(packet[2:4], "big")
    elif version == 6 and len(packet) >= _IPV6_HEADER and packet[6] == TCP:
        start, end = _IPV6_HEADER, _IPV6_HEADER + int.from_bytes(packet[4:6], "big")
    else:  # also IPv6 with extension headers: then the stream alone is shown
        return b""
    header = packet[start : start + 20]
    if len(header) < 20 or start < 20:
        return b""
    return packet[start + (header[12] >> 4) * 4 : end]


def append_segment(payload: object, printable: str, segment: bytes, limit: int) -> tuple[str, str]:
    """The stream's end with the segment: base64 of at most ``limit`` bytes, and as many characters."""
    stream = read_base64(payload)
    if not stream.endswith(segment):
        stream += segment
        printable += render_printable(segment)
    return base64.b64encode(stream[-limit:]).decode(), printable[-limit:]


def render_printable(data: bytes) -> str:
    """As the engine does in `payload_printable`: anything but ASCII text and line ends is a dot."""
    return data.translate(_PRINTABLE).decode("ascii")


def read_base64(value: object) -> bytes:
    """The bytes, or none where it is no base64."""
    if not isinstance(value, str):
        return b""
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return b""
