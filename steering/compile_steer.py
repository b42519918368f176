"""The last step of what is inspected: by its lane's groups into the lane, or what its policy says of a failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from steering.compile_shortcut import has_third_leg
from steering.flows import FlowBook, Group, build_match, go_to, render_number
from steering.model import Lane, OnFailure
from steering.pipeline import (
    DELIVER_GROUP,
    CookieKind,
    Register,
    Table,
    build_cookie,
    build_group_id,
    build_steer_key,
)

BASE = build_cookie(CookieKind.BASE)
TRIGGER = Register.TRIGGER.value


def add_steer(book: FlowBook, lanes: Sequence[Lane]) -> None:
    book.add(Table.STEER, 100, build_match(reg2="0"), go_to(Table.DIRECT), BASE)
    for lane in lanes:
        cookie = build_cookie(CookieKind.LANE, lane.number)
        for on_failure in OnFailure:
            for answer in (False, True):
                key = build_steer_key(lane, on_failure, answer=answer)
                match = build_match(reg2=render_number(key))
                book.add(Table.STEER, 100, match, f"group:{build_group_id(key)}", cookie)


def build_groups(lanes: Sequence[Lane]) -> Iterator[Group]:
    """Fast failover in the switch itself: first bucket while BFD through the engine is up, then, if

    open, delivery without inspection, if closed, nothing. It needs no controller
    (ovs-vswitchd.conf.db(5), BFD).
    """
    yield Group(DELIVER_GROUP, "all", (f"actions={go_to(Table.DELIVER)}",))
    for lane in lanes:
        for on_failure in OnFailure:
            for answer in (False, True):
                leg = lane.leg_b if answer else lane.leg_a
                buckets: list[str] = []
                if leg.ofport > 0:
                    code = f"move:NXM_NX_{TRIGGER.upper()}[0..2]->OXM_OF_VLAN_PCP[],"
                    buckets.append(
                        f"watch_port:{leg.ofport},actions=push_vlan:0x8100,"
                        f"set_field:{0x1000 | lane.vlan}->vlan_vid,"
                        f"{code if has_third_leg(lane) else ''}output:{leg.ofport}"
                    )
                # Closed drops without a bucket, too, but only a bucket counts what is dropped.
                otherwise = go_to(Table.DELIVER) if on_failure is OnFailure.OPEN else "drop"
                buckets.append(f"watch_group:{DELIVER_GROUP},actions={otherwise}")
                key = build_steer_key(lane, on_failure, answer=answer)
                yield Group(build_group_id(key), "ff", tuple(buckets))
