"""What is published of a lane's packets, from what kernel and engine told. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.inspection.netfilter import FrameSample, QueueCounters
from appliance.inspection.publish import EngineCounters, LaneCounters, QueueState
from steering.model import Lane


def build_queue_states(lane: Lane, counters: Sequence[QueueCounters]) -> tuple[QueueState, ...]:
    """The lane's own among the kernel's queues, in the order of their numbers."""
    return tuple(
        QueueState(
            number=seen.number,
            waiting=seen.waiting,
            dropped=seen.dropped,
            user_dropped=seen.user_dropped,
            packets=seen.packets,
            listener=seen.listener,
        )
        for seen in sorted(counters, key=lambda seen: seen.number)
        if seen.number in lane.queues
    )


def build_lane_counters(
    lane: Lane, frames: FrameSample | None, engine: EngineCounters | None
) -> LaneCounters:
    """What is published of a lane's packets; `frames` and `engine` are None while nothing was read."""
    if frames is None or (seen := frames.lanes.get(lane.number)) is None:
        return LaneCounters(engine=engine)
    return LaneCounters(
        frames_at=frames.at,
        frames_since=frames.since,
        frames_in_tagged=seen.in_tagged,
        frames_in_untagged=seen.in_untagged,
        frames_out_tagged=seen.out_tagged,
        frames_out_untagged=seen.out_untagged,
        frames_refused=seen.refused,
        frames_unmarked=seen.unmarked,
        frames_took=frames.took,
        frames_queues=build_queue_states(lane, frames.queues),
        engine=engine,
    )
