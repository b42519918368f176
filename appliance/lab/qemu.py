"""A VM under QEMU: its command, its files, its console and its machine protocol. The process is its starter's.

KVM is used where a guest boots under it (that /dev/kvm is there says little: see `can_use_kvm`), else TCG, which
needs QEMU 10 for Debian 13's kernel. The disk that is given stays as it is: a VM writes to an overlay of its own.
Sources: qemu(1), qemu-img(1), systemd.system-credentials(7), the QEMU Machine Protocol.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from steering.errors import HairpinError
from steering.run import run

QEMU = "qemu-system-x86_64"
FIRMWARE = Path("/usr/share/OVMF")
MEMORY_MIB = 2048
CORES = 2
PROBE_SECONDS = 20.0
POLL_SECONDS = 0.1
# Colours, cursor movements and window titles of a console (ECMA-48).
_ESCAPES = re.compile(
    r"\x1b(\[[0-?]*[ -/]*[@-~]|[\]P][^\x07\x1b]*(\x07|\x1b\\)|[()][A-Z0-9]|[=>78cM])"
)


@dataclass(frozen=True)
class Nic:
    """A network card. ``netdev`` is QEMU's description of its other end, without the id."""

    mac: str
    netdev: str
    device: str = "virtio-net-pci"
    options: str = ""

    @classmethod
    def tap(cls, name: str, mac: str, *, options: str = "", queues: int = 1) -> Nic:
        """By a tap device that exists already, in the VM's network namespace."""
        several = "" if queues == 1 else f",queues={queues}"
        card = options if queues == 1 else ",".join(filter(None, ("mq=on", options)))
        return cls(mac, f"tap,ifname={name},script=no,downscript=no{several}", options=card)

    @classmethod
    def user(
        cls, mac: str, forwards: Mapping[int, int], outward: Mapping[str, str] | None = None
    ) -> Nic:
        """QEMU's own little network, cut off from all others; ``forwards`` loopback's ports to the VM's.

        ``outward``: `ADDRESS:PORT` of that network, and the command that a connection to it is the input of.
        """
        ports = "".join(
            f",hostfwd=tcp:127.0.0.1:{ours}-:{theirs}" for ours, theirs in forwards.items()
        )
        ports += "".join(
            f",guestfwd=tcp:{at}-cmd:{_escape(command)}" for at, command in (outward or {}).items()
        )
        return cls(mac, f"user,restrict=on{ports}")

    @classmethod
    def stream(cls, path: Path, mac: str, *, server: bool = False) -> Nic:
        """Joined to another VM, or to a test, by a UNIX socket."""
        listens = "on" if server else "off"
        return cls(mac, f"stream,server={listens},addr.type=unix,addr.path={path}")


@dataclass(frozen=True)
class VmSpec:
    """``directory`` takes the VM's files. ``disk_format`` is `raw` or `qcow2`, ``disk_bytes`` the size that
    the VM sees (None: the disk's own). ``credentials`` are systemd's, handed in by SMBIOS; ``drives`` are further
    images, read-only (a NoCloud seed). ``namespace`` is a network namespace that its taps are in.

    ``secure_boot`` takes firmware that enforces it and begins without keys: the boot loader enrols the image's.
    """

    disk: Path
    directory: Path
    disk_format: str = "raw"
    disk_bytes: int | None = None
    memory_mib: int = MEMORY_MIB
    cores: int = CORES
    nics: tuple[Nic, ...] = ()
    credentials: Mapping[str, str] = field(default_factory=dict)
    drives: tuple[Path, ...] = ()
    uuid: str = "5e7a3c6e-1d1f-4e5b-8a55-0d4a11c0ffee"
    namespace: str | None = None
    secure_boot: bool = False
    options: tuple[str, ...] = ()


def _escape(text: str) -> str:
    """For a value among QEMU's comma-separated options."""
    return text.replace(",", ",,")


def build_argv(spec: VmSpec, *, kvm: bool) -> list[str]:
    """The command of a VM whose files are in ``spec.directory``."""
    at = spec.directory
    code = "OVMF_CODE_4M.secboot.fd" if spec.secure_boot else "OVMF_CODE_4M.fd"
    argv = [] if spec.namespace is None else ["ip", "netns", "exec", spec.namespace]
    argv += [QEMU, "-name", "hairpin-test", "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-machine", "q35,smm=on" if spec.secure_boot else "q35,smm=off"]
    # `max` under TCG has SSSE3, which Hyperscan needs.
    argv += ["-accel", "kvm" if kvm else "tcg,thread=multi", "-cpu", "host" if kvm else "max"]
    argv += ["-m", str(spec.memory_mib), "-smp", str(spec.cores), "-uuid", spec.uuid]
    if spec.secure_boot:
        argv += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
    argv += [
        "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={FIRMWARE / code}",
        "-drive", f"if=pflash,format=raw,unit=1,file={_escape(str(at / 'firmware.fd'))}",
        "-drive", f"if=none,id=disk,format=qcow2,cache=unsafe,file={_escape(str(at / 'disk.qcow2'))}",
        "-device", "virtio-blk-pci,drive=disk,bootindex=0",
        "-object", "rng-random,id=rng,filename=/dev/urandom",
        "-device", "virtio-rng-pci,rng=rng",
        "-chardev", f"file,id=console,append=on,path={_escape(str(at / 'console.log'))}",
        "-serial", "chardev:console",
        "-qmp", f"unix:{_escape(str(at / 'qmp.sock'))},server=on,wait=off",
    ]  # fmt: skip
    for number, drive in enumerate(spec.drives):
        argv += [
            "-drive",
            f"if=none,id=more{number},format=raw,readonly=on,file={_escape(str(drive))}",
        ]
        argv += ["-device", f"virtio-blk-pci,drive=more{number}"]
    for number, nic in enumerate(spec.nics):
        argv += ["-netdev", _add_id(nic.netdev, f"net{number}")]
        card = ",".join(
            filter(None, (f"{nic.device},netdev=net{number},mac={nic.mac},romfile=", nic.options))
        )
        argv += ["-device", card]
    for name, value in spec.credentials.items():
        coded = base64.b64encode(value.encode()).decode()
        argv += ["-smbios", f"type=11,value=io.systemd.credential.binary:{_escape(name)}={coded}"]
    return [*argv, *spec.options]


def _add_id(netdev: str, name: str) -> str:
    kind, _, rest = netdev.partition(",")
    return ",".join(filter(None, (kind, f"id={name}", rest)))


def prepare_files(spec: VmSpec) -> None:
    """Make the overlay and the firmware's variables, unless they are there from an earlier start.

    Raises HairpinError.
    """
    at = spec.directory
    try:
        at.mkdir(parents=True, exist_ok=True)
        if not (at / "disk.qcow2").exists():
            argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", spec.disk_format]
            argv += ["-b", str(spec.disk.resolve()), str(at / "disk.qcow2")]
            argv += [] if spec.disk_bytes is None else [str(spec.disk_bytes)]
            run(argv, timeout=60)
        if not (at / "firmware.fd").exists():
            shutil.copyfile(FIRMWARE / "OVMF_VARS_4M.fd", at / "firmware.fd")
        # Of a run that was killed: QEMU would not listen there again.
        (at / "qmp.sock").unlink(missing_ok=True)
    except OSError as fault:
        raise HairpinError(f"the VM's files can't be made: {fault}") from fault


def read_console(directory: Path) -> str:
    """All that the VM wrote to its serial console, through every reboot, without control sequences."""
    try:
        raw = (directory / "console.log").read_bytes()
    except FileNotFoundError:
        return ""
    return _ESCAPES.sub("", raw.decode(errors="replace")).replace("\r", "")


def send_command(directory: Path, name: str, **arguments: Any) -> Any:
    """One command of QEMU's machine protocol, as `system_reset` or `set_link`; its answer.

    Raises HairpinError.
    """
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(10)
            link.connect(str(directory / "qmp.sock"))
            with link.makefile("rw", encoding="utf-8") as stream:
                stream.readline()
                for request in (
                    {"execute": "qmp_capabilities"},
                    {"execute": name, "arguments": arguments},
                ):
                    stream.write(json.dumps(request) + "\n")
                    stream.flush()
                    while "event" in (answer := json.loads(stream.readline())):
                        pass
    except (OSError, ValueError) as fault:
        raise HairpinError(f"QEMU does not take {name}: {fault}") from fault
    if "error" in answer:
        raise HairpinError(f"{name}: {answer['error'].get('desc')}")
    return answer["return"]


def missing_tools() -> list[str]:
    """What of QEMU and its firmware is not installed here (`image-build/setup-image.sh` installs it)."""
    missing = [name for name in (QEMU, "qemu-img") if shutil.which(name) is None]
    return missing + [str(FIRMWARE)] * (not (FIRMWARE / "OVMF_CODE_4M.fd").exists())


@cache
def can_use_kvm() -> bool:
    """Whether a guest boots under KVM: the firmware alone, until it says that there is no disk to boot from.

    Some machines have /dev/kvm but their guests die by "KVM internal error".
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    argv = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,smm=off"]
    argv += ["-accel", "kvm", "-cpu", "host", "-m", "256", "-no-reboot", "-serial", "stdio"]
    argv += [
        "-drive",
        f"if=pflash,format=raw,unit=0,readonly=on,file={FIRMWARE / 'OVMF_CODE_4M.fd'}",
    ]
    argv += [
        "-drive",
        f"if=pflash,format=raw,unit=1,snapshot=on,file={FIRMWARE / 'OVMF_VARS_4M.fd'}",
    ]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as probe:
        assert probe.stdout is not None  # noqa: S101 - asked for above
        os.set_blocking(probe.stdout.fileno(), False)
        deadline = time.monotonic() + PROBE_SECONDS
        said = b""
        try:
            while time.monotonic() < deadline and probe.poll() is None:
                said += probe.stdout.read() or b""
                if b"BdsDxe" in said or b"UEFI Interactive Shell" in said:
                    return True
                if b"internal error" in said:
                    return False
                time.sleep(POLL_SECONDS)
        finally:
            probe.kill()
    return False
