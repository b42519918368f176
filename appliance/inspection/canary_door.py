"""The door to the wire for canaries: packet sockets on the canary's device and on a lane's two legs.

They are opened for one probe and closed after it, so between probes they cost nothing (packet(7)).
Works in the network namespace of the calling thread, and blocks: for a thread of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import structlog

from appliance.inspection.canary import (
    SOURCE_PORTS,
    Sighting,
    Trace,
    build_expected,
    build_filter,
    build_frame,
    parse_frame,
    record_sighting,
)
from appliance.inspection.canary_client import PartReport, ProbeReport, ProbeRequest
from appliance.inspection.netfilter import QueueCounters
from steering.canary import PARTS, Part
from steering.errors import HairpinError
from steering.model import Lane

log = structlog.get_logger("inspection.canary")

SETTLE = 0.15
"""Seconds for which the hostile packets are waited for after the last control packet came back."""
FRAME_LIMIT = 2048
ALL = 0x0003  # ETH_P_ALL
SO_ATTACH_FILTER = 26
SOL_PACKET = 263
PACKET_AUXDATA = 8
AUXDATA = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata
VLAN_VALID = 1 << 4  # TP_STATUS_VLAN_VALID
PACKET_OUTGOING = 4


@dataclass(frozen=True, slots=True)
class Watch:
    """One device that is watched during a probe."""

    device: str
    socket: socket.socket


@contextlib.contextmanager
def open_watch(device: str) -> Iterator[Watch]:
    """A socket that takes canaries at a device, both ways. Raises HairpinError naming the device."""
    try:
        # No protocol yet: before the filter stands and the device is bound, nothing is taken.
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    except OSError as fault:
        raise HairpinError(
            f"no packet socket can be opened: {fault.strerror}", "give `inspect` CAP_NET_RAW"
        ) from fault
    with opened:
        try:
            write_filter(opened)
            opened.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
            opened.setblocking(False)
            opened.bind((device, ALL))
            # A device that is down is bound, and says so afterwards.
            if fault_number := opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(fault_number, "")
        except OSError as fault:
            raise _explain(device, fault) from fault
        yield Watch(device, opened)


def _explain(device: str, fault: OSError) -> HairpinError:
    if fault.errno == errno.ENODEV:
        return HairpinError(
            f"there is no device `{device}` in the service host",
            "attach it, or correct canary.device and the lanes' legs in the settings",
        )
    if fault.errno == errno.ENETDOWN:
        return HairpinError(
            f"the device `{device}` in the service host is down",
            "`inspect` sets it up again within 2 s; see what takes it down",
        )
    return HairpinError(f"canaries can't use the device `{device}`: {fault.strerror or fault}")


def write_filter(opened: socket.socket) -> None:
    """Have the kernel drop what is not a canary before it is queued to the socket."""
    program = b"".join(struct.pack("=HBBI", *step) for step in build_filter())
    held = ctypes.create_string_buffer(program)
    opened.setsockopt(
        socket.SOL_SOCKET,
        SO_ATTACH_FILTER,
        struct.pack("@HP", len(build_filter()), ctypes.addressof(held)),
    )


def read_sightings(watch: Watch, expected: Mapping[bytes, Part]) -> tuple[Sighting, ...]:
    """The canaries of this probe that came since it was read last; does not wait."""
    found: list[Sighting] = []
    while True:
        try:
            frame, said, _, address = watch.socket.recvmsg(
                FRAME_LIMIT, socket.CMSG_SPACE(AUXDATA.size)
            )
        except BlockingIOError:
            return tuple(found)
        except OSError as fault:
            # The device went away or down: what was seen until then counts.
            log.warning("canary not read", device=watch.device, reason=fault.strerror)
            return tuple(found)
        parsed = parse_frame(frame)
        if parsed is None or (part := expected.get(parsed[1])) is None:
            continue
        leaving = address[2] == PACKET_OUTGOING
        found.append(Sighting(watch.device, leaving, parsed[0] or parse_auxdata(said), part))


def parse_auxdata(said: list[tuple[int, int, bytes]]) -> int:
    """The VLAN that the kernel took out of a frame, 0 for none."""
    for level, kind, data in said:
        if level == SOL_PACKET and kind == PACKET_AUXDATA and len(data) >= AUXDATA.size:
            status, _, _, _, _, tag, _ = AUXDATA.unpack_from(data)
            return int(tag) & 0xFFF if status & VLAN_VALID else 0
    return 0


def run_probe(
    lane: Lane,
    canary: str,
    request: ProbeRequest,
    read_counters: Callable[[], tuple[QueueCounters, ...]],
) -> ProbeReport:
    """Send a probe's packets from the device `canary` and see how far each comes; blocks.

    Ends when every control packet is back and the hostile ones had time to be, else after
    `request.seconds`. What can't be sent at all is the report's fault; nothing is raised for it.
    """
    before = read_counters()
    traces = dict.fromkeys(PARTS, Trace())
    sent: frozenset[Part] = frozenset()
    fault = ""
    try:
        with contextlib.ExitStack() as stack:
            watches = tuple(
                stack.enter_context(open_watch(device))
                for device in (canary, lane.leg_a.device, lane.leg_b.device)
            )
            sent, fault = _send(watches[0], lane, request)
            if sent:
                _follow(watches, lane, canary, request, traces)
    except HairpinError as refused:
        fault = str(refused)
    queued, dropped = find_growth(lane, before, read_counters())
    report = ProbeReport(
        lane=lane.name,
        probe=request.probe,
        fault=fault,
        queued=queued,
        queue_dropped=dropped,
        parts=tuple(build_part_report(part, part in sent, traces[part]) for part in PARTS),
    )
    log.debug("canary", lane=lane.name, probe=request.probe, fault=fault, queued=queued)
    return report


def _send(watch: Watch, lane: Lane, request: ProbeRequest) -> tuple[frozenset[Part], str]:
    """What could be sent, and why the rest could not."""
    sent: set[Part] = set()
    fault = ""
    for part in PARTS:
        port = random.randint(*SOURCE_PORTS)  # noqa: S311 - spreads flows, hides nothing
        frame = build_frame(lane, part, request.ruleset, request.probe, port)
        try:
            watch.socket.send(frame)
        except OSError as refused:
            fault = str(_explain(watch.device, refused))
        else:
            sent.add(part)
    return frozenset(sent), fault


def _follow(
    watches: tuple[Watch, ...],
    lane: Lane,
    canary: str,
    request: ProbeRequest,
    traces: dict[Part, Trace],
) -> None:
    """Read what the devices see into `traces`, until the probe is over."""
    expected = build_expected(request.ruleset, request.probe)
    by_descriptor = {watch.socket.fileno(): watch for watch in watches}
    poll = select.poll()
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    end = time.monotonic() + request.seconds
    settled = False
    while (left := end - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left * 1000):
            for sighting in read_sightings(by_descriptor[descriptor], expected):
                part = sighting.part
                traces[part] = record_sighting(traces[part], sighting, lane, canary)
        if not settled and all(traces[part].returned for part in PARTS if not part.hostile):
            settled = True
            end = min(end, time.monotonic() + SETTLE)


def find_growth(
    lane: Lane, before: tuple[QueueCounters, ...], after: tuple[QueueCounters, ...]
) -> tuple[int, int]:
    """By how much a lane's queues grew: packets queued, packets dropped. A queue bound anew began at 0."""
    earlier = {seen.number: seen for seen in before}
    queued = dropped = 0
    for seen in after:
        if seen.number not in lane.queues:
            continue
        old = earlier.get(seen.number)
        fresh = old is None or old.packets > seen.packets
        queued += seen.packets - (0 if fresh or old is None else old.packets)
        lost = seen.dropped + seen.user_dropped
        dropped += lost - (0 if fresh or old is None else old.dropped + old.user_dropped)
    return queued, max(0, dropped)


def build_part_report(part: Part, sent: bool, trace: Trace) -> PartReport:
    return PartReport(
        family=part.family,
        answer=part.answer,
        hostile=part.hostile,
        sent=sent,
        entered=trace.entered,
        vlan=trace.vlan,
        left=trace.left,
        returned=trace.returned,
    )
