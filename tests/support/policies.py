"""A small world of policies for tests: its parts by hand, and strategies that draw random ones."""

from __future__ import annotations

from hypothesis import strategies as st

from steering.conflicts import find_contradictions
from steering.decide import Connection, resolve_machines
from steering.model import (
    Action,
    Deny,
    Direct,
    Family,
    Inspect,
    Lane,
    Leg,
    Machine,
    MachineRecord,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    Port,
    PortRange,
    Profile,
    Protocol,
    Service,
    Zone,
)
from steering.services import PORTED

PREVENT = Inspect(Profile.PREVENT, OnFailure.CLOSED)
DETECT = Inspect(Profile.DETECT, OnFailure.OPEN)
LANES = (
    Lane(1, Profile.PREVENT, 3901, (0, 1), Leg("leg-p-a", "in-p-a"), Leg("leg-p-b", "in-p-b")),
    Lane(2, Profile.DETECT, 3902, (8,), Leg("leg-d-a", "in-d-a"), Leg("leg-d-b", "in-d-b")),
)


def build_vm_id(number: int) -> str:
    return f"6d0c0e0a-0000-4000-8000-{number:012x}"


def build_record(name: str, number: int, **tags: str) -> MachineRecord:
    return MachineRecord(build_vm_id(number), name, tags)


def build_port(number: int, *, bridge: str = "br-int", tag: int | None = None) -> Port:
    return Port(
        interface=f"tap{number}",
        ofport=number,
        mac=f"52:54:00:00:{number >> 8:02x}:{number & 0xFF:02x}",
        iface_id=f"port-{number}",
        vm_id=build_vm_id(number),
        bridge=bridge,
        tag=tag,
    )


def build_policy(
    name: str,
    source: Peer,
    destination: Peer,
    action: Action = PREVENT,
    *services: Service,
    priority: int = 100,
    families: tuple[Family, ...] = tuple(Family),
) -> Policy:
    return Policy(
        name, priority, (source,), (destination,), services or (Service(),), families, action
    )


def tcp(*ports: int) -> Service:
    return Service(Protocol.TCP, tuple(PortRange(port, port) for port in ports))


WEB, APP, DB = (Peer(zone=name) for name in ("web", "app", "db"))
RECORDS = (
    build_record("web-1", 1, tier="web"),
    build_record("web-2", 2, tier="web"),
    build_record("app-1", 3, tier="app"),
    build_record("app-2", 4, tier="app", env="test"),
    build_record("db-1", 5, tier="db"),
)
ZONES = tuple(Zone(name, {"tier": name}) for name in ("web", "app", "db"))
PORTS = tuple(build_port(number) for number in range(1, 7))  # the sixth has no document


def build_set(*policies: Policy) -> PolicySet:
    """Three zones, five declared VMs, and these policies."""
    return PolicySet(RECORDS, ZONES, policies)


def find_machines(policies: PolicySet) -> tuple[Machine, ...]:
    """The six VMs of the small world as found on the switch."""
    return resolve_machines(policies, PORTS)


# Strategies. Few names, tags, ports and priorities, so that things meet.

EDGES = (0, 1, 79, 80, 81, 443, 8080, 65535)
TAG_VALUES = ("a", "b")
TAG_KEYS = ("tier", "env")


def _draw_tags(smallest: int) -> st.SearchStrategy[dict[str, str]]:
    return st.dictionaries(
        st.sampled_from(TAG_KEYS), st.sampled_from(TAG_VALUES), min_size=smallest
    )


port_ranges = st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)).map(
    lambda pair: PortRange(min(pair), max(pair))
)
services = st.one_of(
    st.sampled_from(Protocol).map(Service),
    st.builds(
        Service,
        st.sampled_from(PORTED),
        st.lists(port_ranges, min_size=1, max_size=3, unique=True).map(tuple),
    ),
)
reasons = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=40)
actions: st.SearchStrategy[Action] = st.one_of(
    st.builds(Inspect, st.sampled_from(Profile), st.sampled_from(OnFailure)),
    st.builds(Direct, reasons),
    st.builds(Deny, st.just("") | reasons),
)
families = st.lists(st.sampled_from(Family), min_size=1, max_size=2, unique=True).map(tuple)
connections = st.builds(
    lambda family, protocol, port: Connection(
        family, protocol, port if protocol in PORTED else None
    ),
    st.sampled_from(Family),
    st.sampled_from(Protocol),
    st.sampled_from(EDGES),
)


@st.composite
def policy_sets(
    draw: st.DrawFn, *, consistent: bool = True, priorities: tuple[int, ...] = (1, 2, 3)
) -> PolicySet:
    """Random sets over at most 6 VMs and 4 zones; some contradict unless ``consistent``."""
    records = tuple(
        MachineRecord(build_vm_id(number), f"vm-{number}", draw(_draw_tags(0)))
        for number in range(1, draw(st.integers(1, 6)))
    )
    zones = tuple(
        Zone(f"zone-{number}", draw(_draw_tags(1))) for number in range(1, draw(st.integers(1, 5)))
    )
    # The last vm-id has no document, and is named by its id alone.
    known = [Peer(vm=record.name) for record in records] + [Peer(vm=build_vm_id(6))]
    known += [Peer(vm=record.vm_id) for record in records] + [Peer(zone=z.name) for z in zones]
    peers = st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True).map(tuple)
    policies = draw(
        st.lists(
            st.builds(
                Policy,
                name=st.just(""),
                priority=st.sampled_from(priorities),
                sources=peers,
                destinations=peers,
                services=st.lists(services, min_size=1, max_size=3, unique=True).map(tuple),
                families=families,
                action=actions,
            ),
            max_size=6,
        )
    )
    kept: list[Policy] = []
    for number, drawn in enumerate(policies):
        policy = Policy(
            f"policy-{number}",
            drawn.priority,
            drawn.sources,
            drawn.destinations,
            drawn.services,
            drawn.families,
            drawn.action,
        )
        trial = PolicySet(records, zones, (*kept, policy))
        if not consistent or next(find_contradictions(trial), None) is None:
            kept.append(policy)
    return PolicySet(records, zones, tuple(kept))
