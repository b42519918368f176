"""What is wrong with a first boot, as a value, and the file that tells it to the other processes.

No fault ever shows a secret: reasons name what was expected, never what stood there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from steering.errors import FieldError, HairpinError, WrongInput

FAULTS_LIMIT = 200
FILE_LIMIT = 2**20
TEXT_LIMIT = 500
_KEY = re.compile(r"[A-Za-z_(][A-Za-z0-9_()\[\]-]{0,30}")


@dataclass(frozen=True, slots=True)
class Fault:
    """``path`` is the place in the seed, as in ``lanes[0].legA.mac``, or what else it is about."""

    path: str
    reason: str
    mend: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class SeedRefused(WrongInput):
    """The seed is missing or wrong; nothing of it is in force. All faults at once in ``told``."""

    def __init__(self, told: tuple[Fault, ...]) -> None:
        self.told = told
        super().__init__(
            [FieldError(fault.path, f"{fault.reason}; to mend: {fault.mend}") for fault in told]
        )


@dataclass(frozen=True, slots=True)
class FaultReport:
    """`faults.json`. ``at`` in seconds since the epoch; ``reachable``: the management network is configured,
    so that the faults may be asked for by ``port``."""

    name: str
    version: str
    at: float
    reachable: bool
    port: int
    faults: tuple[Fault, ...]


def show_key(key: str) -> str:
    """A key of the input as a path shows it. What is no short word stays out: where a colon was forgotten, a
    key and its value are one."""
    return key if _KEY.fullmatch(key) else "(a key)"


_REPORT = TypeAdapter(FaultReport)


def render_report(report: FaultReport) -> str:
    """With at most FAULTS_LIMIT faults; the rest is counted."""
    kept, more = report.faults[:FAULTS_LIMIT], len(report.faults) - FAULTS_LIMIT
    if more > 0:
        kept = (
            *kept,
            Fault("(seed)", f"and {more} more faults", "mend those that are listed first"),
        )
    kept = tuple(Fault(*(_cut(one) for one in (f.path, f.reason, f.mend))) for f in kept)
    cut = FaultReport(report.name, report.version, report.at, report.reachable, report.port, kept)
    return _REPORT.dump_json(cut, indent=1).decode() + "\n"


def _cut(text: str) -> str:
    """Whole and printable in any encoding: what is told must be readable, whatever the seed was."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}..."


def read_report(path: Path) -> FaultReport | None:
    """None where there is no such file: nothing is wrong, or nobody has looked yet. Raises HairpinError."""
    try:
        with open(path, "rb") as opened:
            return _REPORT.validate_json(opened.read(FILE_LIMIT))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as fault:
        raise HairpinError(
            f"{path} can't be read: {fault}", "see the journal of hairpin-firstboot"
        ) from fault


def build_unfinished(version: str, now: float, port: int) -> FaultReport:
    """The first boot ended without a word: neither settings nor faults were left."""
    fault = Fault(
        "(first boot)",
        "it did not end: there are neither settings nor faults",
        "see `journalctl -u hairpin-firstboot`, and restart the appliance",
    )
    return FaultReport("hairpin", version, now, False, port, (fault,))
