"""What the policies say of one connection between two VMs, and whether the switch can do it.

The data plane gives the same answers by flows; this is the reference that they are tested against.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from steering.documents import MAX_FAULTS
from steering.errors import FieldError
from steering.last import Last
from steering.membership import build_membership, build_zone_index, find_zones, is_in_zone
from steering.model import (
    Action,
    Deny,
    Family,
    Inspect,
    Lane,
    Machine,
    MachineRecord,
    Peer,
    Policy,
    PolicySet,
    Port,
    Profile,
    Protocol,
    Zone,
)
from steering.services import covers

NO_POLICY = "no policy names it: it goes direct, uninspected"
QUARANTINED = Deny("quarantine")


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection as its opener's first packet shows it.

    ``destination_port`` is None where there is none (ICMP) or it isn't known; then only services for
    every port cover it. Protocol.ANY is a protocol without a name here, such as GRE. No policy looks
    at ``source_port``.
    """

    family: Family
    protocol: Protocol
    destination_port: int | None = None
    source_port: int | None = None

    def __str__(self) -> str:
        protocol = "another protocol" if self.protocol is Protocol.ANY else str(self.protocol)
        port = "" if self.destination_port is None else f"/{self.destination_port}"
        return f"{protocol}{port} {self.family}"


@dataclass(frozen=True, slots=True)
class Decision:
    """The policy that has the last word and its action; both None where no policy names it."""

    policy: Policy | None
    action: Action | None
    reason: str


@dataclass(frozen=True, slots=True)
class Subject:
    """A VM as policies see it; ``zones`` are sorted."""

    vm_id: str
    name: str
    zones: tuple[str, ...]

    def is_named_by(self, peers: Iterable[Peer]) -> bool:
        return any(
            peer.zone in self.zones if peer.zone is not None else peer.vm in (self.vm_id, self.name)
            for peer in peers
        )


def resolve_machines(policies: PolicySet, ports: Sequence[Port]) -> tuple[Machine, ...]:
    """The VMs found on the switch, sorted by name, with what the documents say of each.

    Ports without a vm-id belong to no VM and are left out.
    """
    return _resolve(policies.machines, policies.zones, tuple(ports))


@Last
def _resolve(
    declared: tuple[MachineRecord, ...], zones: tuple[Zone, ...], ports: tuple[Port, ...]
) -> tuple[Machine, ...]:
    records = {record.vm_id: record for record in declared}
    index = build_zone_index(zones)
    by_vm: dict[str, list[Port]] = {}
    for port in ports:
        if port.vm_id:
            by_vm.setdefault(port.vm_id, []).append(port)
    machines = []
    for vm_id, own in by_vm.items():
        record = records.get(vm_id)
        tags = dict(record.tags) if record else {}
        machines.append(
            Machine(
                vm_id=vm_id,
                name=record.name if record else vm_id,
                tags=tags,
                zones=index.find_zones(tags),
                ports=tuple(
                    sorted(own, key=lambda port: (port.bridge, port.ofport, port.interface))
                ),
            )
        )
    return tuple(sorted(machines, key=lambda machine: (machine.name, machine.vm_id)))


def find_members(
    policies: PolicySet, machines: Sequence[Machine], peers: Sequence[Peer]
) -> frozenset[str]:
    """The vm-ids of those of ``machines`` that any of the peers names."""
    named = {peer.zone for peer in peers if peer.zone is not None}
    zones = [zone for zone in policies.zones if zone.name in named]
    vms = {peer.vm for peer in peers if peer.vm is not None}
    return frozenset(
        machine.vm_id
        for machine in machines
        if machine.vm_id in vms
        or machine.name in vms
        or any(is_in_zone(zone, machine.tags) for zone in zones)
    )


def find_subject(policies: PolicySet, machines: Sequence[Machine], vm_id: str) -> Subject:
    """A VM by its vm-id: as found on the switch, else as declared, else without name and tags."""
    found = next((machine for machine in machines if machine.vm_id == vm_id), None) or next(
        (record for record in policies.machines if record.vm_id == vm_id), None
    )
    if found is None:
        return Subject(vm_id, vm_id, ())
    return Subject(vm_id, found.name, find_zones(policies.zones, found.tags))


def order_policies(policies: Iterable[Policy]) -> tuple[Policy, ...]:
    """In the order in which they are asked. Those of equal priority agree, so their order is only told."""
    return tuple(sorted(policies, key=lambda policy: (-policy.priority, policy.name)))


def find_mismatches(
    policy: Policy, source: Subject, destination: Subject, connection: Connection
) -> tuple[str, ...]:
    """Why a policy does not name a connection that ``source`` opens; empty if it does."""
    return tuple(_find_mismatches(policy, source, destination, connection))


def _find_mismatches(
    policy: Policy, source: Subject, destination: Subject, connection: Connection
) -> Iterator[str]:
    for side, subject, peers in (
        ("source", source, policy.sources),
        ("destination", destination, policy.destinations),
    ):
        if not subject.is_named_by(peers):
            zones = f"zone {', '.join(subject.zones)}" if subject.zones else "no zone"
            wanted = ", ".join(map(str, peers))
            yield f"{side} {subject.name} (in {zones}) is not in {wanted}"
    if connection.family not in policy.families:
        yield f"{connection.family} is not in {', '.join(policy.families)}"
    if not any(
        covers(service, connection.protocol, connection.destination_port)
        for service in policy.services
    ):
        what = str(connection).removesuffix(f" {connection.family}")
        yield f"{what} is not in {', '.join(map(str, policy.services))}"


def decide(
    policies: PolicySet,
    machines: Sequence[Machine],
    source_vm_id: str,
    destination_vm_id: str,
    connection: Connection,
) -> Decision:
    """What becomes of a connection that the source VM opens, answers included.

    A VM that is not in ``machines`` is judged by its document, or as one without tags: alerts may
    speak of a VM that has just left.
    """
    shut_off = next(
        (vm for vm in (source_vm_id, destination_vm_id) if vm in policies.quarantined), None
    )
    if shut_off is not None:
        name = find_subject(policies, machines, shut_off).name
        return Decision(None, QUARANTINED, f"VM {name} is in quarantine")
    source = find_subject(policies, machines, source_vm_id)
    destination = find_subject(policies, machines, destination_vm_id)
    for policy in order_policies(policies.policies):
        if next(_find_mismatches(policy, source, destination, connection), None) is None:
            reason = f"policy {policy.name} (priority {policy.priority}) says {policy.action}"
            return Decision(policy, policy.action, reason)
    return Decision(None, None, NO_POLICY)


def find_lane(lanes: Iterable[Lane], profile: Profile) -> Lane | None:
    """The lane of a profile."""
    return next((lane for lane in lanes if lane.profile is profile), None)


def check_against_switch(
    policies: PolicySet, ports: Sequence[Port], lanes: Sequence[Lane]
) -> tuple[FieldError, ...]:
    """What the switch, as it is now, can't do for these policies; empty if it can do all.

    Paths point into the List of `render_documents` (VMs, zones, policies, in their order).
    """
    found = {port.vm_id for port in ports if port.vm_id}
    faults = (
        *_check_records(policies, found),
        *_check_policies(policies, found, lanes),
        *_check_addresses(policies, ports),
    )
    if len(faults) <= MAX_FAULTS:
        return faults
    more = FieldError("items", f"and {len(faults) - MAX_FAULTS} more faults")
    return (*faults[:MAX_FAULTS], more)


def _check_records(policies: PolicySet, found: set[str]) -> Iterator[FieldError]:
    for number, record in enumerate(policies.machines):
        if record.vm_id not in found:
            reason = f"{record.vm_id} is in no bridge: no port has this vm-id (VM {record.name})"
            yield FieldError(f"items[{number}].spec.vmId", reason)


def _list_policies(policies: PolicySet) -> Iterator[tuple[str, Policy]]:
    start = len(policies.machines) + len(policies.zones)
    for number, policy in enumerate(policies.policies, start):
        yield f"items[{number}].spec", policy


def _list_peers(path: str, policy: Policy) -> Iterator[tuple[str, Peer]]:
    for key, peers in (("from", policy.sources), ("to", policy.destinations)):
        for number, peer in enumerate(peers):
            yield f"{path}.{key}[{number}]", peer


def _check_policies(
    policies: PolicySet, found: set[str], lanes: Sequence[Lane]
) -> Iterator[FieldError]:
    # A declared VM in no bridge has been told at its own document.
    declared = {text for record in policies.machines for text in (record.name, record.vm_id)}
    offered = ", ".join(lane.name for lane in lanes) or "none"
    for path, policy in _list_policies(policies):
        for place, peer in _list_peers(path, policy):
            if peer.vm is not None and peer.vm not in declared and peer.vm not in found:
                reason = f"{peer.vm} is in no bridge: no port has this vm-id (policy {policy.name})"
                yield FieldError(f"{place}.vm", reason)
        action = policy.action
        if isinstance(action, Inspect) and find_lane(lanes, action.profile) is None:
            yield FieldError(
                f"{path}.action.inspect.profile",
                f"no lane has the profile {action.profile}; the lanes are: {offered} "
                f"(policy {policy.name})",
            )


def _check_addresses(policies: PolicySet, ports: Sequence[Port]) -> Iterator[FieldError]:
    """VMs that policies name must be told from each other by MAC, whatever their VLAN."""
    by_mac: dict[tuple[str, str], list[Port]] = {}
    for port in ports:
        if port.mac:
            by_mac.setdefault((port.bridge, port.mac.lower()), []).append(port)
    shared = [(key, by_mac[key]) for key in sorted(by_mac) if len(by_mac[key]) > 1]
    without = [port for port in ports if not port.mac]
    if not shared and not without:
        return  # whom the policies name takes longer to find out
    places = _find_places(policies)
    for port in without:
        if port.vm_id in places:
            reason = (
                f"port {port.interface} of {port.vm_id} has no attached-mac: it can't be steered"
            )
            yield FieldError(places[port.vm_id], reason)
    for (bridge, mac), sharing in shared:
        who = ", ".join(f"{port.interface} of {port.vm_id or 'no VM'}" for port in sharing[:4])
        for vm_id in sorted({port.vm_id for port in sharing} & places.keys()):
            yield FieldError(
                places[vm_id], f"{len(sharing)} ports of {bridge} have the MAC {mac}: {who}"
            )


def _find_places(policies: PolicySet) -> Mapping[str, str]:
    """For every vm-id that some policy names, the path of the document item that says so best."""
    membership = build_membership(policies.zones, policies.machines)
    named: set[str] = set()
    places: dict[str, str] = {}
    for path, policy in _list_policies(policies):
        named |= membership.find_members((*policy.sources, *policy.destinations))
        for place, peer in _list_peers(path, policy):
            if peer.vm is not None and peer.vm not in membership.by_name:
                places.setdefault(peer.vm, f"{place}.vm")
    for number, record in enumerate(policies.machines):
        if record.vm_id in named:
            places[record.vm_id] = f"items[{number}].spec.vmId"
    return places
