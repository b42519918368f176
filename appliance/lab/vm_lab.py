"""A lab whose service host is a VM of the image under QEMU, on a hypervisor that `hairpin host prepare` made ready.

The VM is started as libvirt would start it, from the XML that the product makes; QEMU is a process of the lab.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import appliance
from appliance.lab import hypervisor, processes
from appliance.lab.changes import find_process
from appliance.lab.lifecycle import READY, bring_up_state, check_reachable, make_ground, read_lab
from appliance.lab.network import create_vm_link
from appliance.lab.plan import APPLIANCE_ADDRESS, LabState, ProcessRecord
from appliance.lab.qemu import (
    VmSpec,
    build_argv,
    missing_tools,
    prepare_files,
    read_console,
    send_command,
)
from appliance.lab.services import build_env
from appliance.lab.store import hold_lock, write_state
from appliance.lab.vm_network import create_management_network
from appliance.lab.vm_plan import (
    QEMU_ROLE,
    build_vm_spec,
    build_vm_state,
    parse_domain,
    render_host,
)
from steering.errors import CommandFailed, HairpinError
from steering.run import run

Progress = Callable[[str], None]

PREPARE_SECONDS = 60.0
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Switch:
    """What a host's administrator sees of his switch; compared before and after Hairpin."""

    ports: str
    bridge: str
    flows: str
    groups: str
    listeners: str


def find_images() -> list[Path]:
    """The disks in `image-build/out`, the oldest first."""
    out = Path(appliance.__file__).resolve().parent.parent / "image-build/out"
    found = [*out.glob("hairpin_*.raw"), *out.glob("hairpin_*.qcow2")]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def check_tools(disk: Path | None) -> Path:
    """The disk. Raises HairpinError when it, QEMU or its firmware is missing."""
    if missing := missing_tools():
        raise HairpinError(f"not installed: {', '.join(missing)}", "run image-build/setup-image.sh")
    if disk is None or not disk.is_file():
        raise HairpinError(
            f"there is no image {disk or 'in image-build/out'}",
            "run `make image`, or name one: IMAGE=PATH",
        )
    return disk


def bring_up_vm(
    name: str,
    disk: Path,
    *,
    kvm: bool,
    vms: int = 6,
    super_packets: bool = True,
    progress: Progress = lambda _line: None,
) -> LabState:
    """Everything up to the VM's start: switch, VMs, management network, the host prepared. The VM is off.

    Raises as `bring_up`; nothing is left behind then.
    """
    state = build_vm_state(name, vms, now=time.time(), super_packets=super_packets, kvm=kvm)

    def make(state: LabState, progress: Progress) -> LabState:
        return _make(state, disk, kvm, progress)

    return bring_up_state(state, make, progress)


def _make(state: LabState, disk: Path, kvm: bool, progress: Progress) -> LabState:
    make_ground(state, progress)
    progress(f"connecting {len(state.vms)} VMs and the management network")
    for vm in state.vms:
        create_vm_link(state, vm)
    create_management_network(state)
    progress("starting Open vSwitch, with nothing of Hairpin's")
    state = hypervisor.start_ovsdb(state)
    state = hypervisor.start_vswitchd(state)
    hypervisor.create_plain_bridge(state)
    check_reachable(state)
    (state.directory / "host.yaml").write_text(render_host(state, kvm=kvm))
    (state.directory / "switch-before.json").write_text(json.dumps(asdict(read_switch(state))))
    progress("hairpin host prepare --apply")
    report = run_on_host(state, "prepare", "--keys", str(state.keys_dir))
    # The script holds private keys; the domain is what QEMU is started from.
    (state.directory / "domain.xml").write_text(report["domain"])
    # What the command line checks the API's certificate with: nothing but the host's own CA.
    state.api_certificate.write_text((state.keys_dir / "ca.pem").read_text())
    (state.directory / "disk").symlink_to(disk.resolve())
    hypervisor.widen_sockets(state)
    hypervisor.check_ports(state)
    return write_state(replace(state, phase=READY))


def run_on_host(state: LabState, verb: str, *argv: str) -> Any:
    """`hairpin host VERB host.yaml --apply`, on the hypervisor; its report. Raises CommandFailed."""
    command = ["ip", "netns", "exec", state.hypervisor, sys.executable, "-m", "appliance.cli"]
    command += ["host", verb, str(state.directory / "host.yaml"), *argv, "--apply", "--json"]
    env = {**build_env(), **hypervisor.build_env(state)}
    return json.loads(run(command, env=env, timeout=PREPARE_SECONDS).stdout)


def read_switch(state: LabState) -> Switch:
    """Without what counts or comes and goes by itself."""

    def vsctl(*argv: str) -> str:
        return run(state.vsctl_argv(argv)).stdout

    columns = "--columns=fail_mode,protocols,external_ids,datapath_type"
    return Switch(
        ports=vsctl("list-ports", "br-int"),
        bridge=vsctl(columns, "list", "Bridge", "br-int"),
        flows=run([*state.ofctl_argv(["dump-flows"]), "--no-stats"]).stdout,
        groups=run(state.ofctl_argv(["dump-groups"])).stdout,
        listeners=vsctl("get-manager") + vsctl("get-controller", "br-int") + vsctl("get-ssl"),
    )


def find_switch_changes(state: LabState) -> list[str]:
    """What of the switch is not as it was before `hairpin host prepare`."""
    before = json.loads((state.directory / "switch-before.json").read_text())
    after = asdict(read_switch(state))
    return [name for name, text in before.items() if after[name] != text]


def build_spec(state: LabState) -> VmSpec:
    domain = parse_domain((state.directory / "domain.xml").read_text())
    return build_vm_spec(state, domain, (state.directory / "disk").resolve())


def start_vm(state: LabState, *, kvm: bool) -> LabState:
    """Switch the VM on; its disk and firmware are those of its last run. Returns at once."""
    spec = build_spec(state)
    with hold_lock(state.name):
        state = read_lab(state.name)
        have = state.process(QEMU_ROLE)
        if have is not None and processes.is_running(have.pid, have.started):
            raise HairpinError("the VM is on already", "end QEMU first")
        prepare_files(spec)
        # With the logs, so that they are told when something fails.
        console = state.log_dir / "console.log"
        if not console.is_symlink():
            console.symlink_to(spec.directory / "console.log")
        state = hypervisor.record_process(state, QEMU_ROLE)
        log_file = state.log_dir / f"{QEMU_ROLE}.log"
        pid, started = processes.start_process(
            build_argv(spec, kvm=kvm), lab=state.name, log_file=log_file
        )
        return write_state(
            state.with_process(ProcessRecord(QEMU_ROLE, pid, started, str(log_file)))
        )


def end_vm(state: LabState) -> None:
    """As a power failure: QEMU is killed (SIGKILL) by its pid, and gone when this returns."""
    pid, started = find_process(state, QEMU_ROLE)
    processes.send_signal(pid, started, signal.SIGKILL)
    if processes.wait_gone({pid: started}, 10.0):
        raise HairpinError(f"QEMU ({pid}) outlived SIGKILL")


def is_vm_running(state: LabState) -> bool:
    try:
        find_process(state, QEMU_ROLE)
    except HairpinError:
        return False
    return True


def send_vm_command(state: LabState, name: str) -> Any:
    """`system_reset`, `stop`, `cont` and such (QEMU's machine protocol). Raises HairpinError."""
    return send_command(state.directory / "vm", name)


def read_vm_console(state: LabState) -> str:
    return read_console(state.directory / "vm")


def fetch_certificate(state: LabState) -> str:
    """The certificate that the API shows; "" while nobody answers."""
    argv = [
        *state.client_argv,
        "openssl",
        "s_client",
        "-connect",
        f"{APPLIANCE_ADDRESS}:{state.api_port}",
    ]
    try:
        found = _PEM.search(run(argv, check=False, timeout=20.0).stdout)
    except CommandFailed:
        return ""
    return "" if found is None else found.group()


def find_certificate_fault(state: LabState, certificate: Path) -> str:
    """Why it is not the API's own, issued by the host's CA for the appliance's address; "" if it is."""
    argv = ["openssl", "verify", "-CAfile", str(state.api_certificate), "-purpose", "sslserver"]
    argv += ["-verify_ip", APPLIANCE_ADDRESS, str(certificate)]
    ended = run(argv, check=False)
    return "" if ended.status == 0 else (ended.stderr.strip().splitlines() or ["refused"])[-1]


def read_fingerprint(certificate: Path) -> str:
    """SHA-256, as openssl and the console write it."""
    argv = ["openssl", "x509", "-in", str(certificate), "-noout", "-fingerprint", "-sha256"]
    return run(argv).stdout.strip().partition("=")[2]


def find_largest(page: str) -> dict[str, int]:
    """By lane: the largest packet that its engine took, in bytes, from a page of metrics. Pure."""
    lines = re.findall(
        r'^hairpin_lane_largest_packet_bytes\{lane="(\w+)"\} (\d+)', page, re.MULTILINE
    )
    return {lane: int(size) for lane, size in lines}


def read_metrics(state: LabState) -> str:
    """By curl in the manager's namespace; the token goes by a file, not by the command line."""
    config = state.directory / "curl-metrics"
    token = state.token_file.read_text().strip()
    with os.fdopen(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(f'header = "Authorization: Bearer {token}"\n')
    argv = ["curl", "-q", "-sS", "-f", "-m", "20", "--noproxy", "*", "-K", str(config)]
    argv += ["--cacert", str(state.api_certificate), f"{state.url}/api/v1/metrics"]
    return run([*state.client_argv, *argv]).stdout


def copy_logs(state: LabState, target: Path) -> None:
    """Keep what tells why something failed: the lab takes its directory with it."""
    target.mkdir(parents=True, exist_ok=True)
    for path in state.log_dir.iterdir():
        if path.exists():
            shutil.copyfile(path, target / path.name)
