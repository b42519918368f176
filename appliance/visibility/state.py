"""What the observer says of itself, and how much it missed by the switch's count."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steering.errors import FieldError, WrongInput

STATE_LIMIT = 65536
# Five times the interval at which the state is published.
FRESH_SECONDS = 10.0

Counter = Annotated[int, Field(ge=0)]


class Isolation(BaseModel):
    """How the observer is kept apart. ``reasons`` says why it is not kept apart better."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: str
    capabilities: tuple[str, ...]
    group: Annotated[str, Field(description="`cgroup2 PATH`, `cgroup1 PATH` or `process group`")]
    reasons: tuple[str, ...] = ()


class Totals(BaseModel):
    """Packets since the observer started; heartbeats are in none of them.

    ``port`` is what the mirror port delivered to this host by the kernel's count. Of these,
    ``recorded`` are in flow records, ``in_flight`` in flows that have not expired, ``unmetered``
    belong to no flow (ARP and other non-IP, later fragments), ``dropped`` found the capture
    buffer full, ``lost`` were in flight when a worker died or found no memory. In packets all;
    ``flows`` are records in the spool, ``unwritten`` those that could not be written there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    port: Counter = 0
    recorded: Counter = 0
    in_flight: Counter = 0
    unmetered: Counter = 0
    dropped: Counter = 0
    lost: Counter = 0
    flows: Counter = 0
    unwritten: Counter = 0

    @property
    def seen(self) -> int:
        """Packets that are told of, or will be."""
        return self.recorded + self.in_flight + self.unmetered


class ObserverState(BaseModel):
    """The contents of ``run_dir/observe/state.json``. Times are seconds since the epoch.

    ``heartbeat_age`` is how long ago nfstream last counted a packet, ``record_lag`` how long the
    newest heartbeat needed from the port to its record (at least the idle timeout). Both in
    seconds, None before the first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pid: int
    device: str
    started: float
    updated: float
    alive: bool
    heartbeat_age: float | None = None
    record_lag: float | None = None
    restarts: Counter = 0
    last_restart: str = ""
    totals: Totals = Totals()
    isolation: Isolation


def is_fresh(state: ObserverState, now: float) -> bool:
    """Whether the observer lives: it said so lately. One that was killed says nothing more."""
    return state.alive and now - state.updated < FRESH_SECONDS


@dataclass(frozen=True, slots=True)
class Sample:
    """Both counts at about one moment: the observer's, and the packets that the switch says it
    sent to the mirror port (``Interface.statistics:tx_packets`` or ``Mirror.statistics``)."""

    started: float
    at: float
    totals: Totals
    switch_packets: int


@dataclass(frozen=True, slots=True)
class MissReport:
    """How much of what the switch mirrored is not told of in flow records.

    ``seconds`` is the length of the window; ``missed_ratio`` is 0 to 1. ``note`` says what the
    figures can't tell.
    """

    seconds: float
    seen_packets: int
    switch_packets: int
    missed_packets: int
    missed_ratio: float
    note: str


def build_sample(state: ObserverState, switch_packets: int) -> Sample:
    return Sample(state.started, state.updated, state.totals, switch_packets)


def compare(first: Sample, last: Sample) -> MissReport:
    """What was missed between two samples of the same observer.

    Meaningful for windows much longer than the samples' skew: the observer publishes every 2 s,
    Open vSwitch its statistics every 5 s (``other_config:stats-update-interval``). Raises
    WrongInput when the observer or the switch restarted between the samples.
    """
    if first.started != last.started:
        raise WrongInput([FieldError("last.started", "the observer restarted: take a new first")])
    if last.switch_packets < first.switch_packets:
        raise WrongInput([FieldError("last.switch_packets", "the switch's counter went back")])
    switch = last.switch_packets - first.switch_packets
    seen = max(0, last.totals.seen - first.totals.seen)
    missed = max(0, switch - seen)
    parts = [
        f"{last.totals.in_flight} packets are in flows that have not ended yet",
        f"{max(0, switch - (last.totals.port - first.totals.port))} never reached the port",
        f"{last.totals.dropped - first.totals.dropped} found the capture buffer full",
        f"{last.totals.lost - first.totals.lost} were lost with a worker that died or had no memory",
    ]
    if seen > switch:
        parts.append("the observer's count is newer than the switch's")
    return MissReport(
        seconds=max(0.0, last.at - first.at),
        seen_packets=seen,
        switch_packets=switch,
        missed_packets=missed,
        missed_ratio=missed / switch if switch else 0.0,
        note="; ".join(parts),
    )


def parse_state(text: str) -> ObserverState:
    """Raises WrongInput."""
    try:
        return ObserverState.model_validate_json(text)
    except ValidationError as fault:
        raise WrongInput(
            [
                FieldError(".".join(map(str, error["loc"])) or "(file)", error["msg"])
                for error in fault.errors(include_input=False, include_url=False)
            ]
        ) from fault


def read_state(path: Path) -> ObserverState | None:
    """The state last published, None when there is none. Raises WrongInput when it is not one."""
    try:
        with path.open("rb") as file:
            return parse_state(file.read(STATE_LIMIT).decode(errors="replace"))
    except FileNotFoundError:
        return None


def write_state(path: Path, state: ObserverState) -> None:
    """Replace the state file atomically: a reader sees the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(state.model_dump_json() + "\n")
    beside.replace(path)
