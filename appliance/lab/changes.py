"""What happens to VMs in a life: they come, go, move, change address; and things that die.

Each function reads the lab's present state, changes the lab, and returns the new state.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

from appliance.lab import hypervisor, network, processes
from appliance.lab.lifecycle import read_lab
from appliance.lab.plan import (
    MOVED_OFPORT,
    LabState,
    LabVm,
    ProcessRecord,
    build_vm,
)
from appliance.lab.store import hold_lock, write_state
from steering.errors import FieldError, HairpinError, WrongInput
from steering.run import run


def add_vm(state: LabState, name: str) -> LabState:
    """A further VM, with the next free number. Raises WrongInput for a name that is taken."""
    with hold_lock(state.name):
        state = read_lab(state.name)
        if any(vm.name == name for vm in state.vms):
            raise WrongInput([FieldError("vm", f"the lab already has a VM {name!r}")])
        taken = {vm.number for vm in state.vms}
        number = next(one for one in itertools.count(1) if one not in taken)
        vm = build_vm(state.name, name, number)
        state = write_state(state.with_vm(vm))
        network.create_namespace(vm.netns, vm=True)
        network.create_vm_link(state, vm)
        hypervisor.add_vm_port(state, vm)
        return state


def remove_vm(state: LabState, name: str) -> LabState:
    """Take a VM's port from the switch, end what runs in it, and remove it."""
    with hold_lock(state.name):
        state = read_lab(state.name)
        vm = state.vm(name)
        hypervisor.remove_vm_port(state, vm)
        for number in (signal.SIGTERM, signal.SIGKILL):
            inside = {
                pid: started
                for pid in processes.find_pids_in([vm.netns])
                if (started := processes.read_started(pid))
            }
            for pid, started in inside.items():
                processes.send_signal(pid, started, number)
            processes.wait_gone(inside, 2.0)
        network.remove_link(state.hypervisor, vm.interface)
        network.remove_namespace(vm.netns)
        return write_state(replace(state, vms=tuple(one for one in state.vms if one != vm)))


def move_vm(state: LabState, name: str) -> LabState:
    """Take a VM's port from the switch and put it back with another number, as a restart does."""
    with hold_lock(state.name):
        state = read_lab(state.name)
        vm = state.vm(name)
        elsewhere = MOVED_OFPORT + vm.number
        moved = replace(vm, ofport=vm.number if vm.ofport == elsewhere else elsewhere)
        state = write_state(state.with_vm(moved))
        hypervisor.remove_vm_port(state, vm)
        hypervisor.add_vm_port(state, moved)
        return state


def change_address(state: LabState, name: str, address4: str) -> LabState:
    """Give a VM another IPv4 address of 10.77.0.0/24 in the place of its own."""
    try:
        address = str(IPv4Address(address4))
    except AddressValueError as fault:
        raise WrongInput([FieldError("address", str(fault))]) from fault
    with hold_lock(state.name):
        state = read_lab(state.name)
        vm = state.vm(name)
        network.replace_address4(vm, address)
        return write_state(state.with_vm(replace(vm, address4=address)))


def find_process(state: LabState, role: str) -> tuple[int, str]:
    """(pid, start time) of a process by its role.

    Roles: ovsdb-server, ovs-vswitchd, inspect, serve, observe, `engine-PROFILE`, and what
    `start_in_vm` returned. Raises HairpinError when it does not run.
    """
    if role.startswith("engine-"):
        directory = str(state.run_dir / "lanes" / role.removeprefix("engine-"))
        for pid in processes.find_pids_in([state.service_host]):
            try:
                argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            is_engine = argv[0].rpartition(b"/")[2].lower().startswith(b"suricata")
            if is_engine and any(directory.encode() in argument for argument in argv):
                return pid, processes.read_started(pid)
    record = read_lab(state.name).process(role)
    if record is None or not processes.is_running(record.pid, record.started):
        raise HairpinError(f"{role} is not running in the lab {state.name!r}")
    return record.pid, record.started


def kill_process(state: LabState, role: str, number: int = signal.SIGKILL) -> int:
    """Send a signal to a process by its role (see `find_process`); its pid.

    Returns when the process is gone if the signal is SIGKILL, else at once.
    """
    pid, started = find_process(state, role)
    processes.send_signal(pid, started, number)
    if number == signal.SIGKILL and processes.wait_gone({pid: started}, 10.0):
        raise HairpinError(f"{role} ({pid}) outlived SIGKILL")
    return pid


def restart_vswitchd(
    state: LabState, *, how: int = signal.SIGKILL, plain_flow: bool = False
) -> LabState:
    """As `hypervisor.restart_vswitchd`, on the present state."""
    with hold_lock(state.name):
        return hypervisor.restart_vswitchd(read_lab(state.name), how=how, plain_flow=plain_flow)


def start_in_vm(
    state: LabState, vm: str, argv: Sequence[str], *, role: str = ""
) -> tuple[LabState, str]:
    """Start a long-lived command inside a VM; the new state and its role, to end it by.

    Its log is `log/ROLE.log` in the lab's directory. It is ended with the lab at the latest.
    """
    with hold_lock(state.name):
        state = read_lab(state.name)
        inside = state.netns_argv(vm, argv)
        taken = {record.role for record in state.processes}
        stem = role or f"{vm}-{Path(argv[0]).name}"
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        chosen = next(one for one in names if one not in taken)
        state = hypervisor.record_process(state, chosen)
        log_file = state.log_dir / f"{chosen}.log"
        pid, started = processes.start_process(inside, lab=state.name, log_file=log_file)
        record = ProcessRecord(chosen, pid, started, str(log_file))
        return write_state(state.with_process(record)), chosen


def stop_process(state: LabState, role: str, seconds: float = 5.0) -> LabState:
    """End a process by its role, gently and then not, and forget it."""
    with hold_lock(state.name):
        state = read_lab(state.name)
        record = state.process(role)
        if record is None:
            raise HairpinError(f"the lab {state.name!r} has no process {role!r}")
        left = {record.pid: record.started}
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid, started in left.items():
                processes.send_signal(pid, started, number)
            left = processes.wait_gone(left, seconds)
        kept = tuple(one for one in state.processes if one != record)
        return write_state(replace(state, processes=kept))


def find_flows(state: LabState) -> list[str]:
    """Every flow of the bridge, as `ovs-ofctl dump-flows --no-stats` prints it."""
    shown = run([*state.ofctl_argv(["dump-flows"]), "--no-stats"]).stdout
    return [line.strip() for line in shown.splitlines() if "actions=" in line]


def find_ofport(state: LabState, vm: LabVm | str) -> int:
    """The port number that the switch really gave a VM."""
    one = vm if isinstance(vm, LabVm) else state.vm(vm)
    shown = run(state.vsctl_argv(["get", "Interface", one.interface, "ofport"])).stdout
    return int(shown)
