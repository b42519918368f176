"""Is the version that was just booted to be kept? Asked once after a boot, by hairpin-boot-check.service.

The boot loader counts the tries of a new version. It is kept (`systemd-bless-boot`) when every lane forwards and
blocks its canary within a deadline; else the machine is started again, and after the last try the version before
comes back. A version that is not on trial is never turned out: a host whose switch is down must not make the
appliance start anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from appliance.api.coverage import LaneProofs
from appliance.api.documents import Health
from appliance.image.boots import KERNEL_DIRECTORIES
from steering.errors import HairpinError

log = structlog.get_logger("image")

COUNTED = Path("/sys/firmware/efi/efivars/LoaderBootCountPath-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f")
PAUSE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Boot:
    """``trial``: the boot loader still counts this version's tries. ``others``: versions to go back to."""

    trial: bool
    others: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """``lacking`` are the reasons, empty when it passed."""

    lacking: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.lacking


def judge_faults(faults: Sequence[str]) -> Verdict:
    """Of the settings that could not be made from the seed."""
    return Verdict(tuple(f"not set up: {fault}" for fault in faults))


def judge_lanes(health: Health) -> Verdict:
    """Whether each lane forwards and inspects. Pure."""
    lacking = []
    if health.components.switch.status == "failing":
        lacking.append(f"switch: {health.components.switch.detail}")
    for lane in health.components.lanes:
        if lane.bfd != "up":
            lacking.append(f"lane {lane.name}: nothing is forwarded ({lane.detail or lane.bfd})")
        elif not lane.inspecting:
            lacking.append(f"lane {lane.name}: not inspecting ({lane.detail or lane.engine})")
    if not health.components.lanes:
        lacking.append("there are no lanes")
    return Verdict(tuple(lacking))


def judge_proofs(proofs: LaneProofs) -> Verdict:
    """Whether each lane's canary was blocked and recorded. Pure."""
    lacking = []
    for lane in proofs.lanes:
        canary = lane.canary
        if canary is None or canary.passed is not True:
            why = canary.detail if canary is not None and canary.detail else "it was not sent"
            lacking.append(f"lane {lane.lane}: its canary was not blocked: {why}")
    return Verdict(tuple(lacking))


def wait_until_good(
    read_health: Callable[[], Health],
    prove_lanes: Callable[[], LaneProofs] | None,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Verdict:
    """Ask until it passes, at most so long; then what was lacking last. ``prove_lanes`` None: no canary port."""
    deadline = clock() + seconds
    while True:
        try:
            verdict = judge_lanes(read_health())
            if verdict.passed and prove_lanes is not None:
                verdict = judge_proofs(prove_lanes())
        except HairpinError as fault:
            verdict = Verdict((f"the management service: {fault.reason}",))
        if verdict.passed or clock() >= deadline:
            return verdict
        log.info("boot check: not yet", lacking=list(verdict.lacking))
        pause(PAUSE_SECONDS)


def read_boot(variable: Path = COUNTED, directories: Sequence[Path] = KERNEL_DIRECTORIES) -> Boot:
    """What the boot loader says of this boot. Without one, nothing is on trial.

    Read from where systemd-bless-boot reads it, which wants the disk's device besides. Raises HairpinError when it
    can't be told: then it is not as if nothing were on trial.
    """
    try:
        # One name for each file: /efi and /boot may be the same.
        kernels = {path.name for one in directories for path in one.glob("hairpin_*.efi")}
        counted = parse_counted(variable.read_bytes())
    except FileNotFoundError:
        return Boot(False, max(0, len(kernels) - 1))
    except (OSError, ValueError) as fault:
        raise HairpinError(f"what the boot loader counts can't be read: {fault}") from fault
    if not kernels:
        raise HairpinError("the boot partition is not seen", "see `systemctl status boot.mount`")
    # A version that was found good has another name, without the count.
    return Boot(counted in kernels, len(kernels) - 1)


def parse_counted(data: bytes) -> str:
    """The file's name of the boot loader's entry that is counted (Boot Loader Interface). Raises ValueError. Pure.

    After four bytes of attributes, a path in UTF-16 with backslashes and a zero at its end.
    """
    path = data[4:].decode("utf-16-le").rstrip("\0")
    name = path.replace("\\", "/").rpartition("/")[2]
    if not name:
        raise ValueError("there is no path in it")
    return name
