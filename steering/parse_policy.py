"""The reader of SteeringPolicy documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from steering.documents import ItemReader, show
from steering.fields import (
    MAX_PEERS,
    MAX_PORTS,
    MAX_SERVICES,
    NAME,
    NAME_RULE,
    PORTS,
    PRIORITIES,
    REASON,
    REASON_RULE,
    SHORTCUT_FLOWS,
    SHUN_SECONDS,
    UUID,
    VM_ID,
)
from steering.model import (
    Action,
    Deny,
    Direct,
    Family,
    Inspect,
    OnFailure,
    Peer,
    Policy,
    PortRange,
    Profile,
    Protocol,
    Service,
    Shortcut,
    Trigger,
)
from steering.services import PORTED


@dataclass(slots=True)
class Names:
    """What is declared, known before policies are read: also of documents with other faults."""

    zones: dict[str, int] = field(default_factory=dict)
    machines: dict[str, int] = field(default_factory=dict)
    vm_ids: dict[str, int] = field(default_factory=dict)
    policies: dict[str, int] = field(default_factory=dict)


def read_policy(
    reader: ItemReader, name: str | None, item: Mapping[str, object], names: Names
) -> Policy | None:
    """The policy of a document; None after naming what is wrong with it."""
    path = f"{reader.path}.spec"
    found = reader.spec(item, ("priority", "from", "to", "action"), ("services", "families"))
    if found is None:
        return None
    priority = None
    if "priority" in found:
        priority = reader.integer(found["priority"], f"{path}.priority", *PRIORITIES)
    sources = _read_peers(reader, found, "from", names)
    destinations = _read_peers(reader, found, "to", names)
    services = _read_services(reader, found)
    families = _read_families(reader, found)
    action = _read_action(reader, found["action"], f"{path}.action") if "action" in found else None
    if name is None or priority is None or action is None:
        return None
    if not (sources and destinations and services and families):
        return None
    return Policy(name, priority, sources, destinations, services, families, action)


def _read_peers(
    reader: ItemReader, spec: Mapping[str, object], key: str, names: Names
) -> tuple[Peer, ...] | None:
    """The peers that are sound; None only where there are none."""
    path = f"{reader.path}.spec.{key}"
    found = reader.sequence(spec[key], path, MAX_PEERS) if key in spec else None
    peers: dict[Peer, int] = {}
    for number, item in enumerate(found or ()):
        peer = _read_peer(reader, item, f"{path}[{number}]", names)
        if peer is None:
            continue
        first = peers.setdefault(peer, number)
        if first != number:
            reader.fault(f"{path}[{number}]", f"{peer} stands in {key}[{first}] already")
    return tuple(peers) or None


def _read_peer(reader: ItemReader, item: object, path: str, names: Names) -> Peer | None:
    found = reader.mapping(item, path, (), ("zone", "vm"))
    if found is None:
        return None
    if ("zone" in found) == ("vm" in found):
        reader.fault(path, "must have one of zone and vm")
        return None
    if "zone" in found:
        zone = reader.text(found["zone"], f"{path}.zone", NAME, NAME_RULE)
        if zone is not None and zone not in names.zones:
            reader.fault(
                f"{path}.zone", f"no Zone is named {zone}{reader.suggest(zone, names.zones)}"
            )
            return None
        return Peer(zone=zone) if zone is not None else None
    vm = reader.text(found["vm"], f"{path}.vm", VM_ID, "the name or vm-id of a VM")
    if vm is None:
        return None
    # A vm-id that no document declares is told from a misspelt name by its form alone.
    if vm not in names.machines and vm not in names.vm_ids and not UUID.fullmatch(vm):
        reason = f"no VirtualMachine has the name or vmId {vm}{reader.suggest(vm, names.machines)}"
        reader.fault(f"{path}.vm", reason)
        return None
    return Peer(vm=vm)


def _read_services(reader: ItemReader, spec: Mapping[str, object]) -> tuple[Service, ...] | None:
    if "services" not in spec:
        return (Service(),)
    path = f"{reader.path}.spec.services"
    found = reader.sequence(spec["services"], path, MAX_SERVICES)
    services: dict[Service, int] = {}
    for number, item in enumerate(found or ()):
        service = _read_service(reader, item, f"{path}[{number}]")
        if service is None:
            continue
        first = services.setdefault(service, number)
        if first != number:
            reader.fault(f"{path}[{number}]", f"is the same as services[{first}]")
    return tuple(services) if found is not None and len(services) == len(found) else None


def _read_service(reader: ItemReader, item: object, path: str) -> Service | None:
    found = reader.mapping(item, path, ("protocol",), ("ports",))
    if found is None or "protocol" not in found:
        return None
    protocol = reader.choice(found["protocol"], f"{path}.protocol", Protocol)
    if "ports" not in found:
        return Service(protocol) if protocol is not None else None
    if protocol is not None and protocol not in PORTED:
        reader.fault(f"{path}.ports", f"{protocol} has no ports; only {', '.join(PORTED)} have")
        return None
    listed = reader.sequence(found["ports"], f"{path}.ports", MAX_PORTS)
    ports: dict[PortRange, int] = {}
    for number, said in enumerate(listed or ()):
        port = _read_port(reader, said, f"{path}.ports[{number}]")
        if port is not None and ports.setdefault(port, number) != number:
            reader.fault(
                f"{path}.ports[{number}]", f"{port} stands in ports[{ports[port]}] already"
            )
    if protocol is None or listed is None or len(ports) != len(listed):
        return None
    return Service(protocol, tuple(ports))


def _read_port(reader: ItemReader, said: object, path: str) -> PortRange | None:
    if isinstance(said, int) and not isinstance(said, bool):
        first = last = said
    else:
        form = PORTS.fullmatch(said) if isinstance(said, str) else None
        if form is None:
            reader.fault(path, f'must be a port or a range as in "8000-8080", not {show(said)}')
            return None
        first, last = int(form[1]), int(form[2] or form[1])
    for port in (first, last):
        if not 0 <= port <= 65_535:
            reader.fault(path, f"port {show(port)} is not between 0 and 65535")
            return None
    if first > last:
        reader.fault(path, f"the range {first}-{last} is inverted")
        return None
    return PortRange(first, last)


def _read_families(reader: ItemReader, spec: Mapping[str, object]) -> tuple[Family, ...] | None:
    if "families" not in spec:
        return tuple(Family)
    path = f"{reader.path}.spec.families"
    found = reader.sequence(spec["families"], path, len(Family))
    families: dict[Family, int] = {}
    for number, said in enumerate(found or ()):
        family = reader.choice(said, f"{path}[{number}]", Family)
        if family is not None and families.setdefault(family, number) != number:
            reader.fault(f"{path}[{number}]", f"{family} stands here already")
    return tuple(families) if found is not None and len(families) == len(found) else None


def _read_action(reader: ItemReader, value: object, path: str) -> Action | None:
    found = reader.mapping(value, path, (), ("inspect", "direct", "deny"))
    if found is None:
        return None
    said = [key for key in ("inspect", "direct", "deny") if key in found]
    if len(said) != 1:
        reader.fault(path, "must have exactly one of inspect, direct and deny")
        return None
    key, path = said[0], f"{path}.{said[0]}"
    if key == "inspect":
        return _read_inspect(reader, found[key], path)
    required, optional = (("reason",), ()) if key == "direct" else ((), ("reason",))
    details = reader.mapping(found[key], path, required, optional)
    if details is None:
        return None
    if "reason" not in details:
        return Deny() if key == "deny" else None
    reason = reader.text(details["reason"], f"{path}.reason", REASON, REASON_RULE)
    if reason is None:
        return None
    return Direct(reason) if key == "direct" else Deny(reason)


def _read_inspect(reader: ItemReader, value: object, path: str) -> Inspect | None:
    found = reader.mapping(value, path, ("profile", "onFailure"), ("shunSeconds", "shortcut"))
    if found is None:
        return None
    profile = on_failure = None
    if "profile" in found:
        profile = reader.choice(found["profile"], f"{path}.profile", Profile)
    if "onFailure" in found:
        on_failure = reader.choice(found["onFailure"], f"{path}.onFailure", OnFailure)
    shun = None
    if "shunSeconds" in found:
        shun = reader.integer(found["shunSeconds"], f"{path}.shunSeconds", *SHUN_SECONDS)
        if profile is Profile.DETECT:
            reader.fault(f"{path}.shunSeconds", "a policy that only detects shuns nothing")
    shortcut = None
    if "shortcut" in found:
        shortcut = _read_shortcut(reader, found["shortcut"], f"{path}.shortcut")
    return Inspect(profile, on_failure, shun, shortcut) if profile and on_failure else None


def _read_shortcut(reader: ItemReader, value: object, path: str) -> Shortcut | None:
    found = reader.mapping(value, path, ("after", "maxFlows"), ("returnOnAlert",))
    if found is None:
        return None
    after = most = None
    if "after" in found:
        after = reader.choice(found["after"], f"{path}.after", Trigger)
    if "maxFlows" in found:
        most = reader.integer(found["maxFlows"], f"{path}.maxFlows", *SHORTCUT_FLOWS)
    back = found.get("returnOnAlert", True)
    if not isinstance(back, bool):
        reader.fault(f"{path}.returnOnAlert", f"must be true or false, not {show(back)}")
        return None
    return Shortcut(after, most, back) if after and most else None
