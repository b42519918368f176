"""A lab for tests: fixtures that bring one up and take it down, and a look at what one leaves behind.

`tests/lab/conftest.py` gives the fixtures to every test in that folder.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance.lab import LabState, bring_up, take_down
from appliance.lab.processes import MARKER
from steering.run import Finished, run


def build_name(suffix: str = "") -> str:
    """A name no other run on this machine uses at the same time."""
    return f"t{os.getpid()}{suffix}"


def find_stale(names: Iterable[str], is_alive: Callable[[int], bool]) -> list[str]:
    """The labs of test runs that ended without taking them down (kill -9)."""
    found = []
    for name in names:
        match = re.fullmatch(r"t(\d+)[a-z]?", name)
        if match and not is_alive(int(match[1])):
            found.append(name)
    return found


def _take_down_stale() -> None:
    root = Path("/run/hairpin-lab")
    names = sorted(os.listdir(root)) if root.exists() else []
    for name in find_stale(names, lambda pid: Path(f"/proc/{pid}").exists()):
        take_down(name)


def _stand(name: str, vms: int, serve: bool) -> Iterator[LabState]:
    _take_down_stale()
    try:
        yield bring_up(name, vms, serve=serve)
    finally:
        take_down(name)


@pytest.fixture(scope="session", autouse=True)
def end_in_order() -> Iterator[None]:
    """Let SIGTERM (of `timeout`, of a CI) end the run as Ctrl-C does, so that labs are taken down."""
    owner = os.getpid()

    def interrupt(number: int, _frame: object) -> None:
        if os.getpid() != owner:
            os._exit(0)  # a fork of pyroute2, which is ended with SIGTERM
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def lab() -> Iterator[LabState]:
    """The documented lab, 6 VMs, with Hairpin running; the session shares it: leave it as it was."""
    yield from _stand(build_name(), 6, True)


@pytest.fixture(scope="module")
def module_lab() -> Iterator[LabState]:
    """As `lab`, for one module that changes it."""
    yield from _stand(build_name("m"), 6, True)


@pytest.fixture(scope="module")
def bare_lab() -> Iterator[LabState]:
    """Four VMs (web-1, app-1, db-1, web-2) on a plain switch, legs to an empty service host."""
    yield from _stand(build_name("b"), 4, False)


def is_last_user(request: pytest.FixtureRequest) -> bool:
    """Whether the module after that of a fixture does not use the fixture: what it shares may go."""
    items: list[pytest.Item] = request.session.items
    last = max(n for n, one in enumerate(items) if one.path == request.path)
    after = items[last + 1 : last + 2]
    return not any(request.fixturename in getattr(one, "fixturenames", ()) for one in after)


def run_in_vm(state: LabState, vm: str, *argv: str, timeout: float = 20.0) -> Finished:
    """Run a command inside a VM; its status is for the caller to look at."""
    return run(state.netns_argv(vm, argv), check=False, timeout=timeout)


def reaches(state: LabState, source: str, address: str, *options: str) -> bool:
    """Whether one ping from a VM is answered within a second."""
    return run_in_vm(state, source, "ping", "-n", "-q", "-c1", "-W1", *options, address).status == 0


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> bool:
    """Whether the condition became true within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


@dataclass(frozen=True, slots=True)
class Traces:
    """What of a lab is on the machine."""

    namespaces: tuple[str, ...]
    mounts: tuple[str, ...]
    processes: tuple[str, ...]
    files: tuple[str, ...]
    root_links: tuple[str, ...]


def find_traces(name: str) -> Traces:
    """Everything that a lab of that name has on this machine right now."""
    prefix = f"hp-{name}-"
    directory = Path("/run/netns")
    processes = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = Path("/proc", pid, "environ").read_bytes().split(b"\0")
            command = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if f"{MARKER}={name}".encode() in environment or f"/hairpin-lab/{name}/" in command:
            processes.append(f"{pid} {command}")
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    files = Path("/run/hairpin-lab").glob(f"{name}*") if Path("/run/hairpin-lab").exists() else ()
    links = [
        one for one in os.listdir("/sys/class/net") if one.startswith(("vnet", "hp-", "br-int"))
    ]
    return Traces(
        namespaces=tuple(one for one in sorted(os.listdir(directory)) if one.startswith(prefix))
        if directory.exists()
        else (),
        mounts=tuple(one for one in mounts if prefix in one or f"/hairpin-lab/{name}" in one),
        processes=tuple(processes),
        files=tuple(str(one) for one in files),
        root_links=tuple(links),
    )


NO_TRACES = Traces((), (), (), (), ())
