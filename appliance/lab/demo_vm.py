"""`make demo-vm`: the scenario of `make demo`, with the real image under QEMU as the service host.

As there: the table, `demo-vm: PASS n/n` as the last line, the statuses, and nothing left. The disk is the newest
in image-build/out, or the one that the environment's IMAGE names. Described in docs/demo-vm.md.
"""

from __future__ import annotations

import os
import sys

from appliance.commands.output import print_note
from appliance.lab.demo import POLICY_STEPS, Demonstration, Say, main, run_steps
from appliance.lab.demo_report import Check, is_passed
from appliance.lab.demo_stage import read_tails, set_stage
from appliance.lab.demo_vm_fast import run_fast
from appliance.lab.demo_vm_steps import run_boot, run_restore, run_vm_failure
from appliance.lab.plan import LabState
from appliance.lab.qemu import can_use_kvm
from appliance.lab.vm_lab import bring_up_vm, check_tools, find_images
from appliance.lab.vm_plan import find_image

NAME = "demo-vm"
STEPS = (*POLICY_STEPS, ("e", run_vm_failure), ("f", run_fast), ("g", run_restore))


def make(name: str, say: Say) -> LabState:
    disk = check_tools(find_image(os.environ.get("IMAGE"), find_images()))
    kvm = can_use_kvm()
    say(f"{disk}, by {'KVM' if kvm else 'TCG: no guest boots under KVM here'}")
    return bring_up_vm(name, disk, kvm=kvm, progress=say)


def play(state: LabState, say: Say, checks: list[Check]) -> None:
    """Boot the VM and run the scenario; without a VM that works there is nothing further to show."""
    try:
        stage = set_stage(state, say)
        run_steps(stage, (("", run_boot),), checks)
        if is_passed(checks):
            run_steps(stage, STEPS, checks)
    finally:
        if not is_passed(checks):
            print_note(read_tails(state))


DEMO = Demonstration(NAME, make, play, last="g")

if __name__ == "__main__":
    sys.exit(main(DEMO))
