"""Legs as taps of a VM that ends and starts again, on a switch with real devices (userspace datapath)."""

from __future__ import annotations

import json
import sys
import tempfile

import pytest

from steering.run import run

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]


def test_kept_taps_carry_frames_in_each_life_of_the_vm() -> None:
    with tempfile.TemporaryDirectory(prefix="hp-") as directory:
        argv = ["unshare", "--net", "--", sys.executable, "-m", "tests.support.tap_host", directory]
        found = json.loads(run(argv, timeout=90).stdout.splitlines()[-1])
    # Refused first: taps that come and go with the VM would be dead after its first life.
    assert found["statuses"] == [1, 0, 0, 0]
    assert found["told"] == ["65000", "1504"]
    assert found["counts"] == [5, 10, 15]
    assert found["left"] == []
