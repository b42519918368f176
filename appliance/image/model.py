"""Frozen values of the image at rest, and its failures. Offsets and sizes are bytes unless said otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from steering.errors import HairpinError

SECTOR = 512
VERSION = re.compile(r"[0-9][0-9A-Za-z.~^-]{0,19}")
"""How a version of the image is written."""
Progress = Callable[[str], None]


class ImageError(HairpinError):
    """The image can't be read, or is not to be touched now."""


class Damaged(ImageError):
    """A structure is not what its format says: changed, torn or never it."""

    def __init__(
        self,
        reason: str,
        mend: str = "take a whole copy; `hairpin image verify` tells what differs",
    ) -> None:
        super().__init__(reason, mend)


class Source(Protocol):
    """Bytes at rest: a disk, a partition, a file of a partition."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes. Raises Damaged past the end, ImageError when the disk fails."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """A source in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > len(self.data):
            raise Damaged(f"{size} bytes at {offset} lie outside of {len(self.data)} bytes")
        return self.data[offset : offset + size]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of another source, as a source of its own."""

    whole: Source
    start: int
    size: int

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise Damaged(f"{size} bytes at {offset} lie outside of {self.size} bytes")
        return self.whole.read(self.start + offset, size)


class Status(StrEnum):
    """What a part of the image is, beside what was signed."""

    OK = "ok"
    CHANGED = "changed"
    UNSIGNED = "unsigned"
    UNEXPECTED = "unexpected"
    MISSING = "missing"
    STATE = "state"
    OLDER = "older"


@dataclass(frozen=True, slots=True)
class Finding:
    """One part of the image. ``signer`` is who signed it, empty where nobody did.

    STATE: it is what the appliance wrote while it ran, which nobody signs; it was not looked at. OLDER: signed, and
    older than what is wanted.
    """

    place: str
    status: Status
    detail: str = ""
    signer: str = ""

    @property
    def good(self) -> bool:
        return self.status in (Status.OK, Status.STATE)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel image (UKI) that is signed, and the root that it was signed for. ``path`` in the boot partition."""

    path: str
    version: str
    root_hash: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """All findings, in the order of the disk. ``kernels`` are those that can boot, ``serials`` those of the
    rules' copies that can be used.
    """

    findings: tuple[Finding, ...]
    kernels: tuple[Kernel, ...] = ()
    serials: tuple[int, ...] = ()

    @property
    def versions(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys(one.version for one in self.kernels))

    @property
    def good(self) -> bool:
        return all(one.good for one in self.findings)


def find_nonzero(source: Source, start: int, size: int, chunk: int = 2**20) -> int | None:
    """The offset of the first byte that is not zero, in ``size`` bytes from ``start``; None without one."""
    done = 0
    while done < size:
        data = source.read(start + done, min(chunk, size - done))
        if data.count(0) != len(data):
            return start + done + len(data) - len(data.lstrip(b"\0"))
        done += len(data)
    return None
