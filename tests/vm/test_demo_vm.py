"""`make demo-vm` from end to end: the image as a service host, broken and mended under traffic (TCG: 10 minutes)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(2700)]


def test_the_demonstration_with_the_image_passes(image: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "appliance.lab.demo_vm"],
        env={**os.environ, "IMAGE": str(image)},
        capture_output=True,
        text=True,
        timeout=2600,
        check=False,
    )
    last = done.stdout.splitlines()[-1]
    passed = re.fullmatch(r"demo-vm: PASS (\d+)/\1", last)
    assert passed, f"{done.stdout}\n{done.stderr[-6000:]}"
    # A step that was left out would pass, too.
    assert int(passed[1]) >= 50
    assert done.returncode == 0
