"""The frame that keeps nfstream's clock going on a quiet port.

nfstream looks for expired flows only when an IP packet arrives. So packets are sent into the
capture device all the time: IPv6 between two addresses of the discard-only block
(RFC 6666), hop limit 1, UDP to the discard port (RFC 863), in a frame to a group address that
no bridge forwards (IEEE 802.1Q, table 8-1). Its source MAC is drawn anew by each observer, so
that no VM can dress its traffic up as a heartbeat and stay out of the records.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Protocol

DST_MAC = "01:80:c2:00:00:0f"
SRC_ADDRESS = "100::1"
DST_ADDRESS = "100::2"
DISCARD_PORT = 9
_FIRST_PORT = 49152
_PORTS = 65536 - _FIRST_PORT
_UDP = 17


class _Flow(Protocol):
    src_mac: str
    dst_mac: str
    src_ip: str
    dst_ip: str
    src_port: int


def build_mac(random: bytes) -> str:
    """A locally administered unicast MAC of six random bytes."""
    return ":".join(f"{byte:02x}" for byte in (random[0] & 0xFC | 0x02, *random[1:6]))


def find_port(beat: int) -> int:
    """The source port of a beat: each is a flow of its own.

    One long heartbeat flow would stand first in nfstream's cache, which is kept in the order of
    creation, and hold back the expiry of all flows behind it until its active timeout.
    """
    return _FIRST_PORT + beat % _PORTS


def find_beat(port: int, newest: int) -> int:
    """The beat that was sent from ``port``, when ``newest`` was the last one sent."""
    return newest - (newest - (port - _FIRST_PORT)) % _PORTS


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF or 0xFFFF


def build_frame(mac: str, beat: int) -> bytes:
    """The whole frame of one beat."""
    payload = b"hairpin-heartbeat "
    source = ipaddress.IPv6Address(SRC_ADDRESS).packed
    target = ipaddress.IPv6Address(DST_ADDRESS).packed
    length = 8 + len(payload)
    ports = struct.pack("!HH", find_port(beat), DISCARD_PORT)
    pseudo = source + target + struct.pack("!II", length, _UDP)
    checksum = _checksum(pseudo + ports + struct.pack("!HH", length, 0) + payload)
    return (
        bytes.fromhex((DST_MAC + mac).replace(":", ""))
        + struct.pack("!HIHBB", 0x86DD, 6 << 28, length, _UDP, 1)
        + source
        + target
        + ports
        + struct.pack("!HH", length, checksum)
        + payload
    )


def is_heartbeat(flow: _Flow, mac: str) -> bool:
    """Whether a metered flow is a beat of the observer that drew ``mac``."""
    return (
        flow.src_mac.lower() == mac
        and flow.dst_mac.lower() == DST_MAC
        and flow.src_ip == SRC_ADDRESS
        and flow.dst_ip == DST_ADDRESS
    )
