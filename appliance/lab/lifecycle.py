"""A lab from its first namespace to its last: up, down, status, and a command inside a VM.

What is about to be made is written down before it is made, so that the next `up` or `down` can
clean up after one that was killed at any moment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any

from appliance.lab import hypervisor, network, processes, services
from appliance.lab.plan import DEFAULT_VMS, ROOT, LabState, build_state, check_lab_name
from appliance.lab.store import hold_lock, read_state, write_state
from appliance.visibility.group import remove_groups
from appliance.visibility.main import build_group_name
from steering.errors import FieldError, HairpinError, WrongInput
from steering.run import run

Progress = services.Progress
STARTING, READY, STOPPING = "starting", "ready", "stopping"


@dataclass(frozen=True, slots=True)
class LabStatus:
    """What stands of a lab. ``whole`` is True when nothing is missing; else see ``problems``."""

    name: str
    standing: bool
    whole: bool
    phase: str
    url: str
    vms: tuple[Mapping[str, Any], ...] = ()
    lanes: tuple[Mapping[str, Any], ...] = ()
    processes: tuple[Mapping[str, Any], ...] = ()
    problems: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The shape of `hairpin lab status --json`."""
        return asdict(self)


def _say_nothing(_line: str) -> None:
    return None


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def find_problems(state: LabState) -> list[str]:
    """What is missing of a lab that should stand, each a sentence."""
    problems = []
    if state.phase != READY:
        problems.append(f"it was left while {state.phase}")
    problems += [f"namespace {name} is gone" for name in network.find_missing(state.namespaces)]
    problems += [f"{role} is not running" for role in services.find_dead(state)]
    return problems


@contextlib.contextmanager
def _interrupted_once() -> Iterator[list[str]]:
    """Make SIGTERM and SIGHUP the exception that Ctrl-C is; possible in the main thread only.

    It is raised once: a second signal, of an impatient hand, must not break off the clean-up. Gives
    the name of the signal that came, in a list.
    """
    came: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    owner = os.getpid()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        # pyroute2 enters a namespace in a fork of this process and ends the fork with SIGTERM: in
        # there, the exception would run the clean-up of the lab that is being made.
        if os.getpid() != owner:
            os._exit(0)
        if not came:
            came.append(signal.Signals(number).name)
            raise KeyboardInterrupt(came[0])

    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no signal break off a clean-up (a second Ctrl-C from an impatient hand)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_ground(state: LabState, progress: Progress) -> None:
    """Directories, and namespaces with nothing in them."""
    state.directory.mkdir(mode=0o711, parents=True)
    write_state(state)
    # Whatever the umask: others pass through, to what is theirs further down.
    os.chmod(ROOT, 0o711)  # noqa: S103
    os.chmod(state.directory, 0o711)  # noqa: S103
    state.log_dir.mkdir(mode=0o755)
    state.ovs_dir.mkdir(mode=0o750)
    os.chown(state.ovs_dir, 0, hypervisor.find_group())

    progress(f"making {len(state.namespaces)} network namespaces")
    machines = {vm.netns for vm in state.vms}
    for name in state.namespaces:
        network.create_namespace(name, vm=name in machines)


def _make(state: LabState, progress: Progress) -> LabState:
    make_ground(state, progress)
    services.write_files(state)
    progress(f"connecting {len(state.vms)} VMs, {len(state.lanes)} lanes and the mirror")
    for vm in state.vms:
        network.create_vm_link(state, vm)
    for lane in state.lanes:
        network.create_lane_links(state, lane)
    network.create_canary_link(state)
    network.create_mirror_link(state)

    progress("starting Open vSwitch")
    state = hypervisor.start_ovsdb(state)
    state = hypervisor.start_vswitchd(state)
    hypervisor.create_bridge(state)
    progress("checking that the VMs reach each other over the plain switch")
    check_reachable(state)

    if state.serve:
        state = services.start_services(state, progress)
        services.wait_ready(state, progress)
    return write_state(replace(state, phase=READY))


def check_reachable(state: LabState, seconds: float = 15.0) -> None:
    """Ping every VM from the first, over IPv4 and IPv6; raises HairpinError if one is silent."""
    first, *others = state.vms
    deadline = time.monotonic() + seconds
    for vm in others:
        for address in (vm.address4, vm.address6):
            argv = state.netns_argv(first.name, ["ping", "-n", "-q", "-c1", "-W1", address])
            while run(argv, check=False).status != 0:
                if time.monotonic() >= deadline:
                    raise HairpinError(
                        f"{first.name} can't reach {vm.name} at {address} over the plain switch\n"
                        + processes.read_tail(state.log_dir / f"{hypervisor.VSWITCHD}.log"),
                        "see `hairpin doctor`",
                    )


def bring_up(
    name: str = "lab",
    vms: int = DEFAULT_VMS,
    *,
    serve: bool = True,
    progress: Progress = _say_nothing,
    overrides: Mapping[str, Any] | None = None,
    super_packets: bool = True,
) -> LabState:
    """Make a lab and return when it works; ``serve`` starts Hairpin in it and waits for it too.

    ``overrides`` are merged into the settings file (its keys). ``super_packets``: switch and links
    carry them. The remnants of a dead lab of the
    same name are taken down first. Raises WrongInput for wrong values, with nothing made, and
    HairpinError when the lab already stands or can't be made, with nothing left behind; the same
    for Ctrl-C, SIGTERM and SIGHUP, which end in KeyboardInterrupt.
    """
    state = build_state(
        name,
        vms,
        serve=serve,
        overrides=overrides or {},
        random=os.urandom(10),
        api_port=_find_free_port(),
        now=time.time(),
        super_packets=super_packets,
    )
    return bring_up_state(state, _make, progress)


def bring_up_state(
    state: LabState, make: Callable[[LabState, Progress], LabState], progress: Progress
) -> LabState:
    """As `bring_up`, of a lab that ``make`` makes."""
    name = state.name
    if os.geteuid() != 0:
        raise HairpinError("a lab needs root", "run it with sudo")
    with _interrupted_once() as came, hold_lock(name):
        remnants = _read_remnants(name)
        if remnants is not None:
            if remnants.phase == READY and not find_problems(remnants):
                raise HairpinError(
                    f"the lab {name!r} is up already", f"use it, or `{_down_command(name)}` first"
                )
            progress("taking down what is left of an earlier lab")
        _take_down(name, remnants)
        try:
            state = make(state, progress)
            if came:  # the exception was lost on its way, in some library's callback
                raise KeyboardInterrupt(came[0])
            return state
        except BaseException:
            try:
                _undo(name, progress)
            except KeyboardInterrupt:
                # The one interruption came just now.
                _undo(name, progress)
            raise


def _undo(name: str, progress: Progress) -> None:
    with _undisturbed():
        progress("taking down what was made so far")
        _take_down(name, _read_remnants(name))


def _down_command(name: str) -> str:
    return "hairpin lab down" if name == "lab" else f"hairpin lab down --name {name}"


def _read_remnants(name: str) -> LabState | None:
    # A state file that can't be read must not keep the rest from being cleaned up.
    try:
        return read_state(name)
    except HairpinError:
        return None


def take_down(name: str = "lab", *, progress: Progress = _say_nothing) -> bool:
    """End and remove all of a lab, also what a killed command left; False if there was nothing.

    Raises HairpinError when something can't be removed.
    """
    with hold_lock(name), _undisturbed():
        state = _read_remnants(name)
        there = state is not None or (ROOT / name).exists()
        there = there or bool(network.find_namespaces(f"hp-{name}-"))
        if there:
            progress(f"taking down the lab {name!r}")
        _take_down(name, state)
        return there


def _take_down(name: str, state: LabState | None) -> None:
    if state is not None:
        write_state(replace(state, phase=STOPPING))
    found = network.find_namespaces(f"hp-{name}-")
    recorded = [] if state is None else [(one.pid, one.started) for one in state.processes]
    # An engine takes two seconds to put its files in order, which go next.
    for number, seconds in ((signal.SIGTERM, 1.0), *((signal.SIGKILL, 2.0),) * 5):
        left = processes.find_lab_processes(name, found, recorded)
        for pid, started in left.items():
            processes.send_signal(pid, started, number)
        processes.wait_gone(left, seconds)
    left = processes.find_lab_processes(name, found, recorded)
    if left:
        raise HairpinError(
            f"these processes of the lab do not end: {', '.join(map(str, sorted(left)))}",
            "look at them with ps, then run `hairpin lab down` again",
        )
    for namespace in found:
        network.remove_namespace(namespace)
    # The observer can't remove its own group: it is in it until it ends.
    remove_groups(build_group_name(name, ROOT / name / "run"))
    if (ROOT / name).exists():
        shutil.rmtree(ROOT / name)
    network.remove_netns_mount()


def read_status(name: str = "lab") -> LabStatus:
    """What stands of the lab of that name; changes nothing."""
    check_lab_name(name)
    state = read_state(name)
    if state is None:
        stray = network.find_namespaces(f"hp-{name}-")
        problems = tuple(f"stray namespace {one}" for one in stray)
        return LabStatus(name, False, False, "down", "", problems=problems)
    problems = tuple(find_problems(state))
    dead = set(services.find_dead(state))
    missing = set(network.find_missing(state.namespaces))
    switch = not dead & {hypervisor.OVSDB_SERVER, hypervisor.VSWITCHD}
    legs = hypervisor.find_forwarding_legs(state) if switch else {}
    return LabStatus(
        name=name,
        standing=True,
        whole=not problems,
        phase=state.phase,
        url=state.url if state.serve else "",
        vms=tuple({**asdict(vm), "up": vm.netns not in missing} for vm in state.vms),
        lanes=tuple(
            {
                "profile": lane.profile,
                "vlan": lane.vlan,
                "queues": list(lane.queues),
                "legs": [leg for leg, _device, _ofport in lane.legs],
                "forwarding": all(legs.get(leg, False) for leg, _device, _ofport in lane.legs),
            }
            for lane in state.lanes
        ),
        processes=tuple(
            {"role": one.role, "pid": one.pid, "running": one.role not in dead, "log": one.log}
            for one in state.processes
        ),
        problems=problems,
    )


def read_lab(name: str = "lab") -> LabState:
    """The state of a lab that stands. Raises HairpinError when there's none."""
    state = read_state(name)
    if state is None:
        raise HairpinError(f"there's no lab {name!r}", "run `hairpin lab up`")
    return state


def run_in(name: str, vm: str, argv: Sequence[str]) -> int:
    """Run a command inside a VM with this process's input, output and signals; its exit status.

    As a shell has it: 127 when there's no such command, 128 and the signal's number when a signal
    ended it. Raises WrongInput for an unknown VM or an empty command.
    """
    if not argv:
        raise WrongInput([FieldError("command", "there is none")])
    inside = read_lab(name).netns_argv(vm, argv)
    if shutil.which(argv[0]) is None:
        print(f"{argv[0]}: command not found", file=sys.stderr)
        return 127
    with subprocess.Popen(inside) as child:

        def forward(number: int, _frame: FrameType | None) -> None:
            child.send_signal(number)

        # Ctrl-C reaches the command by itself: the terminal sends it to the whole group.
        handlers: dict[int, Any] = {signal.SIGINT: signal.SIG_IGN, signal.SIGQUIT: signal.SIG_IGN}
        handlers |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP), forward)
        main = threading.current_thread() is threading.main_thread()
        before = {one: signal.signal(one, what) for one, what in handlers.items()} if main else {}
        try:
            status = child.wait()
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
    return status if status >= 0 else 128 - status
