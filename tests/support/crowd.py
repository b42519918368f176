"""Many VMs and policies, in zones that overlap."""

from __future__ import annotations

from steering.model import (
    Family,
    Inspect,
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

ROLES, SITES = 100, 10


def build_crowd_port(number: int) -> Port:
    """``number`` from 1; its ofport is 1,000 more, beyond those of legs and canary."""
    return Port(
        interface=f"vnet{number}",
        ofport=1000 + number,
        mac=f"02:00:00:{number >> 16:02x}:{number >> 8 & 255:02x}:{number & 255:02x}",
        iface_id=f"if-{number}",
        vm_id=f"vm-{number}",
        bridge="br-int",
    )


def build_crowd_record(number: int) -> MachineRecord:
    """Each VM has a role and a site: two zones."""
    tags = {"role": f"r{number % ROLES}", "site": f"s{number // ROLES % SITES}"}
    return MachineRecord(f"vm-{number}", f"host-{number}", tags)


def build_crowd(vms: int, policies: int) -> PolicySet:
    """Every tenth policy is from a site to a role, the others from role to role; each has its own priority."""
    zones = tuple(Zone(f"r{n}", {"role": f"r{n}"}) for n in range(ROLES))
    zones += tuple(Zone(f"s{n}", {"site": f"s{n}"}) for n in range(SITES))
    return PolicySet(
        tuple(build_crowd_record(n) for n in range(1, vms + 1)),
        zones,
        tuple(build_crowd_policy(n) for n in range(policies)),
    )


def build_crowd_policy(number: int, profile: Profile = Profile.PREVENT) -> Policy:
    source = f"s{number // 10 % SITES}" if number % 10 == 0 else f"r{number % ROLES}"
    destination = f"r{(number * 7 + number // ROLES + 1) % ROLES}"
    return Policy(
        f"policy-{number}",
        number + 1,
        (Peer(zone=source),),
        (Peer(zone=destination),),
        (Service(Protocol.TCP, (PortRange(80 + number % 7, 80 + number % 7),)),),
        (Family.IPV4,),
        Inspect(profile, OnFailure.CLOSED),
    )
