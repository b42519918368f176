"""A disk that is really full when a partition is to begin: a tmpfs in a mount namespace of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MOUNT = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -m tests.support.full_disk "$1" "$3"'


@pytest.mark.lab
@pytest.mark.side_by_side
def test_a_full_disk_at_a_roll_delays_alerts_and_loses_none(tmp_path: Path) -> None:
    small, other = tmp_path / "small", tmp_path / "other"
    small.mkdir()
    other.mkdir()
    argv = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", MOUNT, "sh"]
    done = subprocess.run(
        [*argv, str(small), sys.executable, str(other)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ended while full"] is False
    assert "full" in told["fault"] or "No space" in told["fault"]
    assert told["ended"] is False
    assert told["ids"] == told["ports"] == list(range(1, 60))
    assert not [name for name in told["files"] if ".new" in name]
