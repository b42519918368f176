"""Failures as typed values: each carries what failed and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing wrong in a document. ``path`` is the place, as in ``items[2].spec.priority``."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class HairpinError(Exception):
    """Base of every failure that Hairpin raises on purpose.

    ``reason`` says what failed, ``mend`` what to do next (may be empty when there is nothing to do).
    """

    exit_status = 1

    def __init__(self, reason: str, mend: str = "") -> None:
        super().__init__(reason if not mend else f"{reason}; {mend}")
        self.reason = reason
        self.mend = mend


class WrongInput(HairpinError):
    """What a person or client gave is wrong; nothing was changed. All faults at once in ``faults``."""

    exit_status = 2

    def __init__(self, faults: Sequence[FieldError], mend: str = "") -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(str(fault) for fault in self.faults), mend)


class CommandFailed(HairpinError):
    """A program that Hairpin ran exited with a failure or took too long."""

    def __init__(self, command: str, status: int | None, output: str, mend: str = "") -> None:
        self.command = command
        self.status = status
        self.output = output
        how = "timed out" if status is None else f"exited with {status}"
        super().__init__(f"`{command}` {how}: {output.strip()[-2000:]}", mend)


class SwitchError(HairpinError):
    """The switch could not be reached, refused a change, or read back other than it was told."""


class Conflict(HairpinError):
    """The change was made against an older revision than the present one."""
