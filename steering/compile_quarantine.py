"""The flows that shut a VM off: nothing that it sends passes, and nothing that is for it alone. Pure.

They stand above all else that concerns VMs, so they hold whatever policies, guard and lanes say. Frames for
many still reach its port, since NORMAL floods them; it can't answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from steering.flows import Flow, FlowBook, build_match
from steering.model import Machine
from steering.pipeline import CookieKind, Table, build_cookie

FROM_PRIORITY = 295  # above a lane's VLAN (290), below a leg (300)
TO_PRIORITY = 280  # above VMs (200)
DELIVERY_PRIORITY = 110  # what was in a lane as it was shut off


def add_quarantine(
    book: FlowBook, machines: Iterable[Machine], quarantined: frozenset[str]
) -> None:
    """For all ports of these VMs, also those that can't be steered for their MAC."""
    told: set[str] = set()
    ports = (p for machine in machines if machine.vm_id in quarantined for p in machine.ports)
    for port in ports:
        cookie = build_cookie(CookieKind.QUARANTINE, port.ofport)
        if port.ofport > 0:
            match = build_match(in_port=port.ofport)
            book.add(Table.CLASSIFY, FROM_PRIORITY, match, "drop", cookie)
        if port.mac and port.mac not in told:
            told.add(port.mac)
            match = build_match(dl_dst=port.mac)
            book.add(Table.CLASSIFY, TO_PRIORITY, match, "drop", cookie)
            book.add(Table.DELIVER, DELIVERY_PRIORITY, match, "drop", cookie)


def find_quarantine_flows(
    machines: Sequence[Machine], quarantined: frozenset[str]
) -> tuple[Flow, ...]:
    """The flows of `add_quarantine` alone."""
    book = FlowBook()
    add_quarantine(book, machines, quarantined)
    return tuple(book.flows())
