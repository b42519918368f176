"""A new version beside the running one: written from a disk, tried, sent back, told by health; tried again and kept.

The host is a real one: Open vSwitch's userspace datapath, prepared by `hairpin host prepare`, so that lanes forward
and canaries are blocked. What fails the first trial is a leg whose link is down on the host. One machine, four boots.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.lab import lifecycle
from appliance.lab.plan import LabState
from appliance.lab.vm_lab import bring_up_vm, build_spec
from steering.run import run
from tests.support.qemu import can_use_kvm, run_vm
from tests.support.vm_probe import build_probe
from tests.vm.updates import LINUX, Life, find_version, render_wait

pytestmark = [pytest.mark.vm, pytest.mark.lab, pytest.mark.timeout(5400)]

LAB = "imgup"
# The shipped unit waits 240 s, by when an emulated appliance beside others does not always inspect.
PATIENT = """[Service]
ExecStart=
ExecStart=/usr/bin/hairpin image check --seconds 900 --faults /run/hairpin-config/faults.json --record {record}
TimeoutStartSec=1200
"""
RECORD = "/var/lib/hairpin-boot/trial.json"


def write_script(new: str) -> str:
    """What the probe does in each life, by which version runs and what became of the new one.

    The boot loader would give three tries: it is left one.
    """
    kernel = f"{LINUX}/hairpin_{new}"
    told = (
        "hairpin health --json > /tmp/health.json 2>/dev/null; grep -q 'was tried' /tmp/health.json"
    )
    facts = f"echo [kernels] $(ls {LINUX}); echo [boots] $(cat /run/hairpin-boot/versions.json)"
    unit = "$(systemctl show -P Result hairpin-update.service)"
    idle = "! systemctl is-active hairpin-update | grep -q activating"
    first = (
        f"{render_wait(f'[ -e {kernel}+3-0.efi ]', idle)}; echo [update] {unit}; {facts}; "
        f"mv {kernel}+3-0.efi {kernel}+1-0.efi; sync"
    )
    returned = (
        f"{render_wait(told)}; {facts}; echo [update] {unit}; "
        "echo [reason] $(grep 'was tried' /tmp/health.json); "
        f"mv {kernel}+0-1.efi {kernel}+1-0.efi; sync"
    )
    tried = f"{render_wait(f'[ -e {kernel}.efi ]')}; {facts}"
    return "\n".join(
        (
            "export HOME=/tmp",
            ". /etc/os-release; v=$IMAGE_VERSION; echo [version] $v",
            f"if [ $v = {new} ]; then {tried}; "
            f"elif ls {LINUX} | grep -q '{new}+0-1'; then {returned}; else {first}; fi",
        )
    )


@pytest.fixture(scope="module")
def lab(image: Path) -> Iterator[LabState]:
    try:
        yield bring_up_vm(LAB, image, kvm=can_use_kvm(), vms=2)
    finally:
        lifecycle.take_down(LAB)


@pytest.fixture(scope="module")
def story(
    image: Path, newer: Path, update_disk: Path, lab: LabState
) -> Iterator[tuple[str, str, list[dict[str, str]], str]]:
    """Versions, what each life told, and the whole console."""
    old, new = find_version(image), find_version(newer)
    probe = build_probe("life", write_script(new))
    shipped = replace(build_spec(lab), drives=(update_disk,), credentials=probe)
    unit = "systemd.unit-dropin.hairpin-boot-check.service"
    patient = replace(shipped, credentials={**probe, unit: PATIENT.format(record=RECORD)})
    leg = next(one.leg_a for one in lab.lanes)
    lives = []
    with run_vm(shipped, kvm=can_use_kvm()) as vm:
        life = Life(vm)
        lives.append(life.wait())
        run(["ip", "-n", lab.hypervisor, "link", "set", leg, "down"])
        vm.command("system_reset")
        lives.append(life.wait())
        run(["ip", "-n", lab.hypervisor, "link", "set", leg, "up"])
    with run_vm(patient, kvm=can_use_kvm()) as vm:
        life = Life(vm, len(vm.read_console()))
        lives.append(life.wait())
        yield old, new, lives, vm.read_console()


def test_a_disk_with_a_new_version_is_written_beside_the_one_that_runs(
    story: tuple[str, str, list[dict[str, str]], str],
) -> None:
    old, new, lives, console = story
    assert lives[0]["version"] == old
    assert lives[0]["update"] == "success", console[-6000:]
    assert set(lives[0]["kernels"].split()) == {f"hairpin_{old}.efi", f"hairpin_{new}+3-0.efi"}


def test_a_version_whose_lanes_do_not_forward_is_sent_back(
    story: tuple[str, str, list[dict[str, str]], str],
) -> None:
    old, new, lives, console = story
    assert "lacking: lane prevent:" in console
    assert lives[1]["version"] == old
    assert set(lives[1]["kernels"].split()) == {f"hairpin_{old}.efi", f"hairpin_{new}+0-1.efi"}


def test_health_says_that_a_version_was_tried_and_failed_and_why(
    story: tuple[str, str, list[dict[str, str]], str],
) -> None:
    old, new, lives, _ = story
    reason = lives[1]["reason"]
    assert f"version {new} was tried once and failed, {old} runs again: lane prevent:" in reason
    # The disk is still there: it is not written, and so tried, again and again.
    assert lives[1]["update"] == "success"


def test_a_good_version_is_kept(story: tuple[str, str, list[dict[str, str]], str]) -> None:
    old, new, lives, console = story
    assert lives[2]["version"] == new, console[-6000:]
    assert set(lives[2]["kernels"].split()) == {f"hairpin_{old}.efi", f"hairpin_{new}.efi"}
    assert "every lane forwards and blocks its canary" in console
    assert json.loads(lives[1]["boots"])
