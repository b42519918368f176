"""What the API asks of the rest of the appliance. `appliance.app` implements it; nothing else does.

Handlers do no I/O of their own: each calls one method of `Control` and sends what it returns.
Failures are raised, and become problem documents:

- `WrongInput`: 422 when the request had a body, else 400, with all faults;
- `NotFound`: 404;
- `Conflict`: 412 (the revision named by If-Match is not in force);
- `SwitchError`, `Unavailable`: 503 (try again later);
- any other `HairpinError`: 500 with its reason and mend; any other exception: 500 without a word
  about it to the client.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from appliance.api.coverage import CanaryPage, Coverage, CoverageHistory, LaneProofs
from appliance.api.documents import (
    Alert,
    AlertDetail,
    AlertPage,
    EventPage,
    Explanation,
    FlowPage,
    Health,
    HealthSummary,
    PlanReport,
    PolicyDocuments,
    RulePage,
    RulesStatus,
    SignatureCounts,
    UpdateJob,
    VmEdit,
    VmList,
)
from appliance.api.quarantine import QuarantineList, QuarantineOrder, QuarantineReport
from appliance.api.queries import (
    AlertFilter,
    AlertQuery,
    CanaryQuery,
    CoverageQuery,
    EventQuery,
    ExplainQuery,
    FlowQuery,
    HistoryQuery,
    RuleQuery,
    ShortcutFilter,
    ShortcutQuery,
    SignatureQuery,
)
from appliance.api.shortcuts import ShortcutList, ShortcutReport
from appliance.api.shuns import ShunList, ShunReport
from steering.errors import Conflict, HairpinError

IfMatch = frozenset[str]
"""Entity tags of a request's If-Match, without quotes; `ANY` for `If-Match: *`."""

ANY: IfMatch = frozenset({"*"})


class NotFound(HairpinError):
    """There is nothing of that name or id."""


class Unavailable(HairpinError):
    """It can't be done now and may be later."""


@dataclass(frozen=True, slots=True)
class PolicyRevision:
    """The documents in force. ``etag`` has no quotes and matches `[A-Za-z0-9._-]+`."""

    documents: PolicyDocuments
    revision: int
    etag: str


@dataclass(frozen=True, slots=True)
class AlertBatch:
    """Alerts in the order of their ids. ``last`` is the highest id that was looked at, so that a
    filter that lets nothing pass still moves forward."""

    alerts: tuple[Alert, ...]
    last: int


def check_match(if_match: Collection[str], etag: str) -> None:
    """Raise Conflict unless ``if_match`` names ``etag``, the revision in force."""
    if if_match != ANY and etag not in if_match:
        raise Conflict(
            f"the policies were changed meanwhile: in force is {etag}",
            "read them again, make the change on what is in force now, and send that",
        )


class Control(Protocol):
    """Each method may be called by several requests at once, on the server's event loop.

    VMs are named (`VmRef`) by name or vm-id. Pages obey `limit`; a cursor is made and read by the
    implementation alone and is refused with WrongInput when it is none of its own; it holds only
    `[A-Za-z0-9_.~=-]`, at most 512 characters.
    """

    async def read_health(self) -> Health: ...

    async def read_status(self) -> HealthSummary:
        """Health in a word, at most a second old: who asks need not have a token."""
        ...

    async def find_vms(self) -> VmList:
        """Every VM on the switch, and those only the documents name (without ports)."""
        ...

    async def edit_vm(
        self, vm_id: str, edit: VmEdit, if_match: IfMatch, *, dry_run: bool
    ) -> PlanReport:
        """Set what the documents say of the VM (adding its document if none did), as a revision.

        Raises NotFound when neither the switch nor a document knows the vm-id.
        """
        ...

    async def find_quarantines(self) -> QuarantineList: ...

    async def add_quarantine(self, order: QuarantineOrder) -> QuarantineReport:
        """Raises NotFound when neither the switch nor a document knows the VM."""
        ...

    async def remove_quarantine(self, vm: str) -> QuarantineReport:
        """``vm``: name or vm-id. Raises NotFound when it is not in quarantine."""
        ...

    async def find_shuns(self) -> ShunList: ...

    async def remove_shuns(self, shun_id: str | None) -> ShunReport:
        """One, or (None) all. Raises NotFound."""
        ...

    async def find_shortcuts(self, query: ShortcutQuery) -> ShortcutList: ...

    async def return_shortcuts(self, wanted: ShortcutFilter) -> ShortcutReport:
        """All that the filter names. Raises NotFound for a policy or VM that there is not."""
        ...

    async def return_shortcut(self, shortcut_id: str) -> ShortcutReport:
        """Raises NotFound."""
        ...

    async def read_policies(self) -> PolicyRevision: ...

    async def put_policies(self, text: str, if_match: IfMatch, *, dry_run: bool) -> PlanReport:
        """Replace all documents by those in ``text`` (YAML or JSON, not yet checked).

        Checks ``if_match`` first (`check_match`), also on a dry run. A dry run changes nothing.
        """
        ...

    async def read_coverage(self, query: CoverageQuery) -> Coverage: ...

    async def read_coverage_history(self, query: HistoryQuery) -> CoverageHistory: ...

    async def find_canaries(self, query: CanaryQuery) -> CanaryPage: ...

    async def prove_lanes(self) -> LaneProofs:
        """Send a canary through every lane and wait for what becomes of it, some seconds at most.

        Raises Unavailable when no canary port is configured.
        """
        ...

    async def render_metrics(self) -> bytes:
        """The metrics page in Prometheus' text format."""
        ...

    async def explain(self, query: ExplainQuery) -> Explanation:
        """Raises NotFound when either VM is unknown, WrongInput for a port without a protocol."""
        ...

    async def read_rules(self) -> RulesStatus: ...

    async def find_rules(self, query: RuleQuery) -> RulePage: ...

    async def start_rules_update(self) -> UpdateJob:
        """Start fetching, testing and loading the rules, unless that is running already."""
        ...

    async def read_rules_update(self) -> UpdateJob: ...

    async def find_alerts(self, query: AlertQuery) -> AlertPage: ...

    async def find_alert(self, alert_id: int) -> AlertDetail:
        """Raises NotFound."""
        ...

    async def count_signatures(self, query: SignatureQuery) -> SignatureCounts: ...

    async def read_alerts_after(
        self, after: int | None, wanted: AlertFilter, limit: int
    ) -> AlertBatch:
        """At most ``limit`` alerts with ids above ``after``, oldest first; for the live stream.

        With None: no alerts, and ``last`` is the newest id there is (0 when there is none).
        """
        ...

    async def wait_for_alerts(self, after: int) -> None:
        """Return once an alert with an id above ``after`` is stored. May be cancelled."""
        ...

    async def find_flows(self, query: FlowQuery) -> FlowPage: ...

    async def find_events(self, query: EventQuery) -> EventPage: ...
