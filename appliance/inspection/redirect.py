"""The door to `tc`: frames of connections that may go leave by a lane's third leg instead of the other one.

On each of the legs A and B stands a filter behind everything else: a frame whose mark has the final bit is sent
to leg C's device. It stands only while that device carries: a redirection to a device that is down drops.
Sources: tc-bpf(8), tc-mirred(8); classic BPF as linux/filter.h has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import structlog
from pydantic import BaseModel, TypeAdapter, ValidationError
from pyroute2 import IPRoute, NetlinkError
from pyroute2.netlink.rtnl import RTMGRP_LINK

from appliance.inspection.shortcut import FINAL
from steering.errors import CommandFailed
from steering.model import Lane
from steering.run import run_async

log = structlog.get_logger("inspection.redirect")

IFF_UP, IFF_RUNNING = 0x1, 0x40
PREFERENCE = "1"
LOAD_MARK = 2**32 - 4096 + 20
"""SKF_AD_OFF + SKF_AD_MARK (linux/filter.h): where classic BPF loads a packet's mark from."""
PROGRAM = (
    (0x20, 0, 0, LOAD_MARK),  # ld mark
    (0x54, 0, 0, FINAL),  # and
    (0x15, 1, 0, 0),  # jeq 0: no match
    (0x06, 0, 0, 0xFFFF_FFFF),
    (0x06, 0, 0, 0),
)


class _Instruction(BaseModel):
    code: int
    jt: int
    jf: int
    k: int


class _Bytecode(BaseModel):
    insns: tuple[_Instruction, ...] = ()


class _Action(BaseModel):
    kind: str = ""
    mirred_action: str = ""
    direction: str = ""
    to_dev: str = ""


class _Options(BaseModel):
    bytecode: _Bytecode = _Bytecode()
    actions: tuple[_Action, ...] = ()


class _Filter(BaseModel):
    kind: str = ""
    protocol: str = ""
    pref: int = 0
    options: _Options | None = None


_LISTING = TypeAdapter(tuple[_Filter, ...])


@dataclass(frozen=True, slots=True)
class RedirectReport:
    """One lane's redirection. ``off``: why frames can't leave by leg C, empty when they can; ``changes``:
    what was not as it should be and was mended."""

    off: str = ""
    changes: tuple[str, ...] = ()


def render_program() -> str:
    """The filter's program as `tc` takes it: the number of instructions, then each."""
    return ",".join([str(len(PROGRAM)), *(" ".join(map(str, one)) for one in PROGRAM)])


def render_filter(device: str, target: str) -> tuple[str, ...]:
    """The command that puts the filter on a leg's device, whose qdisc `clsact` is there."""
    return (
        "tc", "filter", "replace", "dev", device, "egress", "pref", PREFERENCE, "handle", "1",
        "protocol", "all", "bpf", "bytecode", render_program(),
        "action", "mirred", "egress", "redirect", "dev", target,
    )  # fmt: skip


def find_filter_faults(listed: str, device: str, target: str) -> tuple[str, ...]:
    """How the egress filters of a leg, as `tc -j filter show` tells them, differ from the one there should be."""
    try:
        # Each is listed twice, first without its options.
        filters = [one for one in _LISTING.validate_json(listed or "[]") if one.options is not None]
    except ValidationError:
        return (f"the filters on {device} can't be read",)
    if not filters:
        return (f"no filter on {device}",)
    if len(filters) > 1:
        return (f"{len(filters)} filters on {device}",)
    one, options = filters[0], filters[0].options or _Options()
    program = tuple((step.code, step.jt, step.jf, step.k) for step in options.bytecode.insns)
    actions = [
        (action.kind, action.mirred_action, action.direction, action.to_dev)
        for action in options.actions
    ]
    wanted = ("bpf", "all", int(PREFERENCE), PROGRAM, [("mirred", "redirect", "egress", target)])
    if (one.kind, one.protocol, one.pref, program, actions) != wanted:
        return (f"another filter on {device}",)
    return ()


def find_carrier_fault(device: str, link: Any | None) -> str:
    """Why nothing can be sent by a device, from its netlink message; empty when it carries."""
    if link is None:
        return f"device: no device {device} in the service host"
    if not link["flags"] & IFF_UP:
        return f"device: {device} is down"
    if not link["flags"] & IFF_RUNNING:
        return f"device: {device} has no carrier"
    return ""


async def _find_faults(device: str, target: str) -> tuple[str, ...]:
    shown = await run_async(("tc", "-j", "filter", "show", "dev", device, "egress"), check=False)
    return find_filter_faults(shown.stdout if shown.status == 0 else "[]", device, target)


async def write_redirection(lane: Lane, shut: Callable[[], None]) -> RedirectReport:
    """Make a lane's filters right, or take them away while leg C's device does not carry. Idempotent.

    ``shut`` is called before anything is taken away: from then on no frame may want to leave by leg C.
    """
    if lane.leg_c is None:
        return RedirectReport()
    target = lane.leg_c.device
    devices = (lane.leg_a.device, lane.leg_b.device, target)
    try:
        links = dict(zip(devices, await asyncio.to_thread(_find_links, devices), strict=True))
    except (NetlinkError, OSError) as fault:
        return RedirectReport(off=f"device: netlink refused: {fault}")
    legs = [device for device in devices[:2] if links[device] is not None]
    off = find_carrier_fault(target, links[target])
    if not off and len(legs) < 2:
        off = "device: a leg's device is missing"
    if off:
        shut()
    changes: list[str] = []
    try:
        for device in legs:
            faults = await _find_faults(device, target)
            if off:
                if faults != (f"no filter on {device}",):
                    await _remove_filters(device)
                    changes.append(f"filter taken from {device}")
                continue
            if not faults:
                continue
            # All of them: another one might stand before it. What is on the way in is not ours.
            shut()
            await _remove_filters(device)
            await run_async(("tc", "qdisc", "add", "dev", device, "clsact"), check=False)
            await run_async(render_filter(device, target))
            changes += faults
            if left := await _find_faults(device, target):
                return RedirectReport(f"filter: {'; '.join(left)}", tuple(changes))
    except CommandFailed as fault:
        # The device may have gone meanwhile, for which `tc` has other words.
        with contextlib.suppress(NetlinkError, OSError):
            links = {target: (await asyncio.to_thread(_find_links, (target,)))[0]}
        off = find_carrier_fault(target, links[target]) or f"filter: {fault.reason}"
        return RedirectReport(off, tuple(changes))
    if changes:
        log.info("redirection changed", lane=lane.name, changes=changes, off=off)
    return RedirectReport(off, tuple(changes))


async def remove_redirection(lane: Lane) -> None:
    """Take both filters away, whatever there is."""
    for leg in (lane.leg_a, lane.leg_b) if lane.leg_c is not None else ():
        await _remove_filters(leg.device)


async def _remove_filters(device: str) -> None:
    await run_async(("tc", "filter", "del", "dev", device, "egress"), check=False)


def _find_links(names: tuple[str, ...]) -> tuple[Any | None, ...]:
    with IPRoute() as netlink:
        return tuple(
            netlink.get_links(index[0])[0] if (index := netlink.link_lookup(ifname=name)) else None
            for name in names
        )


@contextlib.contextmanager
def watch_links(on_change: Callable[[], None]) -> Iterator[None]:
    """Call ``on_change`` in the running loop whenever the kernel tells of a device (rtnetlink(7)).

    What it tells is not read: whoever is called looks for himself. Raises OSError.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as watcher:
        watcher.setblocking(False)
        watcher.bind((0, RTMGRP_LINK))

        def drain() -> None:
            with contextlib.suppress(OSError):
                while watcher.recv(2**16):
                    pass
            on_change()

        loop.add_reader(watcher.fileno(), drain)
        try:
            yield
        finally:
            loop.remove_reader(watcher.fileno())
