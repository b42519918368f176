"""Which versions the boot loader has, and which it gave up after their tries. Told by a file that health reads.

The boot loader counts in the names of the kernels (systemd's Automatic Boot Assessment): `hairpin_V.efi` is good,
`hairpin_V+2-1.efi` has two tries left of three, `hairpin_V+0-3.efi` has none. Only root sees the boot partition, so
hairpin-boot-report.service writes what health shows. Why a version failed is what its own check said last.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.image.bootcheck import KERNEL_DIRECTORIES

log = structlog.get_logger("image")

RECORD = Path("/var/lib/hairpin-boot/trial.json")
FILE_LIMIT = 64 * 2**10
LACKING_LIMIT = 20
_KERNEL = re.compile(
    r"hairpin_([0-9][0-9A-Za-z.~^-]{0,19}?)(?:\+([0-9]{1,4})(?:-([0-9]{1,4}))?)?\.efi"
)


class BootVersion(BaseModel):
    """``left`` None: it was found good, nothing is counted. ``lacking``: what its last check said, when it failed.

    ``at`` of that check, in seconds since the epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str = Field(max_length=20)
    left: int | None = None
    done: int = 0
    running: bool = False
    at: float | None = None
    lacking: tuple[str, ...] = Field(default=(), max_length=LACKING_LIMIT)

    @property
    def failed(self) -> bool:
        """It had its tries, and another version runs."""
        return self.left == 0 and not self.running


class BootVersions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    versions: tuple[BootVersion, ...] = Field(default=(), max_length=100)


class TrialRecord(BaseModel):
    """What the check of a version on trial said when it failed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: str = Field(max_length=20)
    at: float
    lacking: tuple[str, ...] = Field(max_length=LACKING_LIMIT)


def judge_boots(
    names: Iterable[str], running: str, record: TrialRecord | None
) -> tuple[BootVersion, ...]:
    """By the names of the kernels; others are passed over. Pure."""
    found = []
    for name in sorted(set(names)):
        if match := _KERNEL.fullmatch(name):
            version, left, done = match.groups()
            told = record if record is not None and record.version == version else None
            found.append(
                BootVersion(
                    version=version,
                    left=None if left is None else int(left),
                    done=int(done or 0),
                    running=version == running,
                    at=told.at if told else None,
                    lacking=told.lacking if told else (),
                )
            )
    return tuple(found)


def render_failed(one: BootVersion, running: str) -> str:
    """A sentence for health. Pure."""
    why = "; ".join(one.lacking) or "it never came as far as to be checked"
    times = "once" if one.done == 1 else f"{one.done} times"
    return f"version {one.version} was tried {times} and failed, {running} runs again: {why}"


def read_kernels(directories: Sequence[Path] = KERNEL_DIRECTORIES) -> tuple[str, ...]:
    """The kernels in the boot partition, by name; root sees them. Empty where there is none."""
    return tuple({path.name for directory in directories for path in directory.glob("hairpin_*")})


def read_record(path: Path = RECORD) -> TrialRecord | None:
    """None where no check failed, or what it wrote can't be read: the boot loader's count says enough."""
    try:
        return TrialRecord.model_validate_json(_read(path))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as fault:
        log.warning("what the last check said can't be read", path=str(path), reason=str(fault))
        return None


def keep_record(version: str, lacking: Sequence[str], path: Path = RECORD) -> None:
    """For the version that runs after this one. A disk that takes no write must not change what is booted."""
    short = tuple(one[:300] for one in lacking[:LACKING_LIMIT])
    record = TrialRecord(version=version, at=time.time(), lacking=short)
    try:
        _write(path, record.model_dump_json())
    except OSError as fault:
        log.error("what is lacking can't be kept", path=str(path), reason=str(fault))


def write_versions(versions: Sequence[BootVersion], path: Path) -> None:
    """Raises OSError."""
    _write(path, BootVersions(versions=tuple(versions)).model_dump_json())
    path.chmod(0o644)


def read_versions(path: Path) -> tuple[BootVersion, ...]:
    """What was written for health; empty outside of an image. Never raises: what can't be read is logged."""
    try:
        return BootVersions.model_validate_json(_read(path)).versions
    except FileNotFoundError:
        return ()
    except (OSError, ValidationError) as fault:
        log.warning("the versions can't be read", path=str(path), reason=str(fault))
        return ()


def _read(path: Path) -> bytes:
    with open(path, "rb") as opened:
        return opened.read(FILE_LIMIT)


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(fresh, "x", encoding="utf-8") as opened:
            opened.write(text + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
