"""A VM under QEMU for tests: started, its serial console read with a deadline, ended by its pid.

What it is made of is the demonstration's, too: appliance/lab/qemu.py.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.lab.qemu import (
    FIRMWARE,
    POLL_SECONDS,
    QEMU,
    Nic,
    VmSpec,
    build_argv,
    can_use_kvm,
    missing_tools,
    prepare_files,
    read_console,
    send_command,
)

__all__ = [
    "FIRMWARE",
    "QEMU",
    "Nic",
    "Vm",
    "VmFault",
    "VmSpec",
    "build_argv",
    "can_use_kvm",
    "missing_tools",
    "run_vm",
    "write_seed",
]

GRACE_SECONDS = 10.0


class VmFault(AssertionError):
    """The VM did not do what was waited for; carries the end of its console."""


class Vm:
    """A VM that runs. ``pid`` is QEMU's own."""

    def __init__(self, spec: VmSpec, *, kvm: bool | None = None) -> None:
        self.spec = spec
        self.kvm = can_use_kvm() if kvm is None else kvm
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def console(self) -> Path:
        """What the VM wrote to its serial console since it was made, through every reboot."""
        return self.spec.directory / "console.log"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise VmFault("the VM was not started")
        return self._process.pid

    def prepare(self) -> None:
        """Make the overlay and the firmware's variables, unless they are there from an earlier start."""
        prepare_files(self.spec)

    def start(self) -> None:
        """Switch it on. The disk and the firmware's variables are those of its last run, if it ran before."""
        self.prepare()
        with (self.spec.directory / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                build_argv(self.spec, kvm=self.kvm),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def read_console(self) -> str:
        """All of it, as text without control sequences."""
        return read_console(self.spec.directory)

    def wait_for(self, pattern: str, seconds: float, *, after: int = 0) -> re.Match[str]:
        """Until the console, from character ``after`` on, has the regular expression; the match.

        Raises VmFault after ``seconds``, or when QEMU has ended. TCG is slow: be generous.
        """
        wanted = re.compile(pattern, re.MULTILINE)
        deadline = time.monotonic() + seconds
        while True:
            ended = self._process is None or self._process.poll() is not None
            if found := wanted.search(self.read_console(), after):
                return found
            if ended:
                raise VmFault(f"QEMU ended before {pattern!r} was seen\n{self._describe()}")
            if time.monotonic() >= deadline:
                raise VmFault(f"no {pattern!r} within {seconds:.0f} s\n{self._describe()}")
            time.sleep(POLL_SECONDS)

    def wait_ended(self, seconds: float) -> None:
        """Until QEMU has ended by itself, as it does when the VM powers off. Raises VmFault."""
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired as late:
            raise VmFault(f"QEMU still runs after {seconds:.0f} s\n{self._describe()}") from late

    def _describe(self) -> str:
        log = self.spec.directory / "qemu.log"
        said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        return f"--- console\n{self.read_console()[-6000:]}\n--- QEMU\n{said}"

    def command(self, name: str, **arguments: Any) -> Any:
        """One command of QEMU's machine protocol, as `system_reset` or `set_link`; its answer."""
        return send_command(self.spec.directory, name, **arguments)

    def press_power(self) -> None:
        """What a hypervisor does to switch a VM off in order."""
        self.command("system_powerdown")

    def kill(self) -> None:
        """As a power failure: QEMU is killed by its pid (SIGKILL) and waited for."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(GRACE_SECONDS)


@contextlib.contextmanager
def run_vm(spec: VmSpec, *, kvm: bool | None = None) -> Iterator[Vm]:
    """A VM that is switched on, and off at the end whatever happens."""
    vm = Vm(spec, kvm=kvm)
    vm.start()
    try:
        yield vm
    finally:
        vm.kill()


def write_seed(path: Path, files: Mapping[str, str], label: str = "CIDATA") -> Path:
    """A NoCloud seed: a small FAT file system (mtools) with these files, unmounted and without a loop device."""
    with path.open("wb") as stream:
        stream.truncate(2 * 2**20)
    _run_tool(["mkfs.vfat", "-n", label, str(path)])
    for name, text in files.items():
        _run_tool(["mcopy", "-i", str(path), "-", f"::{name}"], text)
    return path


def _run_tool(argv: Sequence[str], text: str = "") -> None:
    subprocess.run(argv, input=text.encode(), check=True, capture_output=True, timeout=30)
