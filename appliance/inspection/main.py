"""`hairpin inspect`: the service host's part. Rules, bridges, one supervised engine per lane.

Order matters: queue rules stand before any bridge does, so that there is no moment in which a lane
forwards what nobody inspects. Ended in order (SIGTERM, SIGINT) it stops the engines and leaves rules
and bridges, so the lanes are closed; killed, it leaves engines that inspect, and adopts them later.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from appliance.inspection import bridge, engine, files, redirect
from appliance.inspection.canary_service import CanaryService
from appliance.inspection.faults import FaultBook
from appliance.inspection.netfilter import (
    Netfilter,
    QueueCounters,
    find_dialect,
    read_queue_counters,
)
from appliance.inspection.placement import find_placement
from appliance.inspection.process import read_cores
from appliance.inspection.publish import InspectionState, write_inspection_state
from appliance.inspection.queueing import check_queues
from appliance.inspection.supervisor import LaneSupervisor
from appliance.settings import Settings
from steering.errors import HairpinError, WrongInput
from steering.tasks import wait_at_most

log = structlog.get_logger("inspection")

NETWORK_PERIOD = 2.0
"""Seconds between two looks at rules and bridges."""
NETWORK_GAP = 0.05
PUBLISH_PERIOD = 1.0


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Be the only supervisor of this run directory. Raises HairpinError when there is another."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    # Close-on-exec (PEP 446): an engine that outlives us must not keep the lock.
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            raise HairpinError(
                f"another `hairpin inspect` holds {path}", "stop it first, or use another runDir"
            ) from fault
        yield


class Inspection:
    """Everything that `hairpin inspect` keeps right at once."""

    def __init__(
        self,
        settings: Settings,
        facts: engine.EngineFacts,
        netfilter: Netfilter,
        owner: files.Owner,
    ) -> None:
        self.settings = settings
        self.lanes = settings.build_lanes()
        self.netfilter = netfilter
        self.faults = FaultBook()
        self._changed = asyncio.Event()
        placements = find_placement(
            read_cores(),
            {lane.name: len(lane.queues) for lane in self.lanes},
            pinned=settings.inspection.pinned,
            nice=settings.inspection.nice,
        )
        self.supervisors = tuple(
            LaneSupervisor(settings, lane, facts, owner, self._changed.set, placements[lane.name])
            for lane in self.lanes
        )

    async def write_network(self) -> None:
        """Rules first, then bridges. Raises HairpinError."""
        await self.netfilter.apply()
        self._take_reports(await asyncio.to_thread(bridge.write_bridges, self.lanes), first=True)
        await self._write_canary(first=True)

    async def _write_canary(self, *, first: bool) -> None:
        """Its device may be missing or refuse: lanes inspect without it."""
        if self.settings.canary.interface is None:
            return
        device = self.settings.canary.device
        try:
            report = await asyncio.to_thread(
                bridge.write_lone_device, device, "the canary's", hears_all=True
            )
        except HairpinError as fault:
            self._note("canary device", fault.reason, fault.mend)
            return
        if report.missing:
            self._note(
                "canary device",
                f"no device {device} in the service host",
                "attach it, or correct canary.device in the settings; no lane is proved until then",
            )
            return
        self.faults.mend("canary device", time.time())
        if report.changes and not first:
            reason = f"the canary's device had been changed: {'; '.join(report.changes)}"
            self.faults.note_mended("canary changed", reason, "", time.time())

    async def keep_redirections(self) -> None:
        """Let connections go by the third legs while these carry, for ever; at once when a device changes."""
        if all(lane.leg_c is None for lane in self.lanes):
            return
        changed = asyncio.Event()
        first = True
        with redirect.watch_links(changed.set):
            while True:
                changed.clear()
                for supervisor in self.supervisors:
                    if (leg := supervisor.lane.leg_c) is not None:
                        await self._write_redirection(supervisor, leg.device, first=first)
                first = False
                self._changed.set()
                # Devices that come and go all the time must not keep us busy.
                await asyncio.sleep(NETWORK_GAP)
                with contextlib.suppress(TimeoutError):
                    await wait_at_most(changed.wait(), NETWORK_PERIOD)

    async def _write_redirection(
        self, supervisor: LaneSupervisor, device: str, *, first: bool
    ) -> None:
        """A third leg that is missing costs the shortcut, not inspection."""
        faults, now = supervisor.faults, time.time()
        try:
            seen = await asyncio.to_thread(bridge.write_lone_device, device, "leg C's")
        except HairpinError as fault:
            supervisor.shortcut.shut()
            faults.note("leg C", fault.reason, fault.mend, now)
            return
        report = await redirect.write_redirection(supervisor.lane, supervisor.shortcut.shut)
        supervisor.shortcut.take_redirection(report)
        if report.off:
            mend = (
                "see the device of legC in the settings; all goes on inspected, without a shortcut"
            )
            faults.note("leg C", f"no shortcut: {report.off}", mend, now)
        else:
            faults.mend("leg C", now)
        if (changes := (*seen.changes, *report.changes)) and not first:
            reason = f"the third leg had been changed: {'; '.join(changes)}"
            faults.note_mended("leg C changed", reason, "", now)

    def _note(self, kind: str, reason: str, mend: str) -> None:
        self.faults.note(kind, reason, mend, time.time())
        self._changed.set()

    def _note_canary(self, reason: str, mend: str) -> None:
        if reason:
            self._note("canary socket", reason, mend)
        else:
            self.faults.mend("canary socket", time.time())

    async def keep_network(self) -> None:
        """Mend what somebody changed in rules or bridges, for ever."""
        while True:
            await asyncio.sleep(NETWORK_PERIOD)
            try:
                if faults := await self.netfilter.find_faults():
                    log.warning("queue rules were changed", faults=faults)
                    await self.netfilter.apply()
                    self.faults.note_mended(
                        "rules",
                        f"the queue rules had been changed: {'; '.join(faults)[:600]}",
                        "written again; look for another program that changes this host's firewall",
                        time.time(),
                    )
                reports = await asyncio.to_thread(bridge.write_bridges, self.lanes)
                await self._write_canary(first=False)
            except HairpinError as fault:
                log.error("network not right", reason=fault.reason, mend=fault.mend)
                self.faults.note("network", fault.reason, fault.mend, time.time())
            else:
                self.faults.mend("network", time.time())
                self._take_reports(reports, first=False)

    def _take_reports(self, reports: tuple[bridge.BridgeReport, ...], *, first: bool) -> None:
        now = time.time()
        for supervisor, report in zip(self.supervisors, reports, strict=True):
            faults = supervisor.faults
            if report.missing:
                faults.note(
                    "devices",
                    f"no device {' and '.join(report.missing)} in the service host",
                    "attach it, or correct the lane's legs in the settings",
                    now,
                )
            else:
                faults.mend("devices", now)
            if len(set(report.mtus)) > 1:
                faults.note(
                    "mtu",
                    f"the legs differ in MTU ({' and '.join(map(str, report.mtus))})",
                    "give both the same MTU; frames between the two sizes are lost",
                    now,
                )
            else:
                faults.mend("mtu", now)
            if report.changes and not first:
                faults.note_mended(
                    "bridge", f"the bridge had been changed: {'; '.join(report.changes)}", "", now
                )
        self._changed.set()

    def build_state(self, now: float, counters: tuple[QueueCounters, ...]) -> InspectionState:
        return InspectionState(
            updated=now,
            pid=os.getpid(),
            dialect=str(self.netfilter.dialect),
            lanes=tuple(
                supervisor.build_state(now, counters, self.netfilter.frames)
                for supervisor in self.supervisors
            ),
            faults=self.faults.build(now),
        )

    def publish(self) -> None:
        state = self.build_state(time.time(), read_queue_counters())
        write_inspection_state(self.settings.inspection_state, state)

    async def keep_published(self) -> None:
        """Publish at every change, and at least once a second."""
        while True:
            self._changed.clear()
            try:
                self.publish()
            except OSError as fault:
                log.error("state not published", reason=str(fault))
            with contextlib.suppress(TimeoutError):
                await wait_at_most(self._changed.wait(), PUBLISH_PERIOD)

    async def run(self, stopping: asyncio.Event) -> None:
        """Until `stopping`; then the engines are ended in order. An error of ours leaves them."""
        await self.write_network()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.keep_network()),
                    group.create_task(self.keep_redirections()),
                    group.create_task(self.keep_published()),
                    *(
                        group.create_task(supervisor.run(read_queue_counters))
                        for supervisor in self.supervisors
                    ),
                ]
                if self.settings.canary.interface is not None:
                    service = CanaryService(self.settings, read_queue_counters, self._note_canary)
                    tasks.append(group.create_task(service.run()))
                await stopping.wait()
                for task in tasks:
                    task.cancel()
        except BaseException:
            for supervisor in self.supervisors:
                supervisor.leave()
            raise
        await asyncio.gather(*(supervisor.stop() for supervisor in self.supervisors))
        self.publish()


async def run_inspect(settings: Settings) -> int:
    """Supervise until SIGTERM or SIGINT; returns the exit status.

    Enters `inspection.netns` first, so it must own its process. Raises HairpinError and WrongInput
    for what forbids beginning at all: no user, no namespace, an engine that won't do.
    """
    lanes = settings.build_lanes()
    if faults := check_queues(lanes):
        raise WrongInput(faults, "number each lane's queues in a row, as in [0, 1, 2]")
    bridge.enter_namespace(settings.inspection.netns)
    owner = files.find_owner(settings.inspection.user)
    facts = await engine.read_engine_facts(settings.inspection.suricata)
    refused = engine.check_engine_facts(
        facts, require_hyperscan=settings.inspection.require_hyperscan
    )
    if refused:
        raise HairpinError(
            "; ".join(reason for reason, _ in refused), "; ".join(mend for _, mend in refused)
        )
    with hold_lock(settings.run_dir / "inspect" / "lock"):
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        try:
            dialect = await find_dialect(settings.inspection.dialect)
            log.info("inspect", dialect=str(dialect), engine=facts.text, lanes=len(lanes))
            await Inspection(settings, facts, Netfilter(dialect, lanes), owner).run(stopping)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
    log.info("inspect ended")
    return 0


async def remove_network(settings: Settings) -> None:
    """Take bridges and rules of all lanes away, in this order. For uninstalling; engines must be down."""
    lanes = settings.build_lanes()
    bridge.enter_namespace(settings.inspection.netns)
    await asyncio.to_thread(bridge.remove_bridges, lanes)
    for lane in lanes:
        await redirect.remove_redirection(lane)
    await Netfilter(await find_dialect(settings.inspection.dialect), lanes).remove()
