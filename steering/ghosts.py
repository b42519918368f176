"""Ports that are gone and what they leave behind: a MAC from and to which nothing passes for a while. Pure.

A VM's port may come back under another number. Until its flows are in, the switch would know nothing of
it, and NORMAL would carry its packets past every policy. So the MAC stays shut from the moment the port
is seen to be gone (its own flows shut it until then) to the bundle that steers it again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from steering.flows import PresentFlow
from steering.model import Port
from steering.pipeline import CookieKind, Table, parse_cookie

GHOST_SECONDS = 3600.0
GHOST_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class Ghost:
    """``since`` when the port is gone, in seconds of a clock that never jumps."""

    port: Port
    since: float


def build_ghosts(
    ghosts: Sequence[Ghost], before: Iterable[Port], present: Iterable[Port], now: float
) -> tuple[Ghost, ...]:
    """The ghosts once the steerable ports are no longer ``before`` but ``present``; oldest first.

    One goes when its MAC is steerable again, after GHOST_SECONDS, or when there are too many.
    """
    back = {port.mac for port in present}
    kept = [one for one in find_fresh(ghosts, now) if one.port.mac not in back]
    known = back | {one.port.mac for one in kept}
    gone = {port.mac: port for port in before if port.mac not in known}
    return (*kept, *(Ghost(port, now) for port in gone.values()))[-GHOST_LIMIT:]


def find_fresh(ghosts: Iterable[Ghost], now: float) -> tuple[Ghost, ...]:
    return tuple(one for one in ghosts if now - one.since < GHOST_SECONDS)


def find_guarded_ports(flows: Iterable[PresentFlow]) -> tuple[Port, ...]:
    """What the switch's own flows remember of ports in scope and ghosts, from before this process: MACs."""
    macs = set()
    for flow in flows:
        owner = parse_cookie(flow.cookie)
        found = _GUARDED.fullmatch(flow.key.match)
        if (
            found
            and owner is not None
            and owner[0] in (CookieKind.SPOOF, CookieKind.GHOST)
            and flow.key.table == Table.GUARD.number
        ):
            macs.add(found[1])
    return tuple(Port("", 0, mac, "", "", "") for mac in sorted(macs))


_GUARDED = re.compile(r"dl_src=((?:[0-9a-f]{2}:){5}[0-9a-f]{2})")


def find_moved_ports(owners: Mapping[int, str], ports: Iterable[Port]) -> tuple[int, ...]:
    """Of ``owners`` (vm-id by ofport) the ofports that are gone or now another VM's: what was learned is void."""
    now = {port.ofport: port.vm_id for port in ports}
    return tuple(ofport for ofport, owner in owners.items() if now.get(ofport) != owner)
