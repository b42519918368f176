"""A lab test's second try, and the test after one that failed, begin on fresh fixtures of any scope."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The lab is a list here: what matters is when it is made and ended, not what it is.
TESTS = """
import itertools, pytest

numbers = itertools.count(1)
standing = []

def stand(scope):
    number = next(numbers)
    standing.append(number)
    print(f"UP {{scope}} {{number}}")
    yield number
    print(f"DOWN {{scope}} {{number}}")
    standing.remove(number)

@pytest.fixture(scope="session")
def session_lab():
    yield from stand("session")

@pytest.fixture(scope="module")
def module_lab(session_lab, tmp_path_factory):
    (tmp_path_factory.mktemp("servers") / "www").mkdir()
    yield from stand("module")

{mark}
def test_first(module_lab):
    assert standing == [1, 2]

{mark}
def test_that_fails_at_first(module_lab):
    assert module_lab > {wanted}, standing

{mark}
def test_last(module_lab):
    print("LAST HAS", module_lab, standing)
"""
LAB = "@pytest.mark.lab\n@pytest.mark.flaky(reruns=1)"


def run_tests(directory: Path, mark: str, wanted: int) -> tuple[int, list[str], str]:
    """Exit status, the words of the fixtures in order, and all of the output."""
    (directory / "test_it.py").write_text(TESTS.format(mark=mark, wanted=wanted))
    (directory / "pytest.ini").write_text("[pytest]\nmarkers = lab: a lab\n")
    argv = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    argv += ["-p", "tests.support.reruns", "--rerun-show-tracebacks"]
    done = subprocess.run(
        [*argv, f"--rootdir={directory}", str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = re.findall(r"(?:UP|DOWN|LAST) .*", done.stdout)
    return done.returncode, said, done.stdout


def test_a_second_try_is_made_on_fresh_labs(tmp_path: Path) -> None:
    status, said, output = run_tests(tmp_path, LAB, 2)
    assert status == 0, output
    assert said == [
        "UP session 1",
        "UP module 2",
        "DOWN module 2",
        "DOWN session 1",
        "UP session 3",
        "UP module 4",
        "LAST HAS 4 [3, 4]",
        "DOWN module 4",
        "DOWN session 3",
    ]
    assert "1 rerun" in output
    assert "assert 2 > 2" in output, "why the first try failed is told"


def test_neighbours_of_a_test_that_failed_for_good_get_fresh_labs(tmp_path: Path) -> None:
    status, said, output = run_tests(tmp_path, LAB, 99)
    assert status == 1, output
    assert "LAST HAS 6 [5, 6]" in said
    assert said.index("DOWN session 3") < said.index("UP session 5")


@pytest.mark.parametrize("wanted", [0, 99])
def test_what_is_no_lab_test_keeps_its_fixtures(tmp_path: Path, wanted: int) -> None:
    status, said, output = run_tests(tmp_path, "", wanted)
    assert status == (1 if wanted else 0), output
    assert "LAST HAS 2 [1, 2]" in said
