"""The policies in force, and how others come in force: read, put on the switch, noted in the store.

The store records the revision while the switch is told. From then on it is in force, whether or not the store
can note that at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import structlog

from appliance.alerts.history import (
    find_rows,
    load_revision,
    record_applied,
    record_event,
    record_revision,
)
from appliance.alerts.store import Store, StoreError
from appliance.api import documents as doc
from appliance.api.control import IfMatch, NotFound, PolicyRevision, check_match
from appliance.assurance.connections import TakenConnection
from appliance.management import render
from appliance.management.health import Facts, is_inspecting
from appliance.management.quarantine import QuarantineWork
from appliance.management.shortcut import ShortcutWork
from steering.coverage import build_coverage
from steering.last import Last
from steering.model import MachineRecord, PolicySet
from steering.parse import parse_objects, render_documents
from steering.reconcile import Reconciler
from steering.reread import DocumentReader

log = structlog.get_logger("management")

NOTE_SECONDS = 5.0
"""For which a change waits for the store to note that it is in force."""


@dataclass(frozen=True)
class InForce:
    """The policies in force. ``number`` 0: none were ever applied."""

    number: int
    policies: PolicySet

    @cached_property
    def etag(self) -> str:
        text = json.dumps(render_documents(self.policies), sort_keys=True)
        return f"r{self.number}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


async def load_in_force(store: Store) -> InForce:
    """The newest revision that was applied."""

    def load(db: Any) -> InForce:
        rows = find_rows(
            db, "SELECT max(number) AS number FROM revisions WHERE applied_at IS NOT NULL", ()
        )
        number = rows[0]["number"] if rows else None
        revision = load_revision(db, number) if number is not None else None
        if revision is None:
            return InForce(0, PolicySet())
        return InForce(revision.number, parse_objects(revision.documents))

    return await store.read(load)


class PolicyWork:
    """``on_change`` is called with the cause when other policies are on the switch; ``build_facts`` gives what
    warnings are judged by. One change at a time; a dry run waits for its turn too.
    """

    def __init__(
        self,
        store: Store,
        reconciler: Reconciler,
        in_force: InForce,
        quarantine: QuarantineWork,
        shortcut: ShortcutWork,
        on_change: Callable[[str], None],
        build_facts: Callable[[], Facts],
    ) -> None:
        self._store = store
        self._reconciler = reconciler
        self._in_force = in_force
        self._quarantine = quarantine
        self._shortcut = shortcut
        self._on_change = on_change
        self._build_facts = build_facts
        self._change = asyncio.Lock()
        self._documents = DocumentReader()
        # What a change led to is what the next one leads away from.
        self._cover = Last(build_coverage)
        self._notings: set[asyncio.Task[None]] = set()

    @property
    def in_force(self) -> InForce:
        return self._in_force

    def take_quarantine(self) -> None:
        """Other VMs are in quarantine, by the same revision."""
        policies = replace(self._in_force.policies, quarantined=self._quarantine.vm_ids)
        self._in_force = InForce(self._in_force.number, policies)

    def read(self) -> PolicyRevision:
        """The documents in force."""
        documents = doc.PolicyDocuments.model_validate(render_documents(self._in_force.policies))
        return PolicyRevision(documents, self._in_force.number, self._in_force.etag)

    async def edit_vm(
        self, vm_id: str, edit: doc.VmEdit, if_match: IfMatch, *, dry_run: bool
    ) -> doc.PlanReport:
        """Set what the documents say of a VM, as a revision. Raises NotFound, and what `put` does."""
        policies = self._in_force.policies
        records = {record.vm_id: record for record in policies.machines}
        found = {machine.vm_id: machine for machine in self._reconciler.machines()}
        if vm_id not in records and vm_id not in found:
            raise NotFound(f"no VM {vm_id}", "`hairpin vms` lists those that are known")
        record = records.get(vm_id) or MachineRecord(vm_id, found[vm_id].name)
        edited = replace(
            record,
            name=record.name if edit.name is None else edit.name,
            tags=record.tags if edit.tags is None else dict(edit.tags),
        )
        machines = tuple({**records, vm_id: edited}.values())
        document = render_documents(replace(policies, machines=machines))
        return await self.put(json.dumps(document), if_match, dry_run=dry_run)

    async def put(self, text: str, if_match: IfMatch, *, dry_run: bool) -> doc.PlanReport:
        """``text``: all documents, YAML or JSON. Raises Conflict, WrongInput, SwitchError and StoreError; then
        what was in force before still is.
        """
        began = time.monotonic()
        with contextlib.ExitStack() as rush:
            if not dry_run:
                rush.enter_context(self._reconciler.rush.claim())
            async with self._change:
                return await self._put(text, if_match, began, rush, dry_run=dry_run)

    async def _put(
        self,
        text: str,
        if_match: IfMatch,
        began: float,
        rush: contextlib.ExitStack,
        *,
        dry_run: bool,
    ) -> doc.PlanReport:
        check_match(if_match, self._in_force.etag)
        policies = self._documents.read_soon(text)
        if policies is None:
            policies = await asyncio.to_thread(self._documents.read, text)
        policies = replace(policies, quarantined=self._quarantine.vm_ids)
        before = self._in_force.policies
        now_in_force = self._in_force
        if dry_run:
            bundle = (await self._reconciler.plan(policies)).bundle
        else:
            number = 0

            async def record() -> None:
                nonlocal number
                rush.close()  # from here on the reconciler has its own claim
                at = time.time()
                number = await self._store.write(
                    lambda db: record_revision(db, at, "api", render_documents(policies))
                )

            applied = await self._reconciler.apply(policies, record)
            bundle, done = applied.bundle, time.time()
            report = {"seconds": applied.seconds, "changes": len(bundle.changes)}
            self._in_force = now_in_force = InForce(number, policies)
            self._on_change("policies applied")
            text = (
                f"revision {number} is on the switch: {len(bundle.changes)} changes in "
                f"{applied.seconds:.3f} s"
            )
            noting = asyncio.create_task(
                self._note_applied(number, done, report, text, self._shortcut.note_policies(before))
            )
            self._notings = {noting, *(one for one in self._notings if not one.done())}
            # What is on the switch is in force, whatever the store says.
            await asyncio.wait({noting}, timeout=NOTE_SECONDS)
        pairs = await asyncio.to_thread(
            lambda: render.build_pair_changes(
                self._cover(before, self._reconciler.machines(before)),
                self._cover(policies, self._reconciler.machines(policies)),
            )
        )
        return doc.PlanReport(
            revision=now_in_force.number,
            etag=now_in_force.etag,
            applied=not dry_run,
            seconds=time.monotonic() - began,
            summary=render.build_plan_summary(bundle),
            changes=render.build_changes(bundle),
            pairs=pairs,
            warnings=self._build_warnings(policies, len(bundle.changes)),
        )

    async def _note_applied(
        self,
        number: int,
        at: float,
        report: dict[str, Any],
        text: str,
        returned: Sequence[TakenConnection],
    ) -> None:
        """Until the store takes it: after a restart the revision before would be in force else."""
        while True:
            try:
                await self._store.write_lasting(lambda db: record_applied(db, number, at, report))
                break
            except StoreError as fault:
                log.error("revision not noted as applied", revision=number, reason=fault.reason)
                await asyncio.sleep(1.0)
        try:
            await self._record("policy.applied", "info", text)
        except StoreError as fault:
            log.error("event not stored", text=text, reason=fault.reason)
        await self._shortcut.tell_policies(returned)

    def _build_warnings(self, policies: PolicySet, changes: int) -> tuple[str, ...]:
        warnings = []
        if any(not one.done() for one in self._notings):
            warnings.append(
                "in force, but the store does not take it yet (`hairpin doctor`): after a restart "
                "before it does, the revision before would be in force"
            )
        if changes > render.CHANGES_LIMIT:
            warnings.append(
                f"only the first {render.CHANGES_LIMIT} of {changes} changes are listed"
            )
        facts = replace(self._build_facts(), policies=policies)
        warnings += [
            f"lane {lane.name} does not inspect right now: its policies fail as onFailure says"
            for lane in facts.lanes
            if not is_inspecting(facts, lane)
        ]
        return (*warnings, *self._reconciler.status.problems)

    async def _record(self, kind: str, severity: str, message: str) -> None:
        at = time.time()
        await self._store.write(lambda db: record_event(db, at, kind, severity, message))
