"""A new version that does not do: written from a disk, tried, sent back, remembered. Without a host, and so quick.

There is no seed: that is what fails the trial. With a host, health and a good version: test_image_update.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.qemu import VmSpec, run_vm
from tests.support.vm_probe import build_probe
from tests.vm.test_image_boot import DISK_BYTES
from tests.vm.updates import LINUX, Life, find_version, render_wait

pytestmark = [pytest.mark.vm, pytest.mark.timeout(5400)]


def write_script(new: str) -> str:
    """What the probe does in each life. The boot loader would give three tries: it is left one."""
    kernel = f"{LINUX}/hairpin_{new}"
    facts = f"echo [kernels] $(ls {LINUX}); echo [boots] $(cat /run/hairpin-boot/versions.json)"
    result = "echo [update] $(systemctl show -P Result hairpin-update.service)"
    written = render_wait(
        f"[ -e {kernel}+3-0.efi ]", "! systemctl is-active hairpin-update | grep -q activating"
    )
    first = f"{written}; {result}; {facts}; mv {kernel}+3-0.efi {kernel}+1-0.efi; sync"
    reported = render_wait("grep -q left /run/hairpin-boot/versions.json")
    again = render_wait("systemctl is-active hairpin-update | grep -q inactive")
    returned = f"{reported}; {again}; {result}; {facts}"
    return "\n".join(
        (
            ". /etc/os-release; v=$IMAGE_VERSION; echo [version] $v",
            # The trial: the check restarts the machine.
            f"if [ $v = {new} ]; then sleep 3000; fi",
            f"if [ -e {kernel}+0-1.efi ]; then {returned}; else {first}; fi",
        )
    )


@pytest.fixture(scope="module")
def lives(
    image: Path, newer: Path, update_disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, str], dict[str, str], str]]:
    spec = VmSpec(
        disk=image,
        directory=tmp_path_factory.mktemp("vm"),
        disk_bytes=DISK_BYTES,
        drives=(update_disk,),
        credentials=build_probe("life", write_script(find_version(newer))),
    )
    with run_vm(spec) as vm:
        life = Life(vm)
        first = life.wait()
        vm.command("system_reset")
        yield first, life.wait(), vm.read_console()


def test_a_disk_is_taken_without_a_seed_and_written_beside_the_one_that_runs(
    image: Path, newer: Path, lives: tuple[dict[str, str], dict[str, str], str]
) -> None:
    old, new = find_version(image), find_version(newer)
    first, _, console = lives
    assert first["version"] == old
    assert first["update"] == "success", console[-6000:]
    assert set(first["kernels"].split()) == {f"hairpin_{old}.efi", f"hairpin_{new}+3-0.efi"}
    assert f"version {new} is written; it is tried at the next boot" in console


def test_it_is_tried_sent_back_and_remembered_with_the_reason(
    image: Path, newer: Path, lives: tuple[dict[str, str], dict[str, str], str]
) -> None:
    old, new = find_version(image), find_version(newer)
    _, returned, console = lives
    assert "lacking: not set up: (seed): there is none" in console
    assert returned["version"] == old
    assert set(returned["kernels"].split()) == {f"hairpin_{old}.efi", f"hairpin_{new}+0-1.efi"}
    versions = {one["version"]: one for one in json.loads(returned["boots"])["versions"]}
    assert versions[old]["running"]
    assert versions[old]["left"] is None
    assert (versions[new]["running"], versions[new]["left"], versions[new]["done"]) == (False, 0, 1)
    assert versions[new]["lacking"][0].startswith("not set up: (seed): there is none")


def test_a_version_that_failed_is_not_written_again_by_a_disk_that_stays(
    newer: Path, lives: tuple[dict[str, str], dict[str, str], str]
) -> None:
    _, returned, console = lives
    assert returned["update"] == "success"
    assert f"version {find_version(newer)} is here already (tried once and failed)" in console
