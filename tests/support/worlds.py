"""Small worlds of VMs, lanes and policies, fixed and random, for tests of the pure parts."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from steering.model import (
    Action,
    Deny,
    Direct,
    Family,
    Inspect,
    Lane,
    Leg,
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
    Shortcut,
    Zone,
)

TIERS = ("web", "app", "db")

LANES = (
    Lane(1, Profile.PREVENT, 3901, (0,), Leg("p-a", "pa", 201), Leg("p-b", "pb", 202)),
    Lane(2, Profile.DETECT, 3902, (1,), Leg("d-a", "da", 203), Leg("d-b", "db", 204)),
)

# The same with a third leg each, by which connections come to take shortcuts.
THREE_LEGGED = tuple(
    replace(lane, leg_c=Leg(f"{lane.leg_a.interface[0]}-c", f"{lane.leg_a.device[0]}c", ofport))
    for lane, ofport in zip(LANES, (205, 206), strict=True)
)

CANARY = 211  # ofport of Hairpin's own port


def build_port(number: int, *, tag: int | None = None) -> Port:
    return Port(
        interface=f"vnet{number}",
        ofport=number,
        mac=f"02:00:00:00:00:{number:02x}",
        iface_id=f"if-{number}",
        vm_id=f"vm-{number}",
        bridge="br-int",
        tag=tag,
    )


def build_record(number: int) -> MachineRecord:
    return MachineRecord(f"vm-{number}", f"host-{number}", {"tier": TIERS[(number - 1) % 3]})


def build_cut_policy(
    name: str,
    shortcut: Shortcut | None,
    *services: Service,
    priority: int = 100,
    source: int = 1,
    destination: int = 2,
) -> Policy:
    """A policy between two VMs by their numbers, whose connections may take a shortcut (None: none does)."""
    peers = [(Peer(vm=f"vm-{number}"),) for number in (source, destination)]
    action = Inspect(Profile.PREVENT, OnFailure.OPEN, shortcut=shortcut)
    return Policy(name, priority, *peers, services or (Service(),), tuple(Family), action)


ZONES = tuple(Zone(tier, {"tier": tier}) for tier in TIERS)

peers = st.one_of(
    st.sampled_from(TIERS).map(lambda zone: Peer(zone=zone)),
    st.integers(1, 6).map(lambda number: Peer(vm=f"vm-{number}")),
)

port_ranges = st.tuples(st.integers(0, 1200), st.integers(0, 300)).map(
    lambda pair: PortRange(pair[0], pair[0] + pair[1])
)

services = st.one_of(
    st.sampled_from(
        [Service(), Service(Protocol.TCP), Service(Protocol.UDP), Service(Protocol.ICMP)]
    ),
    st.builds(
        Service,
        st.sampled_from([Protocol.TCP, Protocol.UDP]),
        st.lists(port_ranges, min_size=1, max_size=3).map(tuple),
    ),
)

actions: st.SearchStrategy[Action] = st.one_of(
    st.builds(Inspect, st.sampled_from(Profile), st.sampled_from(OnFailure)),
    st.builds(Direct, st.just("a reason")),
    st.builds(Deny, st.just("a reason")),
)

families = st.sampled_from([(Family.IPV4,), (Family.IPV6,), (Family.IPV4, Family.IPV6)])


@st.composite
def policy_sets(draw: st.DrawFn, machines: int = 6, most: int = 6) -> PolicySet:
    """Policies of distinct priorities over ``machines`` declared VMs in three zones."""
    priorities = draw(st.lists(st.integers(1, 10_000), min_size=0, max_size=most, unique=True))
    policies = tuple(
        Policy(
            name=f"policy-{index}",
            priority=priority,
            sources=tuple(draw(st.lists(peers, min_size=1, max_size=2, unique=True))),
            destinations=tuple(draw(st.lists(peers, min_size=1, max_size=2, unique=True))),
            services=tuple(draw(st.lists(services, min_size=1, max_size=2, unique=True))),
            families=draw(families),
            action=draw(actions),
        )
        for index, priority in enumerate(priorities)
    )
    return PolicySet(tuple(build_record(n) for n in range(1, machines + 1)), ZONES, policies)
