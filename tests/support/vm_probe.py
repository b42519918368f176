"""Commands that run inside a VM of the image, which has no login: handed in as systemd credentials.

Whoever runs the hypervisor may do this (systemd.system-credentials(7)); a test does, to look at the inside. What a
probe prints comes on the console between two marks.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

from tests.support.qemu import Vm

BEGIN = "=== probe {} begins ==="
END = "=== probe {} ends ==="


def build_probe(name: str, script: str, *, after: str = "multi-user.target") -> Mapping[str, str]:
    """Credentials of a VM that runs ``script`` (sh) as root once ``after`` is there."""
    unit = f"hairpin-test-{name}.service"
    lines = " ; ".join(line.strip() for line in script.strip().splitlines())
    command = f"echo '{BEGIN.format(name)}' ; {lines} ; echo '{END.format(name)}'".replace(
        "%", "%%"
    )
    escaped = command.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return {
        f"systemd.extra-unit.{unit}": (
            f"[Unit]\nAfter={after}\nDefaultDependencies=no\n[Service]\nType=oneshot\n"
            f'StandardOutput=tty\nStandardError=tty\nTTYPath=/dev/console\nExecStart=/bin/sh -c "{escaped}"\n'
        ),
        f"systemd.unit-dropin.{after}~{name}": f"[Unit]\nWants={unit}\n",
    }


def read_probe(vm: Vm, name: str, seconds: float) -> str:
    """What it printed. Raises VmFault after ``seconds``."""
    vm.wait_for(END.format(name), seconds)
    return vm.read_console().partition(BEGIN.format(name))[2].partition(END.format(name))[0].strip()


def write_file(path: str, text: str, *, mode: str = "0640", owner: str = "root hairpin") -> str:
    """A line for the credential `tmpfiles.extra`: a file that is there before any unit of ours starts."""
    return f"f~ {path} {mode} {owner} - {base64.b64encode(text.encode()).decode()}\n"
