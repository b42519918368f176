"""A hypervisor in network namespaces, with VMs, a service host and Hairpin in it.

`bring_up`, `take_down`, `read_status` and `run_in` are behind `hairpin lab`; the rest is for tests
and the demonstration. Described in `docs/lab.md`.
"""

from appliance.lab.changes import (
    add_vm,
    change_address,
    find_flows,
    find_ofport,
    find_process,
    kill_process,
    move_vm,
    remove_vm,
    restart_vswitchd,
    start_in_vm,
    stop_process,
)
from appliance.lab.hypervisor import add_plain_flow, find_forwarding_legs, fix_permissions
from appliance.lab.lifecycle import (
    LabStatus,
    bring_up,
    read_lab,
    read_status,
    run_in,
    take_down,
)
from appliance.lab.plan import DEFAULT_VMS, LabLane, LabState, LabVm
from appliance.lab.services import start_service

__all__ = [
    "DEFAULT_VMS",
    "LabLane",
    "LabState",
    "LabStatus",
    "LabVm",
    "add_plain_flow",
    "add_vm",
    "bring_up",
    "change_address",
    "find_flows",
    "find_forwarding_legs",
    "find_ofport",
    "find_process",
    "fix_permissions",
    "kill_process",
    "move_vm",
    "read_lab",
    "read_status",
    "remove_vm",
    "restart_vswitchd",
    "run_in",
    "start_in_vm",
    "start_service",
    "stop_process",
    "take_down",
]
