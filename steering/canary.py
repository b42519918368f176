"""What a canary is: the addresses, ports and words by which switch, engine and store know it. Pure.

A canary is a pair of UDP packets that a port of Hairpin's own sends: a *control*, which must come back
to that port, and a *hostile* one, which the engine must drop and record. They take the way of a VM's
packets: tables, group, leg, bridge, queue, engine, leg, tables. What is not exactly such a frame is
dropped at the port. No address here is ever used by a VM: 198.18.0.0/15 is for benchmarks (RFC 2544),
the IPv6 ones are unique local addresses (RFC 4193).
"""

from __future__ import annotations

from dataclasses import dataclass

from steering.model import Family, Lane

SOURCE_MAC = "02:48:50:ca:00:00"
SOURCE = {Family.IPV4: "198.18.72.80", Family.IPV6: "fd48:5049:5250::80"}
DESTINATION = {Family.IPV4: "198.18.72.81", Family.IPV6: "fd48:5049:5250::81"}
PORT = 4850
SID = 4850999  # among the starter rules', which no feed may use
HOSTILE = "hairpin-canary"
CONTROL = "hairpin-control"


@dataclass(frozen=True, slots=True)
class Part:
    """One of the eight packets of a probe. ``answer``: it enters the lane by leg B, as answers do."""

    family: Family
    answer: bool
    hostile: bool

    @property
    def name(self) -> str:
        """Also what ends its payload, e.g. ``ipv4-opener``; the same for control and hostile."""
        return f"{self.family}-{'answer' if self.answer else 'opener'}"


PARTS = tuple(
    Part(family, answer, hostile)
    for family in Family
    for answer in (False, True)
    for hostile in (False, True)
)


def build_destination_mac(lane: Lane, *, answer: bool) -> str:
    """Tells the switch which lane the frame is for, and by which leg it enters."""
    return f"02:48:50:ca:{lane.number:02x}:{2 if answer else 1:02x}"


def build_payload(part: Part, ruleset: str, probe: str) -> bytes:
    """``ruleset`` is the token in the canary rule of the ruleset in force, ``probe`` a random one."""
    word = HOSTILE if part.hostile else CONTROL
    return f"{word} {ruleset} {probe} {part.name}\n".encode()


def build_rule(ruleset: str) -> str:
    """The rule that drops canaries, of a ruleset with this token: only an engine that runs exactly this

    ruleset drops a canary made for it.
    """
    sources = ",".join(SOURCE.values())
    destinations = ",".join(DESTINATION.values())
    return (
        f"drop udp [{sources}] any -> [{destinations}] {PORT} "
        f'(msg:"HAIRPIN canary"; content:"{HOSTILE} {ruleset} "; startswith; fast_pattern; '
        f"classtype:not-suspicious; sid:{SID}; rev:1;)"
    )
