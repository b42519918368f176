"""Policy documents -> PolicySet, or every fault in them at once; and back. `docs/policy.md` describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_address

from steering.conflicts import find_contradictions
from steering.documents import (
    MAX_DOCUMENTS,
    Faults,
    ItemReader,
    parse_text,
    show,
)
from steering.errors import FieldError, WrongInput
from steering.fields import (
    ADDRESS,
    ADDRESS_RULE,
    KINDS,
    MAX_ADDRESSES,
    MAX_MACHINES,
    MAX_POLICIES,
    MAX_TAGS,
    MAX_ZONES,
    NAME,
    NAME_RULE,
    TAG,
    TAG_RULE,
    VM_ID,
    VM_ID_RULE,
)
from steering.model import (
    API_VERSION,
    Action,
    Deny,
    Direct,
    Inspect,
    MachineRecord,
    Peer,
    Policy,
    PolicySet,
    Service,
    Shortcut,
    Zone,
)
from steering.parse_policy import Names, read_policy
from steering.pipeline import build_fragments_number, build_policy_number


def parse_documents(text: str) -> PolicySet:
    """A PolicySet from a YAML stream of documents, or one YAML or JSON document of kind List.

    Raises WrongInput with every fault, sorted by document; paths begin with the document's place,
    counted from 0 without empty documents, as in ``items[2].spec.priority``. Text that can't be
    decoded has one fault, whose path is the place in the text.
    """
    documents = parse_text(text)
    if not documents:
        raise WrongInput(
            [FieldError("(text)", "no documents")],
            "to withdraw every policy, give a List whose items are empty",
        )
    if len(documents) == 1:
        return parse_objects(documents[0])
    return _parse_items(documents, Faults())


def parse_objects(value: object) -> PolicySet:
    """As `parse_documents`, from decoded JSON: a List, or a single document.

    Decoded JSON has lost duplicate keys: give the text to `parse_documents` where there is one.
    """
    if not isinstance(value, Mapping) or value.get("kind") != "List":
        return _parse_items([value], Faults())
    faults = Faults()
    reader = ItemReader(faults, 0)
    reader.mapping(value, "(list)", ("apiVersion", "kind", "items"))
    _check_version(reader, value, "(list).apiVersion")
    items = value.get("items", [])
    listed = reader.sequence(items, "items", MAX_DOCUMENTS, empty=True)
    return _parse_items(listed or (), faults)


def _parse_items(items: Sequence[object], faults: Faults) -> PolicySet:
    names = Names()
    machines: list[MachineRecord] = []
    zones: list[Zone] = []
    policies: list[tuple[int, Policy]] = []
    unread: list[tuple[ItemReader, str | None, Mapping[str, object]]] = []
    for number, item in enumerate(items):
        reader = ItemReader(faults, number)
        head = read_head(reader, item)
        if head is None:
            continue
        kind, name, document = head
        if kind == "VirtualMachine":
            _declare(reader, names.machines, kind, name)
            record = read_machine(reader, name, document, names)
            machines += [record] if record else []
        elif kind == "Zone":
            _declare(reader, names.zones, kind, name)
            zone = read_zone(reader, name, document)
            zones += [zone] if zone else []
        else:
            _declare(reader, names.policies, kind, name)
            unread.append((reader, name, document))
    check_names(faults, machines, names)
    for reader, name, document in unread:
        policy = read_policy(reader, name, document, names)
        policies += [(reader.number, policy)] if policy else []
    for kind, count, limit in (
        ("VirtualMachine", len(machines), MAX_MACHINES),
        ("Zone", len(zones), MAX_ZONES),
        ("SteeringPolicy", len(unread), MAX_POLICIES),
    ):
        if count > limit:
            faults.add(0, "items", f"{count} documents of kind {kind}; at most {limit} are taken")
            faults.raise_any()  # what follows compares them with each other
    found = PolicySet(tuple(machines), tuple(zones), tuple(policy for _, policy in policies))
    check_numbers(faults, policies)
    check_contradictions(faults, found, [number for number, _ in policies])
    faults.raise_any()
    return found


def read_head(
    reader: ItemReader, item: object
) -> tuple[str, str | None, Mapping[str, object]] | None:
    """Kind, name and the whole of a document, whatever its faults; None where the kind is not known."""
    if not isinstance(item, Mapping):
        reader.fault(reader.path, f"must be a mapping, not {show(item)}")
        return None
    metadata = item.get("metadata")
    said = metadata.get("name") if isinstance(metadata, Mapping) else None
    kind = item.get("kind")
    if isinstance(said, str) and NAME.fullmatch(said):
        reader.label = f"{kind} {said}" if kind in KINDS else said
    reader.mapping(item, reader.path, ("apiVersion", "kind", "metadata", "spec"))
    _check_version(reader, item, f"{reader.path}.apiVersion")
    name = None
    if "metadata" in item:
        path = f"{reader.path}.metadata"
        found = reader.mapping(metadata, path, ("name",))
        if found is not None and "name" in found:
            name = reader.text(said, f"{path}.name", NAME, NAME_RULE)
    if not isinstance(kind, str) or kind not in KINDS:
        if kind == "List":
            reader.fault(f"{reader.path}.kind", "a List must be the only document")
        elif "kind" in item:
            near = reader.suggest(kind, KINDS) if isinstance(kind, str) else ""
            reason = f"must be one of {', '.join(KINDS)}, not {show(kind)}{near}"
            reader.fault(f"{reader.path}.kind", reason)
        return None
    return kind, name, item


def _check_version(reader: ItemReader, item: Mapping[str, object], path: str) -> None:
    if "apiVersion" in item and item["apiVersion"] != API_VERSION:
        reader.fault(path, f"must be {API_VERSION}, not {show(item['apiVersion'])}")


def _declare(reader: ItemReader, declared: dict[str, int], kind: str, name: str | None) -> None:
    if name is None:
        return
    first = declared.setdefault(name, reader.number)
    if first != reader.number:
        path = f"{reader.path}.metadata.name"
        reader.fault(path, f"items[{first}] is a {kind} of this name too")


def read_machine(
    reader: ItemReader, name: str | None, item: Mapping[str, object], names: Names
) -> MachineRecord | None:
    """The record of a document; None after naming what is wrong with it."""
    path = f"{reader.path}.spec"
    found = reader.spec(item, ("vmId",), ("tags", "addresses"))
    if found is None:
        return None
    vm_id = None
    if "vmId" in found:
        vm_id = reader.text(found["vmId"], f"{path}.vmId", VM_ID, VM_ID_RULE)
    if vm_id is not None:
        first = names.vm_ids.setdefault(vm_id, reader.number)
        if first != reader.number:
            reader.fault(f"{path}.vmId", f"items[{first}] has this vmId too")
    tags = _read_tags(reader, found.get("tags", {}), f"{path}.tags")
    addresses: tuple[str, ...] | None = ()
    if "addresses" in found:
        addresses = _read_addresses(reader, found["addresses"], f"{path}.addresses")
    if name is None or vm_id is None or tags is None or addresses is None:
        return None
    return MachineRecord(vm_id, name, tags, addresses)


def _read_addresses(reader: ItemReader, value: object, path: str) -> tuple[str, ...] | None:
    """Each in the one form that `ipaddress` writes, which is the switch's too."""
    found = reader.sequence(value, path, MAX_ADDRESSES)
    if found is None:
        return None
    addresses: list[str] = []
    for number, said in enumerate(found):
        text = reader.text(said, f"{path}[{number}]", ADDRESS, ADDRESS_RULE)
        if text is None:
            continue
        try:
            address = ip_address(text)
        except ValueError:
            reader.fault(f"{path}[{number}]", f"{show(text)} is not {ADDRESS_RULE}")
            continue
        # The first byte of an address is 0 where it is unset, mapped or translated (RFC 4291, RFC 791).
        shared = address.packed[0] == 0 or str(address) == "255.255.255.255"
        if shared or address.is_multicast or address.is_link_local or address.is_loopback:
            reader.fault(f"{path}[{number}]", f"{address} is no address that a VM holds for itself")
        elif str(address) in addresses:
            reader.fault(f"{path}[{number}]", f"{address} stands here more than once")
        else:
            addresses.append(str(address))
    return tuple(addresses) if len(addresses) == len(found) else None


def _read_tags(reader: ItemReader, value: object, path: str) -> dict[str, str] | None:
    found = reader.any_mapping(value, path)
    if found is None:
        return None
    if len(found) > MAX_TAGS:
        reader.fault(path, f"has {len(found)} tags; at most {MAX_TAGS} are taken")
        return None
    tags: dict[str, str] = {}
    for key, said in found.items():
        if not TAG.fullmatch(key):
            reader.fault(path, f"the key {show(key)} is not {TAG_RULE}")
            continue
        text = reader.text(said, f"{path}.{key}", TAG, TAG_RULE)
        if text is not None:
            tags[key] = text
    return tags if len(tags) == len(found) else None


def read_zone(reader: ItemReader, name: str | None, item: Mapping[str, object]) -> Zone | None:
    """As `read_machine`, of a zone."""
    found = reader.spec(item, ("selector",))
    if found is None or "selector" not in found:
        return None
    path = f"{reader.path}.spec.selector"
    selector = reader.mapping(found["selector"], path, ("matchTags",))
    if selector is None or "matchTags" not in selector:
        return None
    tags = _read_tags(reader, selector["matchTags"], f"{path}.matchTags")
    if tags is None:
        return None
    if not tags:
        reader.fault(f"{path}.matchTags", "is empty: a selector demands at least one tag")
        return None
    return Zone(name, tags) if name is not None else None


def check_names(faults: Faults, machines: Sequence[MachineRecord], names: Names) -> None:
    """No VM's name is another one's vm-id."""
    for record in machines:
        other = names.vm_ids.get(record.name)
        if other is not None and record.vm_id != record.name:
            number = names.machines[record.name]
            reason = f"{show(record.name)} is the vmId of items[{other}]: a peer of it would be ambiguous"
            faults.add(number, f"items[{number}].metadata.name", reason)


def check_numbers(faults: Faults, policies: Sequence[tuple[int, Policy]]) -> None:
    """No two policies have one number in the switch: it would take the one for the other, whatever they say.

    Among 1,000 names that happens once in 1,000 times, so a refusal costs less than keeping numbers would.
    """
    owners: dict[int, str] = {}
    for number, policy in policies:
        for one in (build_policy_number(policy.name), build_fragments_number(policy.name)):
            owner = owners.setdefault(one, policy.name)
            if owner != policy.name:
                reason = (
                    f"{show(policy.name)} and {show(owner)} can't be told apart in the switch: both names "
                    f"come to the number {one}; rename either policy"
                )
                faults.add(number, f"items[{number}].metadata.name", reason)
                break


def check_contradictions(faults: Faults, found: PolicySet, numbers: Sequence[int]) -> None:
    """No two policies contradict each other; ``numbers``: the places of their documents."""
    for clash in find_contradictions(found):
        first, second = found.policies[clash.first], found.policies[clash.second]
        faults.add(
            numbers[clash.second],
            f"items[{numbers[clash.second]}].spec.priority",
            f"SteeringPolicy {second.name} contradicts {first.name} (items[{numbers[clash.first]}]) "
            f"at equal priority {second.priority}: {second.action} against {first.action}, "
            f"both for {clash.overlap}",
        )
        if faults.is_full:
            return


def render_documents(policies: PolicySet) -> dict[str, object]:
    """The List document of a set, JSON-able: VMs, zones, then policies, nothing left out.

    ``parse_objects(render_documents(x)) == x`` for every set that `parse_documents` returned.
    """
    return {
        "apiVersion": API_VERSION,
        "kind": "List",
        "items": [
            *(
                _render_item("VirtualMachine", record.name, _render_machine(record))
                for record in policies.machines
            ),
            *(
                _render_item("Zone", zone.name, {"selector": {"matchTags": dict(zone.match_tags)}})
                for zone in policies.zones
            ),
            *(
                _render_item("SteeringPolicy", policy.name, _render_policy(policy))
                for policy in policies.policies
            ),
        ],
    }


def _render_item(kind: str, name: str, spec: dict[str, object]) -> dict[str, object]:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}


def _render_machine(record: MachineRecord) -> dict[str, object]:
    rendered: dict[str, object] = {"vmId": record.vm_id, "tags": dict(record.tags)}
    if record.addresses:
        rendered["addresses"] = list(record.addresses)
    return rendered


def _render_policy(policy: Policy) -> dict[str, object]:
    return {
        "priority": policy.priority,
        "from": [_render_peer(peer) for peer in policy.sources],
        "to": [_render_peer(peer) for peer in policy.destinations],
        "services": [_render_service(service) for service in policy.services],
        "families": [str(family) for family in policy.families],
        "action": _render_action(policy.action),
    }


def _render_peer(peer: Peer) -> dict[str, str]:
    return {"zone": peer.zone} if peer.zone is not None else {"vm": peer.vm or ""}


def _render_service(service: Service) -> dict[str, object]:
    rendered: dict[str, object] = {"protocol": str(service.protocol)}
    if service.ports:
        rendered["ports"] = [p.first if p.first == p.last else str(p) for p in service.ports]
    return rendered


def _render_shortcut(shortcut: Shortcut | None) -> dict[str, object]:
    if shortcut is None:
        return {}
    back = {} if shortcut.return_on_alert else {"returnOnAlert": False}
    return {"shortcut": {"after": str(shortcut.after), "maxFlows": shortcut.max_flows, **back}}


def _render_action(action: Action) -> dict[str, object]:
    match action:
        case Inspect():
            shun = {} if action.shun_seconds is None else {"shunSeconds": action.shun_seconds}
            return {
                "inspect": {
                    "profile": str(action.profile),
                    "onFailure": str(action.on_failure),
                    **shun,
                    **_render_shortcut(action.shortcut),
                }
            }
        case Direct():
            return {"direct": {"reason": action.reason}}
        case Deny():
            return {"deny": {"reason": action.reason} if action.reason else {}}
