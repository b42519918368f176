"""The arrows between rooms hold, and would be missed if they did not; files stay readable."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("appliance", "steering")
MAX_LINES = 600
LINTER = "from importlinter.cli import lint_imports_command; lint_imports_command()"

# Only these start processes: one door, the keepers of processes that live on, and what becomes another program.
STARTERS = {
    "steering/run.py",
    "steering/switch/monitor.py",
    "steering/switch/replica.py",
    "appliance/inspection/process.py",
    "appliance/lab/expose.py",
    "appliance/lab/lifecycle.py",
    "appliance/lab/processes.py",
    "appliance/lab/qemu.py",
    "appliance/visibility/main.py",
    "appliance/visibility/observer.py",
}


def run_linter(where: Path) -> subprocess.CompletedProcess[str]:
    # The packages beside the configuration are checked, not those that are installed.
    return subprocess.run(
        [sys.executable, "-c", LINTER, "--config", "pyproject.toml", "--no-cache"],
        cwd=where,
        env={"PYTHONPATH": str(where), "PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def find_sources(*roots: str) -> Iterator[Path]:
    for root in roots:
        yield from sorted((ROOT / root).rglob("*.py"))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The packages and the contracts, to be broken."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def test_every_import_follows_the_arrows() -> None:
    done = run_linter(ROOT)
    assert done.returncode == 0, done.stdout
    assert "Contracts: 2 kept, 0 broken." in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("steering/model.py", "import appliance.paths", "steering never imports appliance"),
        (
            "steering/switch/monitor.py",
            "def later() -> None:\n    from appliance import settings",
            "steering never imports appliance",
        ),
        (
            "appliance/client.py",
            "from steering.switch import monitor",
            "appliance never opens the door to the switch itself",
        ),
        (
            "appliance/alerts/new.py",
            "import steering.switch",
            "appliance never opens the door to the switch itself",
        ),
    ],
)
def test_an_import_against_an_arrow_is_reported(
    copied: Path, file: str, line: str, contract: str
) -> None:
    with (copied / file).open("a") as stream:
        stream.write(f"\n{line}\n")
    done = run_linter(copied)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout
    assert "Contracts: 1 kept, 1 broken." in done.stdout


def find_process_starters(source: str) -> bool:
    """Whether a module can start a process or a shell by itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            if {"subprocess", "pty", "multiprocessing"} & {one.partition(".")[0] for one in names}:
                return True
        if isinstance(node, ast.Attribute) and (
            node.attr.startswith(("create_subprocess_", "exec", "spawn", "posix_spawn", "popen"))
            or node.attr in {"fork", "forkpty", "system"}
        ):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id in {"os", "asyncio"}:
                return True
    return False


def test_processes_are_started_in_few_places() -> None:
    starting = {
        str(path.relative_to(ROOT))
        for path in find_sources(*PACKAGES)
        if find_process_starters(path.read_text())
    }
    assert starting == STARTERS


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "from subprocess import run",
        "import os\nos.system('x')",
        "import os\nos.execvp('x', [])",
        "import asyncio\nasyncio.create_subprocess_shell('x')",
    ],
)
def test_a_module_that_starts_processes_is_seen(source: str) -> None:
    assert find_process_starters(source)
    assert not find_process_starters("from steering.run import run\nrun(['true'])")


def test_the_engine_s_folder_holds_data_only() -> None:
    """A package of this name would shadow the one that suricata-update installs."""
    assert not list(find_sources("suricata"))
    assert (ROOT / "suricata/suricata.yaml.j2").is_file()


def test_no_file_is_too_long_to_read() -> None:
    sources = list(find_sources(*PACKAGES, "tests"))
    assert len(sources) > 100
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
