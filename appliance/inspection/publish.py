"""What `hairpin inspect` tells the other processes: `inspection.json`, replaced atomically."""

from __future__ import annotations

import contextlib
import os
import secrets
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

READ_LIMIT = 2**20
"""An `inspection.json` longer than this (bytes) is not ours."""


class EngineState(StrEnum):
    """`starting`: no answer yet; `no-rules`: nothing to inspect by, so not started; `hung`: being
    replaced; `failed`: waiting to be tried again; the lane is closed in all but `running`."""

    STARTING = "starting"
    RUNNING = "running"
    NO_RULES = "no-rules"
    HUNG = "hung"
    FAILED = "failed"
    STOPPED = "stopped"


class _Value(BaseModel):
    # Read by processes of another version during an upgrade: what is not known is left out.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Placement(_Value):
    """How an engine's packet threads are placed, as seen: how many, each one's cores, how urgent.

    ``reason``: why they have no cores of their own.
    """

    threads: int = 0
    cores: tuple[tuple[int, ...], ...] = ()
    nice: int | None = None
    pinned: bool = False
    reason: str = "nothing is known of the engine yet"


class SuperPacketState(StrEnum):
    """`on`: packets above 1,500 bytes were seen by the engine; `ready`: it takes them, none came yet;
    `off`: it does not, for a reason that is told."""

    ON = "on"
    READY = "ready"
    OFF = "off"


class SuperPackets(_Value):
    """Whether an engine gets super-packets, as seen, not as configured. ``largest``: bytes, from IP on."""

    state: SuperPacketState = SuperPacketState.OFF
    reason: str = "nothing is known of the engine yet"
    largest: int = 0


class ShortcutState(StrEnum):
    """`on`: the engine let connections go; `ready`: it may, none went yet; `off`: none goes, for a reason."""

    ON = "on"
    READY = "ready"
    OFF = "off"


class Shortcut(_Value):
    """Whether an engine lets connections go, and how many (those of the engine that runs).

    ``present``: known to its library now; ``returned``: seen by the engine again after a gap; ``renewed``: a new
    connection on the ports of one that went. Not let go were ``refused_full`` (no room in the table)
    and ``refused_mixed`` (one verdict for packets of which not all may go). ``too_long``: packets of
    returned connections that the engine saw as they are, being too long to be wrapped.
    """

    state: ShortcutState = ShortcutState.OFF
    reason: str = "nothing is known of the engine yet"
    present: int = 0
    entered: int = 0
    returned: int = 0
    renewed: int = 0
    refused_full: int = 0
    refused_mixed: int = 0
    too_long: int = 0


class Fault(_Value):
    """Something wrong: what, what to do next, since when (epoch). `mended`: when it was over."""

    reason: str
    mend: str = ""
    since: float
    mended: float | None = None


class QueueState(_Value):
    """One NFQUEUE; see `netfilter.QueueCounters`."""

    number: int
    waiting: int
    dropped: int
    user_dropped: int
    packets: int
    listener: int = 0


class EngineCounters(_Value):
    """What one engine says it did, since `started`; asked for at `at` (both epoch), true some seconds ago.

    `packets` were taken from the queue; each is one of `accepted`, `replaced` (both go on), `blocked` and
    `rejected` (both end here). `drop_reasons`: the blocked ones by the engine's own words, where not 0.
    `largest_packet` is in bytes, from the IP header on.
    """

    pid: int
    started: float
    at: float
    packets: int = 0
    accepted: int = 0
    blocked: int = 0
    rejected: int = 0
    replaced: int = 0
    invalid: int = 0
    queue_errors: int = 0
    largest_packet: int = 0
    drop_reasons: dict[str, int] = {}


class LaneCounters(_Value):
    """Frames of a lane as its queue rules counted them, from `frames_since` to `frames_at` (epoch).

    In: let go on to the queue; out: left by a leg after the engine's verdict; tagged ones are steered
    packets, the others are the switch's BFD. Refused and unmarked: dropped by a rule. See `counting`.
    `frames_queues` are the lane's queues as they were then; all was read within `frames_took` seconds.
    """

    frames_at: float | None = None
    frames_since: float | None = None
    frames_in_tagged: int = 0
    frames_in_untagged: int = 0
    frames_out_tagged: int = 0
    frames_out_untagged: int = 0
    frames_refused: int = 0
    frames_unmarked: int = 0
    frames_took: float = 0.0
    frames_queues: tuple[QueueState, ...] = ()
    engine: EngineCounters | None = None


class LaneState(_Value):
    """One lane's engine. `started` is in seconds since the epoch; `restarts` counts those that
    this supervisor made after an exit or a hang."""

    number: int
    name: str
    state: EngineState
    pid: int | None = None
    started: float | None = None
    adopted: bool = False
    restarts: int = 0
    version: str = ""
    hyperscan: bool = False
    placement: Placement = Placement()
    super_packets: SuperPackets = SuperPackets()
    shortcut: Shortcut = Shortcut()
    rules_loaded: int = 0
    rules_failed: int = 0
    queues: tuple[QueueState, ...] = ()
    counters: LaneCounters = LaneCounters()
    faults: tuple[Fault, ...] = ()

    @property
    def inspecting(self) -> bool:
        return self.state is EngineState.RUNNING


class InspectionState(_Value):
    """Everything `hairpin inspect` knows. `faults` concern all lanes; `updated` is the epoch of
    writing: a state that is older than a few seconds tells that nobody supervises."""

    updated: float
    pid: int
    dialect: str = ""
    lanes: tuple[LaneState, ...] = ()
    faults: tuple[Fault, ...] = ()


def parse_inspection_state(text: str) -> InspectionState | None:
    try:
        return InspectionState.model_validate_json(text)
    except ValidationError:
        return None


def read_inspection_state(path: Path) -> InspectionState | None:
    """The last published state; None while there is none or it can't be understood."""
    try:
        with path.open("rb") as stream:
            content = stream.read(READ_LIMIT + 1)
    except OSError:
        return None
    if len(content) > READ_LIMIT:
        return None
    return parse_inspection_state(content.decode(errors="replace"))


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file in one step; a reader sees the old or the new one. Raises OSError.

    The temporary name is fresh and links are not followed, so the directory may be another user's.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(scratch, flags, mode)
    try:
        with os.fdopen(descriptor, "w") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(text)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise


def write_inspection_state(path: Path, state: InspectionState) -> None:
    write_atomically(path, state.model_dump_json(indent=1) + "\n")
