"""What `serve` asks of `inspect` to have a lane proved, and what it is told: one JSON line each way.

The socket is `Settings.canary_socket`; who answers is `canary_service`.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steering.errors import HairpinError
from steering.model import Family

VERSION = 1
REQUEST_LIMIT = 4096
REPORT_LIMIT = 2**16
SECONDS_LIMIT = 5.0
GRACE = 3.0
"""Seconds beyond those of the probe, for waiting behind another one and for the sockets."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ProbeRequest(_Message):
    """`lane` by name, `ruleset` the token in the canary's rule in force, `probe` 32 random hex digits;
    `seconds` is how long to wait for what must come back."""

    version: Annotated[int, Field(ge=VERSION, le=VERSION)] = VERSION
    lane: Annotated[str, Field(max_length=64)]
    ruleset: Annotated[str, Field(pattern=r"^[0-9A-Za-z._-]{1,64}$")]
    probe: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    seconds: Annotated[float, Field(gt=0.0, le=SECONDS_LIMIT)] = 1.0


class PartReport(_Message):
    """How far one packet came. `entered`: it arrived at the service host by the leg of its direction,

    in VLAN `vlan` (0: without a tag). `left`: it went out by the other leg. `returned`: the switch
    brought it back to the canary's port.
    """

    family: Family
    answer: bool
    hostile: bool
    sent: bool
    entered: bool = False
    vlan: int = 0
    left: bool = False
    returned: bool = False


class ProbeReport(_Message):
    """`fault`: why nothing could be sent, empty when it was. `queued` and `queue_dropped` are by how much

    the counters of the lane's queues grew meanwhile, by all traffic.
    """

    version: int = VERSION
    lane: str
    probe: str
    fault: str = ""
    queued: int = 0
    queue_dropped: int = 0
    parts: tuple[PartReport, ...] = ()


async def probe(path: Path, lane: str, ruleset: str, probe: str, seconds: float) -> ProbeReport:
    """Have one probe of a lane made. `path` is the socket, `seconds` at most 5.

    Raises HairpinError when `inspect` is not there, does not answer in time, or talks nonsense.
    """
    try:
        request = ProbeRequest(lane=lane, ruleset=ruleset, probe=probe, seconds=seconds)
    except ValidationError as fault:
        raise HairpinError(f"no such probe can be asked for: {fault.errors()[0]['msg']}") from fault
    limit = seconds + GRACE
    try:
        async with asyncio.timeout(limit):
            line = await _exchange(path, request.model_dump_json().encode() + b"\n")
    except TimeoutError as late:
        raise HairpinError(
            f"`hairpin inspect` did not answer on {path} in {limit:g} s", "see its log"
        ) from late
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as fault:
        raise HairpinError(
            f"`hairpin inspect` can't be asked for a canary at {path}: {fault}",
            "start it; it offers canaries where canary.interface is set",
        ) from fault
    try:
        report = ProbeReport.model_validate_json(line)
    except ValidationError as fault:
        raise HairpinError(
            f"the answer on {path} can't be understood: {fault.error_count()} faults",
            "run the same version of `serve` and `inspect`",
        ) from fault
    if not report.fault and report.probe != probe:
        raise HairpinError(f"the answer on {path} is about another probe")
    return report


async def _exchange(path: Path, line: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path, limit=REPORT_LIMIT)
    try:
        writer.write(line)
        await writer.drain()
        return await reader.readuntil(b"\n")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
