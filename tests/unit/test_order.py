"""Files run in the order that finds faults soonest, and each file's tests in the order they stand in."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARKS = {
    "lab": "pytest.mark.lab",
    "beside": "[pytest.mark.lab, pytest.mark.side_by_side]",
    "quick": "pytest.mark.quick",
    "story": "[pytest.mark.lab, pytest.mark.side_by_side]",
}
TESTS = """
import pytest
pytestmark = {mark}

def test_first(): pass

{slow}
def test_second(): pass
"""
SIDE_BY_SIDE = ("-n", "1", "--dist", "loadfile", "--no-loadscope-reorder")


def find_order(directory: Path, *options: str) -> list[str]:
    """The tests as they ran: "FILE NUMBER"."""
    for name, mark in MARKS.items():
        slow = "@pytest.mark.slow" if name == "story" else ""
        (directory / f"test_{name}.py").write_text(TESTS.format(mark=mark, slow=slow))
    marks = "\n".join(f"    {name}: a mark" for name in ("lab", "side_by_side", "quick", "slow"))
    (directory / "pytest.ini").write_text(f"[pytest]\nmarkers =\n{marks}\n")
    argv = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    argv += ["-p", "tests.support.order", f"--rootdir={directory}", *options, str(directory)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.findall(
        r"test_(\w+)\.py::test_(\w+) PASSED|PASSED \S*test_(\w+)\.py::test_(\w+)", done.stdout
    )
    return [" ".join(filter(None, one)) for one in ran]


@pytest.mark.parametrize(
    ("options", "files"),
    [
        pytest.param((), ("quick", "beside", "story", "lab"), id="one after the other"),
        pytest.param(SIDE_BY_SIDE, ("story", "beside", "quick", "lab"), id="side by side"),
    ],
)
def test_files_are_moved_whole(
    tmp_path: Path, options: tuple[str, ...], files: tuple[str, ...]
) -> None:
    wanted = [f"{name} {number}" for name in files for number in ("first", "second")]
    assert find_order(tmp_path, *options) == wanted
