"""Which tricks are tried, and which of them must not arrive even when they carry nothing hostile. Pure.

The names are those of `attacker`, `attacker_datagrams` and `attacker_frames`.
"""

from __future__ import annotations

FAMILIES = (4, 6)


def _build(prefix: str, words: str) -> tuple[str, ...]:
    return tuple(prefix + word for word in words.split())


_FRAGMENTS = _build(
    "fragments-",
    "8 24 64 1400 24-reversed 1400-reversed 1400-shuffled 24-doubled 1400-doubled "
    "48-junk-first 48-junk-last 1400-junk-first 1400-junk-last 48-half-over "
    "1400-half-over 24-port 24-teardrop 1400-no-first 24-other-first 1400-other-first "
    "1400-other-second 1400-other-last 1400-other-between 24-late-short 1400-late-short",
)
_MACS = _build("mac-", "broadcast multicast group neighbour unknown target multicast-source")
# q: 802.1Q, d: 802.1ad, p: priority tag. 3901 and 3902 are the lanes' own ids.
_TAGS = _build(
    "tags-",
    "q0 p0 d0 q7 q3901 q3902 d3901 d3902 q7-q3901 q3901-q7 q3901-q3902 d3901-q7 d7-q3901 "
    "q3901-d7 q7-d3901 q0-q3901 q3901-q0",
)
_OPTIONS = _build(
    "option-",
    "nop record-route timestamp router-alert loose-route strict-route security unknown "
    "bad-length after-end",
)
_CHAINS = _build(
    "chain-", "D DD DDD DDDDD H HD HH R RR S SS HDRD HDDRDD F FD DF FF A M X U UDD RDDD DDR DDDR"
)
_CUTS = _build("cut-", "D-24 DDD-24 RR-24 D-1400 DDD-1400 H-24")
_STREAM = _build(
    "",
    "bytewise bytewise-reversed syn-data overlap overlap-junk-first left-overlap "
    "junk-bad-checksum junk-hop-limit junk-no-ack junk-no-flags junk-bad-ack junk-signed "
    "junk-syn junk-old-stamp finish-with-data no-push congestion reset-out-of-window "
    "reset-in-window reset-bad-checksum reset-bad-ack reset-signed finish-bad-checksum "
    "finish-out-of-window syn-again bad-options split-by-time forged-opener-0 "
    "forged-opener-1 forged-opener-2 decoy-syn-bad-checksum decoy-syn-signed "
    "decoy-syn-reset decoy-request",
)

SHAPES = {
    4: ("plain", *_FRAGMENTS, *_MACS, *_TAGS, "ttl-1", "trailing", "snap", *_OPTIONS, "evil"),
    6: ("plain", *_FRAGMENTS, *_MACS, *_TAGS, "ttl-1", "trailing", "snap", *_CHAINS, *_CUTS),
}
REQUESTS = {
    4: (*SHAPES[4], *_STREAM, "junk-bad-ip-checksum", "whole-option-nop"),
    6: (*SHAPES[6], *_STREAM, "whole-chain-D", "whole-chain-DDD", "whole-chain-RR"),
}
_CARRIERS = _build(
    "",
    "to-53 to-68 to-3784 to-4789 to-3544 to-6081 from-53 from-67 from-3784 from-4789 "
    "spoofed checksum-none checksum-bad length-short length-long length-zero udplite "
    "experiment error in-same in-other in-gre in-gre-ethernet in-vxlan in-geneve "
    "in-teredo in-twice",
)
# Unicast, and neither IP nor ARP.
_FRAMES = _build("frame-", "experiment mpls pppoe")
DATAGRAMS = {
    4: (
        *(f"udp-{shape}" for shape in SHAPES[4]),
        *(f"icmp-{shape}" for shape in ("plain", "fragments-1400", "fragments-24", *_OPTIONS)),
        *_CARRIERS,
        "all-subnet-unicast",
        "all-hosts-unicast",
        *_FRAMES,
    ),
    6: (
        *(f"udp-{shape}" for shape in SHAPES[6]),
        *(f"icmp-{shape}" for shape in ("plain", "fragments-1400", "fragments-24", *_CHAINS)),
        *_CARRIERS,
        *_FRAMES,
    ),
}
# No policy names these: they go direct (docs/pipeline.md), and so does what they carry.
DIRECT = {
    4: ("all-limited", "all-subnet", "all-hosts", "frame-arp"),
    6: ("all-hosts", "frame-solicitation", "frame-advertisement"),
}

# Benign frames of these kinds that a target would take, and that do not arrive; and why that is right.
_SMALL = "the switch's userspace conntrack holds fragments below 1,200 bytes (1,280 in IPv6)"
_INSIDE = "the switch's userspace conntrack does not put together what has headers inside"
_OWN = (
    "the sender contradicts itself: the engine keeps what came first, and drops what does not fit"
)
_UNREADABLE = "the engine can't take it apart, and what is not inspected does not pass"
LOST = {
    **{shape: _SMALL for shape in _FRAGMENTS if "1400" not in shape},
    **{
        shape: _OWN
        for shape in _FRAGMENTS
        if "-other" in shape or "junk" in shape or "short" in shape
    },
    "fragments-1400-half-over": _OWN,
    **dict.fromkeys(_CUTS, _INSIDE),
    "snap": "an IP packet in an LLC frame: a bridge of the service host takes it for no IP",
    "syn-data": "a SYN with data is dropped; a client sends the data again after the handshake",
    **dict.fromkeys(
        ("junk-signed", "decoy-syn-signed", "forged-opener-1", "decoy-request", "decoy-syn-reset"),
        _OWN,
    ),
    **dict.fromkeys(
        ("length-zero", "length-long", "udplite", "experiment", "in-same", "chain-X"), _UNREADABLE
    ),
    "option-bad-length": _UNREADABLE,
}


def find_reason(mode: str) -> str:
    """Why the benign frames of a mode need not arrive; "" where they must."""
    bare = mode.removeprefix("udp-").removeprefix("icmp-")
    return LOST.get(bare, "")


def is_delivered(mode: str, arrival: str) -> bool:
    """Whether the payload of a datagram arrived. ``arrival``: "socket", "wire" or "".

    A part of a datagram that came to the wire is none of it for a program; a whole one might be.
    """
    cut = "fragments" in mode or "cut-" in mode
    return arrival == "socket" or (arrival == "wire" and not cut)
