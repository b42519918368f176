"""The lab's hypervisor: an Open vSwitch of its own, with the ports as libvirt would make them.

Commands only, as an administrator gives them; how traffic is steered is none of the lab's business.
"""

from __future__ import annotations

import grp
import json
import os
import signal
import time
from pathlib import Path

import structlog

from appliance.inspection.process import write_group_nice
from appliance.lab import processes
from appliance.lab.plan import (
    BRIDGE,
    PLAIN_FLOW,
    LabState,
    LabVm,
    ProcessRecord,
    build_canary_args,
    build_leg_args,
    build_mirror_args,
    build_port_args,
)
from appliance.lab.sockets import widen_packet_sockets
from appliance.lab.store import write_state
from steering.errors import CommandFailed, HairpinError
from steering.run import run

log = structlog.get_logger("lab.hypervisor")

OVSDB_SERVER = "ovsdb-server"
VSWITCHD = "ovs-vswitchd"
SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")
GROUP = "hairpin"
NICE = -10
"""What ovs-ctl gives both of the switch's programs (OVSDB_SERVER_PRIORITY, OVS_VSWITCHD_PRIORITY)."""
LISTENERS = (
    "--remote=db:Open_vSwitch,Open_vSwitch,manager_options",
    "--private-key=db:Open_vSwitch,SSL,private_key",
    "--certificate=db:Open_vSwitch,SSL,certificate",
    "--bootstrap-ca-cert=db:Open_vSwitch,SSL,ca_cert",
)
"""As ovs-ctl starts the server: where else it listens, and with which certificate, the database says."""
# OVS gives its sockets to owner and group; with this umask the database and logs as well.
UMASK = 0o007


def find_group() -> int:
    """The group that may speak to the lab's switch. Raises HairpinError before set-up."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError as fault:
        raise HairpinError(f"there's no group {GROUP!r}", "run `make setup`") from fault


def build_env(state: LabState) -> dict[str, str]:
    """Where the lab's OVS keeps its files; ovs-appctl and its kin need OVS_RUNDIR."""
    directory = str(state.ovs_dir)
    names = ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR")
    return dict.fromkeys(names, directory)


def record_process(state: LabState, role: str) -> LabState:
    """Note that a process is about to be started."""
    return write_state(
        state.with_process(ProcessRecord(role, log=str(state.log_dir / f"{role}.log")))
    )


def _start(state: LabState, role: str, argv: list[str]) -> LabState:
    state = record_process(state, role)
    log_file = state.log_dir / f"{role}.log"
    setpriv = ["setpriv", "--regid", GROUP, "--clear-groups", "--"]
    pid, started = processes.start_process(
        ["ip", "netns", "exec", state.hypervisor, "nice", "-n", str(NICE), *setpriv, *argv],
        lab=state.name,
        log_file=log_file,
        env=build_env(state),
        umask=UMASK,
    )
    # Its session is one of its own here; under systemd a unit's is, too.
    if refused := write_group_nice(pid, NICE):
        log.warning("the switch is not as urgent as in production", role=role, reason=refused)
    return write_state(state.with_process(ProcessRecord(role, pid, started, str(log_file))))


def _wait_socket(state: LabState, role: str, path: Path, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    record = state.process(role)
    while not path.is_socket():
        ended = record is None or not processes.is_running(record.pid, record.started)
        if ended or time.monotonic() >= deadline:
            tail = processes.read_tail(state.log_dir / f"{role}.log")
            raise HairpinError(f"{role} did not come up: {tail}", "see `hairpin doctor`")
        time.sleep(0.02)


def start_ovsdb(state: LabState) -> LabState:
    """The OVSDB server, with a new database unless there is one."""
    database = state.ovs_dir / "conf.db"
    if not database.exists():
        run(["ovsdb-tool", "create", str(database), str(SCHEMA)])
    state = _start(
        state,
        OVSDB_SERVER,
        [
            OVSDB_SERVER,
            str(database),
            f"--remote=p{state.ovsdb}",
            *LISTENERS,
            f"--unixctl={state.ovs_dir}/ovsdb.ctl",
            "-vconsole:info",
        ],
    )
    _wait_socket(state, OVSDB_SERVER, state.ovs_dir / "db.sock")
    run(state.vsctl_argv(["--no-wait", "init"]))
    identity = f"external_ids:system-id=lab-{state.name}"
    run(state.vsctl_argv(["--no-wait", "set", "Open_vSwitch", ".", identity]))
    if state.super_packets:
        # Read by vswitchd as it starts, and never again (ovs-vswitchd.conf.db(5)).
        option = "other_config:userspace-tso-enable=true"
        run(state.vsctl_argv(["--no-wait", "set", "Open_vSwitch", ".", option]))
    return state


def start_vswitchd(state: LabState) -> LabState:
    """The switch itself. The kernel's datapath is left alone: this one runs in user space."""
    state.vswitchd.unlink(missing_ok=True)
    state = _start(
        state,
        VSWITCHD,
        [
            VSWITCHD,
            state.ovsdb,
            f"--unixctl={state.vswitchd}",
            "--disable-system",
            "-vconsole:info",
        ],
    )
    _wait_socket(state, VSWITCHD, state.vswitchd)
    return state


def create_bridge(state: LabState) -> None:
    """The bridge with every port, in one transaction, and the administrator's own flow."""
    args = ["add-br", BRIDGE, "--", "set", "Bridge", BRIDGE]
    args += ["datapath_type=netdev", "fail_mode=secure"]
    args += ["protocols=OpenFlow10,OpenFlow13,OpenFlow14,OpenFlow15"]
    for vm in state.vms:
        args += build_port_args(vm)
    for lane in state.lanes:
        args += build_leg_args(lane)
    args += build_canary_args(state.lanes[0])
    args += build_mirror_args(state.vms)
    run(state.vsctl_argv(args))
    check_ports(state)
    widen_sockets(state)
    add_plain_flow(state)


def create_plain_bridge(state: LabState) -> None:
    """The bridge of a host that nothing was prepared on: the VMs' ports, and no flow of anybody."""
    args = ["add-br", BRIDGE, "--", "set", "Bridge", BRIDGE, "datapath_type=netdev"]
    for vm in state.vms:
        args += build_port_args(vm)
    run(state.vsctl_argv(args))
    check_ports(state)
    widen_sockets(state)


def widen_sockets(state: LabState) -> None:
    """Let every port that stands hold super-packets; a port that comes later is to be widened too."""
    record = state.process(VSWITCHD)
    if state.super_packets and record is not None:
        widen_packet_sockets(record.pid)


def check_ports(state: LabState) -> None:
    """Raises HairpinError when the switch could not take a port; its own words say why."""
    shown = run(
        state.vsctl_argv(
            ["-f", "csv", "--no-headings", "--columns=name,error", "list", "Interface"]
        )
    ).stdout
    broken = [line for line in shown.splitlines() if line and not line.endswith(",[]")]
    if broken:
        raise HairpinError(
            f"the switch refused a port: {'; '.join(broken)}", "see `hairpin doctor`"
        )


def add_plain_flow(state: LabState) -> None:
    """Make the bridge a plain switch: a foreign flow, with which Hairpin has nothing to do."""
    run(state.ofctl_argv(["add-flow", PLAIN_FLOW]))


def add_vm_port(state: LabState, vm: LabVm) -> None:
    """Put a VM's port on the switch and under the mirror."""
    args = [*build_port_args(vm)[1:], "--", f"--id=@{vm.interface}", "get", "Port", vm.interface]
    args += ["--", "add", "Mirror", "hairpin-observe", "select_src_port", f"@{vm.interface}"]
    run(state.vsctl_argv(args))
    widen_sockets(state)


def remove_vm_port(state: LabState, vm: LabVm) -> None:
    run(state.vsctl_argv(["--if-exists", "del-port", BRIDGE, vm.interface]))


def find_forwarding_legs(state: LabState) -> dict[str, bool]:
    """By OVS port: whether BFD says that frames pass through the service host and back."""
    found = {leg: False for lane in state.lanes for leg, _device, _ofport in lane.legs}
    argv = ["-f", "json", "--columns=name,bfd_status", "--if-exists", "list", "Interface", *found]
    try:
        # In one question: it is asked again and again while a lane comes up.
        rows = json.loads(run(state.vsctl_argv(argv)).stdout)["data"]
    except (CommandFailed, ValueError):  # a switch that is just being started, or ended
        return found
    for name, (_map, status) in rows:
        found[name] = dict(status).get("forwarding") == "true"
    return found


def fix_permissions(state: LabState) -> None:
    """Give the switch's sockets to the group again, should a hand-started vswitchd have made them.

    The lab's own vswitchd makes them so by itself (its group and umask).
    """
    gid = find_group()
    for path in state.ovs_dir.iterdir():
        if path.is_socket():
            os.chown(path, 0, gid)
            path.chmod(0o660)


def restart_vswitchd(
    state: LabState, *, how: int = signal.SIGKILL, plain_flow: bool = False
) -> LabState:
    """End ovs-vswitchd and start it anew. Every flow is lost, the administrator's too.

    ``how`` is the signal; ``plain_flow`` puts the administrator's flow back, as `ovs-ctl restart`
    does with what it saved.
    """
    record = state.process(VSWITCHD)
    if record is not None:
        processes.send_signal(record.pid, record.started, how)
        left = processes.wait_gone({record.pid: record.started}, 10.0)
        if left:
            raise HairpinError(f"{VSWITCHD} did not end within 10 s of signal {int(how)}")
    management = Path(state.openflow.removeprefix("unix:"))
    management.unlink(missing_ok=True)
    state = start_vswitchd(state)
    # The last thing that vswitchd makes of a bridge.
    _wait_socket(state, VSWITCHD, management)
    widen_sockets(state)
    if plain_flow:
        add_plain_flow(state)
    return state
