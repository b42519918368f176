"""The flows of Hairpin's own port, by which each lane is proved; `steering/canary.py` says what a canary is.

A canary takes the way of a VM's packet through the same tables, always by its lane's closed groups: one
that went round a dead engine would prove nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from steering.canary import SOURCE_MAC, build_destination_mac
from steering.flows import IP_KEYWORDS, FlowBook, build_match, go_to, set_register
from steering.model import Lane, OnFailure
from steering.pipeline import (
    CANARY_PRIORITY,
    CookieKind,
    Register,
    Table,
    build_cookie,
    build_steer_key,
)


def find_canary_macs(lanes: Sequence[Lane]) -> frozenset[str]:
    """Every MAC that is a canary's, as sender or receiver; no VM may have one."""
    ends = (
        build_destination_mac(lane, answer=answer) for lane in lanes for answer in (False, True)
    )
    return frozenset((SOURCE_MAC, *ends))


def add_canary(book: FlowBook, canary: int, lanes: Sequence[Lane]) -> None:
    """From the port ``canary`` (ofport) into each lane by either leg, and back to it; nothing else."""
    shared = build_cookie(CookieKind.CANARY)
    network = set_register(Register.NETWORK.value, 0)
    book.add(
        Table.CLASSIFY,
        200,
        build_match(in_port=canary),
        f"{network},{go_to(Table.GUARD)}",
        shared,
    )
    tagged = build_match(in_port=canary, vlan_tci="0x1000/0x1000")
    book.add(Table.GUARD, 200, tagged, "drop", shared)
    book.add(Table.GUARD, 90, build_match(in_port=canary), "drop", shared)
    for mac in sorted(find_canary_macs(lanes)):
        book.add(Table.GUARD, 80, build_match(dl_src=mac), "drop", shared)
    for lane in lanes:
        for answer in (False, True):
            _add_way(book, canary, lane, answer=answer)


def _add_way(book: FlowBook, canary: int, lane: Lane, *, answer: bool) -> None:
    cookie = build_cookie(CookieKind.CANARY, lane.number)
    mac = build_destination_mac(lane, answer=answer)
    destination = set_register(Register.DESTINATION.value, canary)
    for ip in IP_KEYWORDS:
        own = build_match(ip, in_port=canary, dl_src=SOURCE_MAC, dl_dst=mac)
        book.add(Table.GUARD, 100, own, go_to(Table.ENDPOINT), cookie)
        there = build_match(ip, in_port=canary, dl_dst=mac)
        book.add(Table.ENDPOINT, 110, there, f"{destination},{go_to(Table.CONNECTION)}", cookie)
    key = set_register(Register.STEER.value, build_steer_key(lane, OnFailure.CLOSED, answer=answer))
    steered = build_match(in_port=canary, dl_dst=mac)
    book.add(Table.POLICY, CANARY_PRIORITY, steered, f"{key},{go_to(Table.COMMIT)}", cookie)
    book.add(Table.DELIVER, 100, build_match(dl_dst=mac), f"output:{canary}", cookie)
