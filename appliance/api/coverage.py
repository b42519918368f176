"""Documents of the coverage: which pairs are inspected, and the proof that they really are.

Three proofs stand beside each other. A *canary* shows that one packet took a lane's whole way and was
dropped by its rule; the *balance* that all packets into a lane are accounted for; the *ledger*, by
traces of the live tables, that every class of packets takes the way that the policies say.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from appliance.api.documents import (
    ApiDocument,
    Count,
    PairStatus,
    Percent,
    Treatment,
    VmName,
)
from appliance.api.shortcuts import ShortcutAccount
from steering.model import OnFailure, Profile, Trigger


class CoveragePart(ApiDocument):
    """One part of what may pass between two VMs and what is done with it."""

    what: str = Field(description="As in `tcp/80,443 ipv4`, `any`.")
    treatment: Treatment
    policy: str | None = None
    profile: Profile | None = None
    on_failure: OnFailure | None = None
    inspected_until: Trigger | None = Field(
        default=None,
        description="After that a TCP connection may take a shortcut, uninspected; null: never.",
    )


class PairCoverage(ApiDocument):
    source: VmName
    destination: VmName
    status: PairStatus
    parts: tuple[CoveragePart, ...] = ()
    reason: str = Field(default="", description="Why it is not inspected, or not all of it.")


class CoverageSummary(ApiDocument):
    """Over all ordered pairs of VMs, whatever the filter."""

    machines: Count
    pairs: Count
    inspected: Count = 0
    partial: Count = 0
    direct: Count = 0
    denied: Count = 0
    blind: Count = 0
    inspected_percent: Percent = 0.0
    partial_percent: Percent = 0.0
    direct_percent: Percent = 0.0
    denied_percent: Percent = 0.0
    blind_percent: Percent = 0.0


class CoverageGap(ApiDocument):
    """Something that keeps traffic from being inspected and is not the choice of a policy."""

    reason: str
    mend: str = ""
    vms: tuple[VmName, ...] = ()


class CanaryProof(ApiDocument):
    """The last canary of a lane. ``passed`` is null before the first."""

    at: datetime | None = None
    cause: str = Field(default="", description="What it was sent for, as in `schedule`.")
    passed: bool | None = None
    stage: str = Field(default="", description="Where it was lost, as in `queue rule`.")
    detail: str = ""
    passed_at: datetime | None = None
    failed_since: datetime | None = None
    arrival_seconds: float | None = Field(
        default=None, description="From sending to its alerts in the store."
    )
    probes: Count = 0
    failures: Count = 0


class Balance(ApiDocument):
    """Packets into a lane, and what became of them, since ``since``."""

    since: datetime
    until: datetime
    into: Count
    inspected: Count = Field(description="Inspected and delivered.")
    dropped: Count = Field(description="Dropped by the engine.")
    lost: Count = Field(description="Lost in the queue.")
    refused: Count = Field(description="Dropped in the service host: no listener, or no such rule.")
    lost_with_engine: Count = Field(description="Taken by an engine that then ended.")
    vanished: Count = Field(
        default=0,
        description="Lost by a fault that is over: told as `balance.open` while it lasted.",
    )
    bypassed: Count = Field(description="Let through uninspected by a failure policy (`open`).")
    blocked: Count = Field(description="Not let in by a failure policy (`closed`).")
    unexplained: int
    closes: bool
    unclosed_since: datetime | None = None
    reason: str = ""


class LaneProof(ApiDocument):
    lane: str
    inspecting: bool
    canary: CanaryProof | None = None
    balance: Balance | None = None


class LaneProofs(ApiDocument):
    """Every lane after it was proved just now."""

    lanes: tuple[LaneProof, ...] = ()


class Violation(ApiDocument):
    """A packet that does not take the way that the policies say. ``flow`` can be traced by hand."""

    source: str
    destination: str
    family: str
    service: str
    direction: str
    state: str
    expected: str
    seen: str
    flow: str
    reason: str


class LedgerSummary(ApiDocument):
    """What the traces of one run proved; ``fault`` says why there was none."""

    at: datetime | None = None
    revision: Count = 0
    classes: Count = Field(
        default=0, description="Of pair class, family, service, direction, state."
    )
    classes_traced: Count = 0
    pairs: Count = 0
    pairs_traced: Count = 0
    traced: Count = Field(default=0, description="Packets traced.")
    by_copy: bool = Field(
        default=False,
        description="Traced in a copy of the switch's tables, not in the switch (docs/coverage.md).",
    )
    inspected: Count = 0
    direct: Count = 0
    denied: Count = 0
    bypassed: Count = Field(default=0, description="Now let through by a failure policy.")
    blocked: Count = Field(default=0, description="Now held back by a failure policy.")
    violation_count: Count = 0
    violations: tuple[Violation, ...] = ()
    findings: tuple[str, ...] = Field(default=(), description="Foreign flows before ours.")
    shortcut_policies: Count = Field(
        default=0,
        description="Policies whose connections may take a shortcut: for these it holds until then.",
    )
    shortcut_connections: Count = Field(default=0, description="That ever took one.")
    shortcut_packets: Count = Field(default=0, description="Delivered uninspected by shortcuts.")
    shortcut_bytes: Count = 0
    seconds: float = 0.0
    fault: str = ""


class PacketAccount(ApiDocument):
    """Every packet between VMs that policies name, by what became of it; since ``since``."""

    since: datetime
    inspected: Count = 0
    dropped_by_engine: Count = 0
    bypassed: Count = 0
    blocked: Count = 0
    direct: Count = 0
    denied: Count = 0
    spoofed: Count = 0
    unexplained: int = 0


class CoverageMoment(ApiDocument):
    """The coverage at one moment; one is kept after every change, and every hour."""

    at: datetime
    revision: Count
    cause: str
    pairs: Count
    inspected_percent: Percent
    partial_percent: Percent
    direct_percent: Percent
    denied_percent: Percent
    blind_percent: Percent
    lanes_proved: Count = Field(description="Lanes whose last canary passed.")
    lanes: Count
    traced: Count = 0
    violations: Count = 0
    shortcut_packets: Count = Field(
        default=0, description="Delivered uninspected by shortcuts until then."
    )


class CoverageHistory(ApiDocument):
    """Newest first."""

    items: tuple[CoverageMoment, ...] = ()
    next: str | None = None


class Canary(ApiDocument):
    """One canary of one lane."""

    id: int
    at: datetime
    lane: str
    cause: str
    result: Literal["passed", "failed", "open"]
    stage: str = ""
    detail: str = ""
    seconds: float | None = Field(default=None, description="Until the last alert was stored.")


class CanaryPage(ApiDocument):
    """Newest first."""

    items: tuple[Canary, ...] = ()
    next: str | None = None


class Coverage(ApiDocument):
    """The summary, the gaps, the proof, and one page of the pairs that the filter names."""

    summary: CoverageSummary
    gaps: tuple[CoverageGap, ...] = ()
    lanes: tuple[LaneProof, ...] = ()
    ledger: LedgerSummary | None = None
    shortcuts: tuple[ShortcutAccount, ...] = Field(
        default=(), description="What went uninspected since its connections took shortcuts."
    )
    items: tuple[PairCoverage, ...] = ()
    next: str | None = Field(default=None, description="Cursor of the next page, null on the last.")
