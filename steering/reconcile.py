"""Observe, compile, check, diff, apply, verify: one function for a policy, a port, a timer, a crash.

The only user of `steering.switch`; the rest of the product asks the `Reconciler`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import structlog

from steering.addresses import AddressTeller
from steering.change import Applied, Plan, SwitchStatus, build_mismatch, describe_fail_mode
from steering.check import Checker
from steering.compile import compile_program
from steering.compile_quarantine import find_quarantine_flows
from steering.counters import Counters, build_counters, find_tallies
from steering.decide import check_against_switch, resolve_machines
from steering.diff import Bundle, build_bundle, build_change
from steering.errors import SwitchError, WrongInput
from steering.events import (
    DriftMended,
    PortsChanged,
    SteeringEvent,
)
from steering.flows import PresentFlow, Program
from steering.ghosts import find_guarded_ports, find_moved_ports
from steering.model import Lane, Machine, Observed, PolicySet
from steering.observed import ObservedSwitch
from steering.pipeline import CookieKind
from steering.rush import GaveWay, Rush
from steering.shortcut import Return, Taken
from steering.shun import ShunFlow, Shunned
from steering.switch.monitor import FlowMonitor
from steering.switch.openflow import LearnedAddress, OpenFlowSwitch
from steering.switch.ovsdb import OvsdbMonitor, SwitchView
from steering.switch.shortcuts import Shortcuts
from steering.tasks import cancel_all, wait_at_most
from steering.tls import TlsFiles, find_ending

log = structlog.get_logger("reconcile")

GROUP_CHECK_SECONDS = 1.0  # the flow monitor tells of flows at once, but not of groups
FULL_CHECK_SECONDS = 5.0
RETRY_SECONDS = 0.2
OWN_CHANGE_SECONDS = 2.0  # until which the flow monitor has told of what we changed ourselves


async def _record_nothing() -> None:
    pass


class Reconciler:
    """Keeps one bridge equal to what the policies in force mean for the VMs that are there.

    Construct, `await start(policies)`, then `plan` and `apply`; `close` leaves the switch as it is,
    so traffic goes on being steered without us. ``canary`` is the interface of Hairpin's own port.
    ``tls`` is needed where ``ovsdb`` or ``openflow`` begins with ``ssl:``.
    """

    def __init__(
        self,
        *,
        ovsdb: str,
        openflow: str,
        bridge: str,
        lanes: Sequence[Lane],
        on_event: Callable[[SteeringEvent], None],
        canary: str | None = None,
        clock: Callable[[], float] = time.time,
        tls: TlsFiles | None = None,
    ) -> None:
        self._switch = OpenFlowSwitch(openflow, tls)
        self._bridge = bridge
        self._seen = ObservedSwitch(bridge, lanes, on_event, clock)
        self._on_event = on_event
        self._clock = clock
        self._policies = PolicySet()
        self._settled: Program | None = None
        self._standing: Program | None = None
        self._own_changes, self._own_until = 0, 0.0
        self._verified: tuple[Program, tuple[PresentFlow, ...]] | None = None
        self._checker = Checker()
        self._compiled_quarantine = frozenset[str]()
        self.rush = Rush()
        self._has_remembered = False
        self._addresses = AddressTeller(on_event, clock)
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self.shortcuts = Shortcuts(self._switch, self._lock, self._wake.set, self.rush)
        self._first_view = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._owners: dict[int, str] = {}
        self._ovsdb = OvsdbMonitor(ovsdb, bridge, lanes, self._take_view_from_thread, canary, tls)
        self._monitor = FlowMonitor(
            openflow, self._take_address, self._take_flow_change, self._doubt, tls
        )

    # What is seen

    @property
    def policies(self) -> PolicySet:
        """The policies in force."""
        return self._policies

    @property
    def observed(self) -> Observed:
        return self._seen.observed

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return self.observed.lanes

    def machines(self, policies: PolicySet | None = None) -> tuple[Machine, ...]:
        """The VMs on the bridge, named and tagged as ``policies`` (default: those in force) say."""
        wanted = self._policies if policies is None else policies
        return resolve_machines(wanted, self.observed.ports)

    def is_forwarding(self, lane: Lane) -> bool:
        """As `ObservedSwitch.is_forwarding`."""
        return self._seen.is_forwarding(lane)

    def is_down(self, lane: Lane) -> bool:
        """As `ObservedSwitch.is_down`."""
        return self._seen.is_down(lane)

    def has_links(self, lane: Lane) -> bool:
        """As `ObservedSwitch.has_links`."""
        return self._seen.has_links(lane)

    @property
    def flaps(self) -> dict[str, int]:
        """As `ObservedSwitch.flaps`."""
        return self._seen.flaps

    @property
    def status(self) -> SwitchStatus:
        faults = (
            *([self._monitor.fault] if self._monitor.fault else []),
            *find_ending(self._ovsdb.ends, self._clock()),
        )
        return self._seen.build_status(self._policies, faults)

    @property
    def mirrored_packets(self) -> int | None:
        """What the switch sent to the mirror for flow records; None without one. Renewed every 5 s."""
        return self._ovsdb.mirrored_packets

    async def read_counters(self) -> Counters:
        """Packets and bytes per policy, lane and drop reason. Raises SwitchError."""
        return await self._read_counters(None)

    async def read_lane_counters(self) -> Counters:
        """`read_counters` of lanes alone: what is asked all the time must not dump every flow."""
        return await self._read_counters(CookieKind.LANE)

    async def read_canary_counters(self) -> Counters:
        """`read_counters` of canaries alone."""
        return await self._read_counters(CookieKind.CANARY)

    async def _read_counters(self, kind: CookieKind | None) -> Counters:
        await self.rush.wait_free_async()
        flows, groups = await asyncio.gather(
            self._switch.read_flow_counters(kind), self._switch.read_group_counters()
        )
        policies, lanes = self._policies, self.lanes
        tallies = find_tallies(
            [(item.flow.key, item.flow.cookie, item.packets, item.bytes) for item in flows],
            [(item.group_id, item.buckets) for item in groups],
            policies,
            lanes,
        )
        return build_counters(tallies, policies, lanes)

    # What is done

    async def start(self, policies: PolicySet, *, wait_seconds: float = 5.0) -> None:
        """Follow the switch and keep it to ``policies``. Returns once it was seen, or after the wait."""
        self._loop = asyncio.get_running_loop()
        self._policies = policies
        self._ovsdb.start()
        await self._switch.open()
        self._tasks = [
            asyncio.create_task(self._monitor.run(), name="flow monitor"),
            asyncio.create_task(self._keep(), name="reconcile"),
        ]
        try:
            await wait_at_most(self._first_view.wait(), wait_seconds)
        except TimeoutError:
            log.warning("the switch was not seen yet", seconds=wait_seconds)

    async def close(self) -> None:
        await cancel_all(self._tasks)
        await self._switch.close()
        await asyncio.to_thread(self._ovsdb.close)

    async def plan(self, policies: PolicySet) -> Plan:
        """What applying ``policies`` would change. Raises WrongInput (faults), SwitchError."""
        async with self._lock:
            policies = replace(policies, quarantined=self._policies.quarantined)
            return await self._plan(policies, await self._remember(self._find_observed(policies)))

    async def apply(
        self, policies: PolicySet, record: Callable[[], Awaitable[None]] = _record_nothing
    ) -> Applied:
        """Put ``policies`` in force: one bundle, then read back until equal.

        ``record`` is begun once it is known that the switch can do it, and runs beside: a disk may take
        longer than the change. Should it fail, what was in force before is put back.
        Raises WrongInput, SwitchError, or what ``record`` does; then what was in force before still is.
        """
        began = time.monotonic()
        with contextlib.ExitStack() as rush:
            rush.enter_context(self.rush.claim())
            async with self._lock:
                # Who is in quarantine is not the policies' business, and may have changed meanwhile.
                policies = replace(policies, quarantined=self._policies.quarantined)
                observed = await self._remember(self._find_observed(policies))
                if policies.policies:
                    self._check_may_steer()
                recording = asyncio.ensure_future(record())
                try:
                    plan = await self._put(policies, observed)
                except BaseException:
                    recording.cancel()
                    raise
                rush.close()  # it is on the switch: looking at it again need not hold up others
                former = self._policies
                try:
                    await recording
                except BaseException:
                    self._wake.set()  # should it not be put back here, it is by the next reconcile
                    await self._restore(former)
                    raise
                left = await self._find_difference(plan.program)
                if left:
                    await self._send(left)
                    left = await self._find_difference(plan.program)
                if left:
                    await self._restore(former)
                    raise build_mismatch(left, "what was in force before was put back")
                quarantined = self._policies.quarantined
                self._policies = replace(policies, quarantined=quarantined)
                self._settled = self._standing = plan.program
                return Applied(plan.bundle, time.monotonic() - began)

    async def _put(self, policies: PolicySet, observed: Observed) -> Plan:
        """Compile and send.

        What was read back last is taken for what stands, so that the change is not held up by reading
        it all once more; whatever somebody changed meanwhile, the read-back finds.
        """
        returned = self.shortcuts.build_change(self._policies, policies)
        plan = await self._plan(policies, observed, self._standing)
        self._standing = None
        try:
            await self._send(plan.bundle, returned)
        except SwitchError:
            plan = await self._plan(policies, observed)
            await self._send(plan.bundle, returned)
        return plan

    async def shut_off(self, quarantined: frozenset[str]) -> float:
        """Let nothing pass from or to these VMs, and to others again; seconds until the switch had it.

        Their drops go ahead of everything else: at once, even while a reconcile runs. Then all is
        compiled, compared and read back as ever. Raises SwitchError; then it is tried again until done.
        """
        began = time.monotonic()
        former, self._policies = self._policies, replace(self._policies, quarantined=quarantined)
        self._wake.set()
        machines = resolve_machines(self._policies, self.observed.ports)
        wanted, present = (
            find_quarantine_flows(machines, one) for one in (quarantined, former.quarantined)
        )
        bundle = build_change(Program(wanted), Program(present))
        with self.rush.claim():
            await self._switch.send_bundle(bundle)
        return time.monotonic() - began

    async def read_shuns(self) -> tuple[Shunned, ...]:
        """The flows that the switch drops because the engine blocked them. Raises SwitchError."""
        return await self._switch.read_shuns()

    async def add_shuns(self, flows: Sequence[ShunFlow]) -> None:
        """Raises SwitchError."""
        await self._switch.add_shuns(flows)

    async def remove_shuns(self, shunned: Sequence[Shunned]) -> None:
        """Raises SwitchError."""
        await self._switch.remove_shuns(shunned)

    async def read_shortcuts(self) -> tuple[Taken, ...]:
        """The connections that the switch passes by itself now. Raises SwitchError."""
        return await self.shortcuts.read()

    async def return_shortcuts(self, wanted: Return) -> float:
        """Have these connections inspected again; seconds until the switch had it. Raises SwitchError."""
        return await self.shortcuts.give_back(wanted, self._policies, self.machines())

    # The inside

    def _check_may_steer(self) -> None:
        view = self._seen.view
        if view is not None and view.fail_mode != "secure":
            raise SwitchError(*describe_fail_mode(self._bridge, view.fail_mode))

    async def _restore(self, policies: PolicySet) -> None:
        program = self._compile(policies, self.observed)
        await self._send(await self._find_difference(program))

    async def _plan(
        self, policies: PolicySet, observed: Observed, standing: Program | None = None
    ) -> Plan:
        """``standing``: what the switch has; None: it is asked."""
        program = self._compile(policies, observed)
        if standing is None:
            return Plan(program, await self._find_difference(program), observed)
        return Plan(program, build_change(program, standing), observed)

    def _find_observed(self, policies: PolicySet) -> Observed:
        if not self._seen.is_bridge_found:
            raise SwitchError(
                f"bridge {self._bridge} is not there: {self.status.reason or 'not found in OVSDB'}",
                "check switch.ovsdb and switch.bridge in the settings, and that Open vSwitch runs",
            )
        observed = self.observed
        faults = check_against_switch(policies, observed.ports, observed.lanes)
        if faults:
            raise WrongInput(faults)
        return observed

    def _compile(self, policies: PolicySet, observed: Observed) -> Program:
        self._compiled_quarantine = policies.quarantined
        machines = resolve_machines(policies, observed.ports)
        program = compile_program(
            policies,
            machines,
            observed.lanes,
            observed.canary,
            observed.ghosts,
            self.shortcuts.find_untaught(),
        )
        violated = self._checker.check(program, observed.lanes, observed.canary)
        if violated:
            raise SwitchError(
                f"the compiled flows break an invariant, nothing was sent: {'; '.join(violated[:5])}",
                "this is a bug in Hairpin: please report it with your policies",
            )
        return program

    async def _remember(self, observed: Observed) -> Observed:
        """Once, before the first change: whom the flows of an earlier process still keep out."""
        if self._has_remembered:
            return observed
        present = await self._switch.read_present()
        self._seen.remember(find_guarded_ports(present.flows))
        self._has_remembered = True
        return self.observed

    async def _find_difference(self, program: Program) -> Bundle:
        present = await self._switch.read_present()
        known = self._verified
        if (
            known is not None
            and known[1] is present.flows
            and known[0] == program
            and frozenset(present.groups) == frozenset(program.groups)
        ):
            return Bundle()
        bundle = build_bundle(program, present)
        self._verified = None if bundle else (program, present.flows)
        return self._leave_quarantine(bundle)

    def _leave_quarantine(self, bundle: Bundle) -> Bundle:
        """What `shut_off` changed since was compiled is not undone; it has all compiled anew."""
        is_same = self._compiled_quarantine == self._policies.quarantined
        return bundle if is_same else bundle.without(CookieKind.QUARANTINE)

    async def _send(self, bundle: Bundle, more: Sequence[str] = ()) -> None:
        """Whoever sends reads back, so what the flow monitor tells of these changes is no news.

        ``more``: lines of the same bundle that change nothing which was compiled.
        """
        flows = sum(change.command.startswith("flow ") for change in bundle.changes)
        self._own_changes += flows
        self._own_until = time.monotonic() + OWN_CHANGE_SECONDS
        await self._switch.send_bundle(bundle, more)

    def _take_flow_change(self) -> None:
        """Somebody changed a flow of ours. One change is told once; more than we made are others'."""
        if self._own_changes and time.monotonic() < self._own_until:
            self._own_changes -= 1
        else:
            self._own_changes = 0
            self._doubt()

    def _doubt(self) -> None:
        """What stands may be other than what was read back last: all is to be read before more is sent."""
        self._standing = None
        self._wake.set()

    def _take_view_from_thread(self, view: SwitchView | None) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._take_view, view)

    def _take_view(self, view: SwitchView | None) -> None:
        if view is None:
            self._seen.lose_view(self._ovsdb.lost or "the connection to OVSDB ended")
            return
        self._seen.take_view(view)
        self._first_view.set()
        self._addresses.follow(self.observed.ports, self._policies)
        self._wake.set()

    async def _take_address(self, learned: LearnedAddress) -> None:
        self._addresses.take(learned, self.observed.ports, self._policies)

    async def _keep(self) -> None:
        """Until cancelled: reconcile at every change, and look at groups and flows now and then."""
        full_check_due = 0.0
        while True:
            woken = await self._wait(GROUP_CHECK_SECONDS)
            self._wake.clear()
            if not self._seen.is_bridge_found:
                if self._seen.view is not None:
                    self._seen.lose(f"there is no bridge {self._bridge}")
                continue
            try:
                full = woken or time.monotonic() >= full_check_due
                async with self._lock:
                    await self._reconcile(full=full)
                if full:
                    full_check_due = time.monotonic() + FULL_CHECK_SECONDS
                if self._seen.is_lost and not self._seen.is_view_stale:
                    # Over the network its connection may be dead without its knowing.
                    self._monitor.restart()
                    self._seen.regain()
            except GaveWay:
                await self.rush.wait_free_async()
                full_check_due = 0.0
                self._wake.set()
            except SwitchError as fault:
                log.warning("not reconciled", reason=fault.reason, mend=fault.mend)
                self._seen.lose(fault.reason)
                full_check_due = 0.0
                await asyncio.sleep(RETRY_SECONDS)
                self._wake.set()
            except Exception as fault:
                # Whatever it was, the switch must not be left to itself: told, and tried again.
                log.exception("not reconciled")
                self._seen.lose(f"a fault of Hairpin's own: {type(fault).__name__}: {fault}")
                full_check_due = 0.0
                await asyncio.sleep(GROUP_CHECK_SECONDS)
                self._wake.set()

    async def _wait(self, seconds: float) -> bool:
        try:
            await wait_at_most(self._wake.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _reconcile(self, *, full: bool) -> None:
        began = time.monotonic()
        observed = self.observed
        if not full and self._settled is not None:
            present = await self.rush.give_way(self._switch.read_groups)
            if present == frozenset(self._settled.groups):
                return
        observed = await self._remember(observed)
        untaught = self.shortcuts.find_untaught()
        program = self._compile(self._policies, observed)
        for ofport in find_moved_ports(self._owners, observed.ports):
            await self._switch.forget_addresses(ofport)
            await self.shortcuts.forget_ports([ofport])
        # What came or went need not wait for all to be read.
        ahead = Bundle() if self._standing is None else build_change(program, self._standing)
        if ahead := self._leave_quarantine(ahead):
            self._standing = None
            await self._send(ahead)
            self._standing = program
        bundle = await self.rush.give_way(lambda: self._find_difference(program))
        self._standing = None
        if self.shortcuts.find_untaught() - untaught:
            self._wake.set()  # what was sent back meanwhile must not be taught again by this program
            return
        if bundle:
            await self._send(bundle)
            left = await self._find_difference(program)
            if left:
                raise build_mismatch(left, "it is tried again")
        bundle = Bundle((*ahead.changes, *bundle.changes))
        before, self._settled = self._settled, program
        self._standing, drift = program, program == before
        self._tell(observed, bundle, time.monotonic() - began, drift=drift and before is not None)

    def _tell(self, observed: Observed, bundle: Bundle, seconds: float, *, drift: bool) -> None:
        owners = {port.ofport: port.vm_id for port in observed.ports}
        former = set(self._owners.items())
        now = set(owners.items())
        appeared = sorted(p.interface for p in observed.ports if (p.ofport, p.vm_id) not in former)
        vanished = sorted(vm_id for _, vm_id in former - now)
        self._owners = owners
        if appeared or vanished:
            self._on_event(PortsChanged(self._clock(), tuple(appeared), tuple(vanished), seconds))
        if drift and bundle:
            log.warning("drift mended", changes=len(bundle.changes), seconds=round(seconds, 3))
            self._on_event(
                DriftMended(
                    self._clock(),
                    bundle.count("add"),
                    bundle.count("modify"),
                    bundle.count("delete"),
                    seconds,
                )
            )
