"""What `inspection.json` counts of a lane, against frames that were really sent and really came."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from appliance.inspection.publish import LaneCounters
from tests.support.inspection_lane import (
    MAC_A,
    MAC_B,
    RULES,
    V4,
    V6,
    VLAN,
    A,
    B,
    LaneLab,
    Sniffer,
    in_namespace,
    open_lane,
    wait_for,
)

pytestmark = [pytest.mark.lab]

DROPPED_WORD = b"NEVER-ARRIVES"
RULE = (
    f'drop udp any any -> any any (msg:"word"; content:"{DROPPED_WORD.decode()}"; sid:3; rev:1;)\n'
)


@pytest.fixture(scope="module")
def lane_lab() -> Iterator[LaneLab]:
    with open_lane() as lab:
        lab.write_rules(RULES + RULE)
        lab.running()
        yield lab


def send(count: int, *layers: Packet, payload: bytes = b"marker", **ether: str) -> None:
    """Frames from one client to the other, slowly enough that the queue never fills."""
    frame = Ether(**{"src": MAC_A, "dst": MAC_B, **ether})
    for layer in layers:
        frame = frame / layer
    with in_namespace(A, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as sender:
        sender.bind(("a0", 0))
        for _ in range(count):
            sender.send(bytes(frame / Raw(payload)))
            time.sleep(0.001)


def read(lab: LaneLab) -> LaneCounters:
    lane = lab.lane()
    assert lane is not None
    return lane.counters


def settle(lab: LaneLab) -> LaneCounters:
    """The counters after everything that was sent until now is in them: read after now."""
    now = time.time()

    def fresh() -> LaneCounters | None:
        found = read(lab)
        # The engine's packet threads sum up every 3 s, and the engine tells the sum every second.
        recent = found.frames_at is not None and found.frames_at > now
        return found if recent and found.engine is not None and found.engine.at > now + 5 else None

    return wait_for(fresh, 12)  # type: ignore[no-any-return]


def test_frames_are_counted_by_tag_in_and_out_and_by_the_engine(lane_lab: LaneLab) -> None:
    before = settle(lane_lab)
    sniffer = Sniffer(B, "b0")
    send(40, Dot1Q(vlan=VLAN), *V4)
    send(7, Dot1Q(vlan=VLAN), *V6)
    send(20, *V4)
    send(3, Dot1Q(vlan=VLAN), *V4, payload=DROPPED_WORD)
    send(5, Dot1Q(vlan=VLAN), ARP())
    send(6, Dot1Q(vlan=VLAN + 1), *V4)
    arrived = len([frame for frame in sniffer.read() if b"marker" in frame])
    sniffer.socket.close()
    after = settle(lane_lab)
    assert arrived == 67
    assert after.frames_in_tagged - before.frames_in_tagged == 50
    assert after.frames_out_tagged - before.frames_out_tagged == 47
    # The clients say a little of themselves meanwhile, untagged (router solicitations).
    plain = after.frames_in_untagged - before.frames_in_untagged
    assert plain == after.frames_out_untagged - before.frames_out_untagged
    assert 20 <= plain < 40
    assert 11 <= after.frames_refused - before.frames_refused < 30
    assert before.engine is not None
    assert after.engine is not None
    assert after.engine.pid == before.engine.pid
    # Its word may be older than the frames that were counted, so the whole is compared.
    assert after.engine.packets - before.engine.packets >= 70
    assert after.engine.packets <= after.frames_in_tagged + after.frames_in_untagged
    assert after.engine.packets == after.engine.accepted + after.engine.blocked
    assert after.engine.blocked - before.engine.blocked == 3
    assert after.engine.drop_reasons == {"rules": 3}


def test_counters_say_since_when_and_of_which_engine(lane_lab: LaneLab) -> None:
    lane = wait_for(lambda: (now := lane_lab.lane()) and now.counters.engine and now, 15)
    assert lane.counters.engine is not None
    assert (lane.counters.engine.pid, lane.counters.engine.started) == (lane.pid, lane.started)
    since = lane.counters.frames_since
    assert since is not None
    assert since < (lane.counters.frames_at or 0)
    assert [queue.listener for queue in lane.queues] == [lane.pid]
    # Written again, the rules count from 0.
    lane_lab.end()
    lane_lab.running()
    send(2, Dot1Q(vlan=VLAN), *V4)
    later = settle(lane_lab)
    assert (later.frames_since or 0) > since
    assert later.frames_in_tagged == 2
    assert later.engine is not None
    assert later.engine.pid != lane.pid
