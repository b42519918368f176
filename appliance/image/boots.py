"""Which versions the boot loader has, and which it gave up after their tries. Told by a file that health reads.

The boot loader counts in the names of the kernels (systemd's Automatic Boot Assessment): `hairpin_V.efi` is good,
`hairpin_V+2-1.efi` has two tries left of three, `hairpin_V+0-3.efi` has none. Only root sees the boot partition, so
hairpin-boot-report.service writes what health shows. Why a version failed is what its own check said last.

It runs as `python -m appliance.image.boots FILE` at each boot, and takes in no more than it needs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steering.errors import HairpinError

log = logging.getLogger("image")

KERNEL_DIRECTORIES = (Path("/efi/EFI/Linux"), Path("/boot/EFI/Linux"))
OS_RELEASE = Path("/etc/os-release")
RECORD = Path("/var/lib/hairpin-boot/trial.json")
FILE_LIMIT = 64 * 2**10
VERSIONS_LIMIT = 100
LACKING_LIMIT = 20
_LETTERS = 300
_KERNEL = re.compile(
    r"hairpin_([0-9][0-9A-Za-z.~^-]{0,19}?)(?:\+([0-9]{1,4})(?:-([0-9]{1,4}))?)?\.efi"
)


@dataclass(frozen=True, slots=True)
class BootVersion:
    """``left`` None: it was found good, nothing is counted. ``lacking``: what its last check said, when it failed.

    ``at`` of that check, in seconds since the epoch.
    """

    version: str
    left: int | None = None
    done: int = 0
    running: bool = False
    at: float | None = None
    lacking: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """It had its tries, and another version runs."""
        return self.left == 0 and not self.running

    @property
    def state(self) -> str:
        """For people."""
        if self.left is None:
            return "good"
        times = "once" if self.done == 1 else f"{self.done} times"
        return f"tried {times} and failed" if self.failed else f"on trial, tries left: {self.left}"


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """What the check of a version on trial said when it failed."""

    version: str
    at: float
    lacking: tuple[str, ...]


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
    return f"version {one.version} was {one.state}, {running} runs again: {why}"


def find_image_version(text: str) -> str | None:
    """Of os-release(5); None outside of an image. Pure."""
    found = re.search(r"""^IMAGE_VERSION=["']?([^"'\n]+)""", text, re.MULTILINE)
    return None if found is None else found[1]


def read_boots() -> tuple[BootVersion, ...]:
    """What root sees. Raises OSError, and HairpinError outside of an image: there "none" would be no answer."""
    running = find_image_version(OS_RELEASE.read_text(encoding="utf-8", errors="replace"))
    if running is None:
        raise HairpinError(
            "this is no appliance image", "versions are told on the appliance itself"
        )
    return judge_boots(read_kernels(), running, read_record())


def read_kernels(directories: Sequence[Path] = KERNEL_DIRECTORIES) -> tuple[str, ...]:
    """The kernels in the boot partition, by name; root sees them. Empty where there is none."""
    return tuple({path.name for directory in directories for path in directory.glob("hairpin_*")})


def read_record(path: Path = RECORD) -> TrialRecord | None:
    """None where no check failed, or what it wrote can't be read: the boot loader's count says enough."""
    try:
        found = _read(path)
        return TrialRecord(str(found["version"]), float(found["at"]), _take_lacking(found))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as fault:
        log.warning("what the last check said can't be read: %s: %s", path, fault)
        return None


def keep_record(version: str, lacking: Sequence[str], path: Path = RECORD) -> None:
    """For the version that runs after this one. A disk that takes no write must not change what is booted."""
    short = tuple(one[:_LETTERS] for one in lacking[:LACKING_LIMIT])
    try:
        _write(path, asdict(TrialRecord(version, time.time(), short)), 0o600)
    except OSError as fault:
        log.error("what is lacking can't be kept: %s: %s", path, fault)


def write_versions(versions: Sequence[BootVersion], path: Path) -> None:
    """Raises OSError."""
    _write(path, {"versions": [asdict(one) for one in versions]}, 0o644)


def read_versions(path: Path) -> tuple[BootVersion, ...]:
    """What was written for health; empty outside of an image. Never raises: what can't be read is logged."""
    try:
        return tuple(_parse_version(one) for one in _read(path)["versions"][:VERSIONS_LIMIT])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as fault:
        log.warning("the versions can't be read: %s: %s", path, fault)
        return ()


def _parse_version(found: dict[str, Any]) -> BootVersion:
    left, at = found["left"], found["at"]
    return BootVersion(
        version=str(found["version"]),
        left=None if left is None else int(left),
        done=int(found["done"]),
        running=bool(found["running"]),
        at=None if at is None else float(at),
        lacking=_take_lacking(found),
    )


def _take_lacking(found: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(one)[:_LETTERS] for one in found["lacking"][:LACKING_LIMIT])


def _read(path: Path) -> dict[str, Any]:
    with open(path, "rb") as opened:
        value = json.loads(opened.read(FILE_LIMIT))
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _write(path: Path, value: dict[str, Any], mode: int) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(fresh, "x", encoding="utf-8") as opened:
            opened.write(json.dumps(value) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        fresh.chmod(mode)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


if __name__ == "__main__":
    write_versions(read_boots(), Path(sys.argv[1]))
