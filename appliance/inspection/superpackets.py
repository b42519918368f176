"""Whether an engine gets super-packets: told by what was seen of it. Pure.

A super-packet is what a sender's TCP hands to its card to be cut: up to 64 KiB with one header. Where
switch, links, queue and engine all take it whole, a verdict is given on 40 packets at once.
"""

from __future__ import annotations

from appliance.inspection.publish import EngineCounters, SuperPackets, SuperPacketState

USUAL_PACKET = 1500
"""Bytes from the IP header on; what is longer was put together, or comes from a link of jumbo frames."""

ACCEPTED, REFUSED = "hairpin: super-packets accepted", "hairpin: super-packets refused"
"""What the preloaded library says as it opens a queue (native/hairpin_queue.c)."""


def find_super_packets(
    *, wanted: bool, built: bool, log: str, counters: EngineCounters | None
) -> SuperPackets:
    """``wanted`` by the settings; ``built``: the library is there; ``log``: what the engine wrote."""
    largest = 0 if counters is None else counters.largest_packet

    def off(reason: str) -> SuperPackets:
        return SuperPackets(state=SuperPacketState.OFF, reason=reason, largest=largest)

    if not wanted:
        return off("inspection.superPackets is false")
    if not built:
        return off("the preloaded library was not built: run `make setup`")
    said = [line for line in log.splitlines() if line.startswith((ACCEPTED, REFUSED))]
    if not said:
        return off("the engine was started without the library, or did not open a queue yet")
    if said[-1].startswith(REFUSED):
        return off("the kernel's queue or libnetfilter_queue refuses them")
    if largest > USUAL_PACKET:
        return SuperPackets(state=SuperPacketState.ON, reason="", largest=largest)
    return SuperPackets(
        state=SuperPacketState.READY,
        reason="none came yet: the switch and the links must take them too (docs/inspection.md)",
        largest=largest,
    )
