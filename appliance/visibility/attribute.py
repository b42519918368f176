"""Which VMs a flow was between: by MAC where a port of the switch has it, else by address."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from appliance.visibility.record import FlowRecord
from steering.model import Holding, Machine


class Evidence(StrEnum):
    """Why an end of a flow is said to be a VM."""

    MAC = "mac"
    ADDRESS = "address"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of a flow that is a VM. ``zones`` are those of the moment of attribution."""

    vm_id: str
    name: str
    zones: tuple[str, ...]
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class AttributedFlow:
    """A record with the VM at each end; None where the end is no known VM."""

    record: FlowRecord
    src: Endpoint | None
    dst: Endpoint | None


def _by_mac(machines: Iterable[Machine]) -> dict[str, Machine | None]:
    """MAC -> the one machine that has it; None where two claim it, for then it proves nothing."""
    found: dict[str, Machine | None] = {}
    for machine in machines:
        for port in machine.ports:
            mac = port.mac.lower()
            known = found.get(mac, machine)
            found[mac] = machine if known is machine else None
    return found


def _find_holder(held: Sequence[Holding], first_seen: float, last_seen: float) -> str | None:
    """Who held an address while the flow lasted: who held it at the start, else the first after."""
    during = [
        holding
        for holding in held
        if holding.since <= last_seen and (holding.until is None or holding.until > first_seen)
    ]
    at_start = [holding for holding in during if holding.since <= first_seen]
    if at_start:
        return max(at_start, key=lambda holding: holding.since).vm_id
    return min(during, key=lambda holding: holding.since).vm_id if during else None


def _find_endpoint(
    mac: str,
    address: str,
    record: FlowRecord,
    macs: Mapping[str, Machine | None],
    by_id: Mapping[str, Machine],
    held: Mapping[str, Sequence[Holding]],
) -> Endpoint | None:
    machine = macs.get(mac)
    if machine is not None:
        return Endpoint(machine.vm_id, machine.name, machine.zones, Evidence.MAC)
    vm_id = _find_holder(held.get(address, ()), record.first_seen, record.last_seen)
    if vm_id is None:
        return None
    known = by_id.get(vm_id)
    # A VM that has since gone keeps its id; its name and zones are no longer known.
    return Endpoint(
        vm_id, known.name if known else vm_id, known.zones if known else (), Evidence.ADDRESS
    )


def attribute_flows(
    records: Iterable[FlowRecord], machines: Sequence[Machine], holdings: Iterable[Holding]
) -> list[AttributedFlow]:
    """Each record with the VMs at its ends, in the order given."""
    macs = _by_mac(machines)
    by_id = {machine.vm_id: machine for machine in machines}
    held: dict[str, list[Holding]] = {}
    for holding in holdings:
        held.setdefault(holding.address, []).append(holding)
    return [
        AttributedFlow(
            record,
            _find_endpoint(record.src_mac, record.src_address, record, macs, by_id, held),
            _find_endpoint(record.dst_mac, record.dst_address, record, macs, by_id, held),
        )
        for record in records
    ]


def attribute_flow(
    record: FlowRecord, machines: Sequence[Machine], holdings: Iterable[Holding]
) -> AttributedFlow:
    """As `attribute_flows`, for one record."""
    return attribute_flows([record], machines, holdings)[0]
