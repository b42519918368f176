"""Shuns what the engine blocks, where a policy says so: from the stored alerts, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from appliance.alerts.ingest import Ingest
from appliance.alerts.model import Alert, Verdict
from appliance.alerts.query import find_alerts_after, find_latest_alert_id
from appliance.alerts.store import Store, StoreError
from appliance.api.control import NotFound
from appliance.api.shuns import ShunList, ShunnedFlow, ShunReport
from steering.errors import SwitchError
from steering.model import Inspect, PolicySet, Protocol
from steering.pipeline import build_policy_number
from steering.reconcile import Reconciler
from steering.shun import MAX_FLOWS, Blocked, ShunFlow, Shunned, build_shun

log = structlog.get_logger("shun")

BATCH_ALERTS = 500
RETRY_SECONDS = 1.0


def read_blocked(alert: Alert) -> Blocked | None:
    """What is to be shunned of an alert; None where it was not blocked, or not all of it is sure."""
    source, destination = alert.source, alert.destination
    if (
        alert.verdict is not Verdict.BLOCKED
        or alert.policy is None
        or alert.family is None
        or alert.protocol.lower() not in (Protocol.TCP.value, Protocol.UDP.value)
        or source.vm_id is None
        or destination.vm_id is None
        or source.address is None
        or destination.address is None
        or source.port is None
        or destination.port is None
    ):
        return None
    return Blocked(
        family=alert.family,
        protocol=Protocol(alert.protocol.lower()),
        source_vm_id=source.vm_id,
        source_address=source.address,
        source_port=source.port,
        destination_vm_id=destination.vm_id,
        destination_address=destination.address,
        destination_port=destination.port,
        policy=alert.policy,
    )


def build_shunned(one: Shunned, policies: PolicySet) -> ShunnedFlow:
    names = {build_policy_number(policy.name): policy.name for policy in policies.policies}
    return ShunnedFlow(
        id=one.id,
        flow=one.match,
        policy=names.get(one.policy_number),
        seconds_left=max(one.left, 0.0),
        dropped_packets=one.packets,
        dropped_bytes=one.bytes,
    )


class ShunWork:
    """Alerts of before the start are not looked at: their flows are long over."""

    def __init__(
        self,
        store: Store,
        ingest: Ingest,
        reconciler: Reconciler,
        read_policies: Callable[[], PolicySet],
    ) -> None:
        self._store = store
        self._ingest = ingest
        self._reconciler = reconciler
        self._read_policies = read_policies
        self._refused = 0

    async def run(self) -> None:
        """Until cancelled."""
        after = await find_latest_alert_id(self._store)
        while True:
            await self._ingest.wait_newer(after)
            try:
                alerts, after = await find_alerts_after(self._store, after, limit=BATCH_ALERTS)
                await self._shun(alerts)
            except (SwitchError, StoreError) as fault:
                # Not shunned is blocked by the engine still.
                log.warning("not shunned", reason=fault.reason)
                await asyncio.sleep(RETRY_SECONDS)

    async def _shun(self, alerts: Sequence[Alert]) -> None:
        policies = self._read_policies()
        if not any(
            isinstance(policy.action, Inspect) and policy.action.shun_seconds is not None
            for policy in policies.policies
        ):
            return
        machines = self._reconciler.machines()
        found: dict[str, ShunFlow] = {}
        for alert in alerts:
            blocked = read_blocked(alert)
            if blocked is not None:
                found |= {one.match: one for one in build_shun(blocked, policies, machines)}
        if not found:
            return
        room = MAX_FLOWS - len(await self._reconciler.read_shuns())
        taken = list(found.values())[: max(room, 0)]
        if len(taken) < len(found):
            self._refused += len(found) - len(taken)
            log.warning("too many flows to shun", refused=len(found) - len(taken), limit=MAX_FLOWS)
        await self._reconciler.add_shuns(taken)
        log.info("shunned", flows=len(taken))

    async def find(self) -> ShunList:
        policies = self._read_policies()
        found = await self._reconciler.read_shuns()
        items = tuple(build_shunned(one, policies) for one in found)
        return ShunList(items=items, limit=MAX_FLOWS, refused=self._refused)

    async def remove(self, shun_id: str | None) -> ShunReport:
        """``shun_id`` None: all. Raises NotFound, SwitchError."""
        found = await self._reconciler.read_shuns()
        chosen = [one for one in found if shun_id in (None, one.id)]
        if shun_id is not None and not chosen:
            raise NotFound(
                f"no flow {shun_id} is shunned", "`hairpin shun list` shows those that are"
            )
        await self._reconciler.remove_shuns(chosen)
        return ShunReport(removed=len(chosen))
