"""Flow spool -> flow records in the store: VMs and policy added, bookmark in the same transaction."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog
from sqlite_utils import Database

from appliance.alerts.history import load_bookmarks, record_flows, record_repeated
from appliance.alerts.ingest import finish_file
from appliance.alerts.model import Endpoint as StoredEndpoint
from appliance.alerts.model import FlowRecord as StoredFlow
from appliance.alerts.rows import build_bookmark_row, insert_sql
from appliance.alerts.store import Store, StoreError
from appliance.alerts.tail import (
    Batch,
    Bookmark,
    find_files,
    index_bookmarks,
    is_rotated,
    read_batch,
    remove_rotated,
)
from appliance.management.knowledge import Snapshot
from appliance.management.render import find_treatment
from appliance.visibility.attribute import AttributedFlow, Endpoint, attribute_flows
from appliance.visibility.record import FlowRecord, parse_record
from steering.decide import Connection, decide
from steering.errors import WrongInput
from steering.model import Holding, Protocol

log = structlog.get_logger("flows")

SPOOL = "(flows)"  # its name among the bookmarks; no lane can have it
POLL_SECONDS = 1.0
BATCH_LINES = 500
GRACE_SECONDS = 10.0

_PROTOCOLS = {
    6: Protocol.TCP,
    17: Protocol.UDP,
    132: Protocol.SCTP,
    1: Protocol.ICMP,
    58: Protocol.ICMP,
}


def build_stored_flow(flow: AttributedFlow, snapshot: Snapshot) -> StoredFlow:
    """The row of a record: names for people, and what the policies say of its connection. Pure."""
    record = flow.record
    protocol = _PROTOCOLS.get(record.protocol_number, Protocol.ANY)
    ported = protocol in (Protocol.TCP, Protocol.UDP, Protocol.SCTP)
    treatment, policy = None, None
    if flow.src is not None and flow.dst is not None:
        connection = Connection(
            record.family,
            protocol,
            record.dst_port if ported else None,
            record.src_port if ported else None,
        )
        decision = decide(
            snapshot.policies, snapshot.machines, flow.src.vm_id, flow.dst.vm_id, connection
        )
        treatment = find_treatment(decision.action)
        policy = decision.policy.name if decision.policy else None
    return StoredFlow(
        first_seen=record.first_seen,
        last_seen=record.last_seen,
        source=_build_endpoint(flow.src, record.src_address, record.src_port if ported else None),
        destination=_build_endpoint(
            flow.dst, record.dst_address, record.dst_port if ported else None
        ),
        protocol=record.protocol,
        application=record.application,
        category=record.application_category,
        packets_sent=record.src_packets,
        bytes_sent=record.src_bytes,
        packets_received=record.dst_packets,
        bytes_received=record.dst_bytes,
        treatment=treatment,
        policy=policy,
    )


def _build_endpoint(vm: Endpoint | None, address: str, port: int | None) -> StoredEndpoint:
    if vm is None:
        return StoredEndpoint(address, port)
    return StoredEndpoint(address, port, vm.vm_id, vm.name, vm.zones)


class FlowIngest:
    """Reads the flow spool until cancelled; run it as one task: `run`."""

    def __init__(
        self,
        store: Store,
        live: Path,
        find_snapshot: Callable[[], Snapshot],
        find_holdings: Callable[[], Mapping[str, tuple[Holding, ...]]],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._live = live
        self._find_snapshot = find_snapshot
        self._find_holdings = find_holdings
        self._clock = clock
        self._bookmarks: dict[tuple[int, int], Bookmark] = {}
        self._next_generation = 1
        self._finished: set[int] = set()
        self.fault = ""

    async def run(self) -> None:
        loaded = False
        while True:
            try:
                if not loaded:
                    await self._load()
                    loaded = True
                more = await self._step()
                self.fault = ""
            except (StoreError, OSError) as fault:
                # Nothing was committed: the same lines are read again after the pause.
                if self.fault != str(fault):
                    log.error("flow records not stored", fault=str(fault))
                self.fault, more = str(fault), False
            await asyncio.sleep(0 if more else POLL_SECONDS)

    async def _load(self) -> None:
        rows, bookmarks = await self._store.read(lambda db: load_bookmarks(db, SPOOL))
        # Also those that are finished: their files may still be there, if this was killed meanwhile.
        self._bookmarks = index_bookmarks(bookmarks)
        self._finished = {int(row["generation"]) for row in rows if row["finished_at"] is not None}
        self._next_generation = 1 + max((int(row["generation"]) for row in rows), default=0)

    async def _step(self) -> bool:
        files = await asyncio.to_thread(find_files, self._live)
        for path in files:
            batch = await asyncio.to_thread(
                read_batch, path, SPOOL, self._bookmarks, self._next_generation, BATCH_LINES
            )
            if batch is None:
                continue
            await self._store_batch(batch)
            if not batch.at_end:
                return True
            if path != files[-1] and is_rotated(self._live, path.name):
                await self._retire(batch)
        return False

    async def _store_batch(self, batch: Batch) -> None:
        if self._bookmarks.get(batch.bookmark.identity) == batch.bookmark:
            return
        flows, refused = await asyncio.to_thread(self._prepare, batch)
        now = self._clock()

        def commit(db: Database) -> None:
            record_flows(db, flows)
            if refused:
                record_repeated(
                    db,
                    now,
                    "flows.malformed",
                    "warning",
                    f"lines of the flow spool that are no records: {refused[0]}",
                    count=len(refused),
                )
            row = build_bookmark_row(batch.bookmark)
            db.execute(insert_sql("bookmarks", row).replace("INSERT", "INSERT OR REPLACE", 1), row)

        await self._store.write(commit)
        self._bookmarks[batch.bookmark.identity] = batch.bookmark
        self._finished.discard(batch.bookmark.generation)
        self._next_generation = max(self._next_generation, batch.bookmark.generation + 1)

    def _prepare(self, batch: Batch) -> tuple[list[StoredFlow], list[str]]:
        records: list[FlowRecord] = []
        refused: list[str] = []
        for line in batch.lines:
            if not line.raw.strip():
                continue
            try:
                records.append(parse_record(line.raw))
            except WrongInput as fault:
                refused.append(fault.reason[:200])
        snapshot = self._find_snapshot()
        addresses = {r.src_address for r in records} | {r.dst_address for r in records}
        known = self._find_holdings()
        holdings = [held for address in addresses for held in known.get(address, ())]
        attributed = attribute_flows(records, snapshot.machines, holdings)
        return [build_stored_flow(flow, snapshot) for flow in attributed], refused

    async def _retire(self, batch: Batch) -> None:
        """Delete a drained file that nothing is written to any more, and forget it."""
        now, bookmark = self._clock(), batch.bookmark
        if now - batch.changed_at < GRACE_SECONDS:
            return
        if bookmark.generation not in self._finished:
            # Before the file goes: a kill in between must not leave an open bookmark of an inode that
            # is free to be used again.
            await self._store.write(
                lambda db: finish_file(db, bookmark, batch.path.name, batch.torn, now)
            )
            self._finished.add(bookmark.generation)
        size = bookmark.offset + batch.behind
        if await asyncio.to_thread(remove_rotated, batch.path, self._live, bookmark, size):
            self._bookmarks.pop(bookmark.identity, None)
            self._finished.discard(bookmark.generation)
