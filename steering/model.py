"""Frozen values that the whole project speaks in: policies, machines, lanes.

Nothing here does I/O. Times are seconds since the epoch (float), sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

API_VERSION = "hairpin/v1"


class Protocol(StrEnum):
    """Layer 4 protocol of a service; ``ICMP`` is ICMP on IPv4 and ICMPv6 on IPv6."""

    ANY = "any"
    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"
    ICMP = "icmp"


class Family(StrEnum):
    IPV4 = "ipv4"
    IPV6 = "ipv6"


class Profile(StrEnum):
    """What a lane does with hostile traffic: ``prevent`` drops it, ``detect`` only records it."""

    PREVENT = "prevent"
    DETECT = "detect"


class OnFailure(StrEnum):
    """What becomes of traffic while its lane can't inspect: ``open`` passes it, ``closed`` drops it."""

    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """An inclusive range of layer 4 ports, 0 to 65535."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class Service:
    """A protocol and, for tcp, udp and sctp, destination ports; no ports means every port."""

    protocol: Protocol = Protocol.ANY
    ports: tuple[PortRange, ...] = ()

    def __str__(self) -> str:
        ports = ",".join(str(port) for port in self.ports)
        return f"{self.protocol}/{ports}" if ports else str(self.protocol)


class Trigger(StrEnum):
    """After what a connection may leave inspection: see `Shortcut`. Sizes are 10^6 bytes of one side."""

    RULE = "rule"  # a rule with `bypass` matched it
    TLS_HANDSHAKE = "tls-handshake"  # it is TLS, and what can be read of it was read
    ONE_MEGABYTE = "1MB"
    TEN_MEGABYTES = "10MB"
    HUNDRED_MEGABYTES = "100MB"


@dataclass(frozen=True, slots=True)
class Shortcut:
    """The engine's say-so that the switch may pass the rest of a TCP connection by itself, uninspected.

    ``max_flows``: connections of one policy at a time; more stay inspected. ``return_on_alert``: an alert
    that concerns either VM sends all connections of that VM back to inspection.
    """

    after: Trigger
    max_flows: int
    return_on_alert: bool = True

    def __str__(self) -> str:
        alert = ", back on alert" if self.return_on_alert else ""
        return f"shortcut after {self.after}, at most {self.max_flows}{alert}"


@dataclass(frozen=True, slots=True)
class Inspect:
    """``shun_seconds``: for so long the switch itself drops a flow that the engine blocked; None: not.

    ``shortcut`` None: every packet is inspected, as long as the connection lasts.
    """

    profile: Profile
    on_failure: OnFailure
    shun_seconds: int | None = None
    shortcut: Shortcut | None = None

    def __str__(self) -> str:
        shun = "" if self.shun_seconds is None else f", shun {self.shun_seconds} s"
        cut = "" if self.shortcut is None else f", {self.shortcut}"
        return f"inspect ({self.profile}, {self.on_failure} on failure{shun}{cut})"


@dataclass(frozen=True, slots=True)
class Direct:
    reason: str

    def __str__(self) -> str:
        return f"direct ({self.reason})"


@dataclass(frozen=True, slots=True)
class Deny:
    reason: str = ""

    def __str__(self) -> str:
        return f"deny ({self.reason})" if self.reason else "deny"


Action = Inspect | Direct | Deny


@dataclass(frozen=True, slots=True)
class Peer:
    """One end of a policy: a zone by its name, or one VM by its name or vm-id. Exactly one is set."""

    zone: str | None = None
    vm: str | None = None

    def __str__(self) -> str:
        return f"zone {self.zone}" if self.zone is not None else f"vm {self.vm}"


@dataclass(frozen=True, slots=True)
class Zone:
    """A set of VMs: those that carry every tag of ``match_tags`` (at least one)."""

    name: str
    match_tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class MachineRecord:
    """What the documents say of a VM: its name and tags, keyed by vm-id.

    ``addresses`` are those that it may use, as `ipaddress` writes them; none given: any.
    """

    vm_id: str
    name: str
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """Who talks to whom, and what is done with it. The higher priority (1 to 10000) wins.

    A policy is about connections: ``sources`` open them, ``destinations`` answer, and the answers
    belong to the connection.
    """

    name: str
    priority: int
    sources: tuple[Peer, ...]
    destinations: tuple[Peer, ...]
    services: tuple[Service, ...]
    families: tuple[Family, ...]
    action: Action


@dataclass(frozen=True, slots=True)
class PolicySet:
    """Everything the operator declared: one revision of it is in force at a time.

    ``quarantined`` are vm-ids from and to which nothing passes, whatever the policies say; they are no
    part of the documents.
    """

    machines: tuple[MachineRecord, ...] = ()
    zones: tuple[Zone, ...] = ()
    policies: tuple[Policy, ...] = ()
    quarantined: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Port:
    """A VM's port as the switch shows it. ``tag`` is its access VLAN in the bridge, None for none."""

    interface: str
    ofport: int
    mac: str
    iface_id: str
    vm_id: str
    bridge: str
    tag: int | None = None
    link_up: bool = True


@dataclass(frozen=True, slots=True)
class Machine:
    """A VM that was found on the switch, with what the documents add to it.

    ``name`` falls back to the vm-id where no document names it. ``zones`` are sorted.
    """

    vm_id: str
    name: str
    tags: Mapping[str, str]
    zones: tuple[str, ...]
    ports: tuple[Port, ...]


@dataclass(frozen=True, slots=True)
class Leg:
    """One of a lane's two ports. ``interface`` is its OVS port, ``device`` its end in the service host.

    ``ofport`` is 0 while the switch does not have the port.
    """

    interface: str
    device: str
    ofport: int = 0


@dataclass(frozen=True, slots=True)
class Lane:
    """Profile -> VLAN -> queues -> engine. Leg A takes requests, leg B answers.

    ``queues`` are the NFQUEUE numbers of its engine. ``leg_c``: by it frames come back whose connection
    the engine lets go (see `Shortcut`); without it no connection of this lane ever takes a shortcut.
    """

    number: int
    profile: Profile
    vlan: int
    queues: tuple[int, ...]
    leg_a: Leg
    leg_b: Leg
    leg_c: Leg | None = None

    @property
    def legs(self) -> tuple[Leg, ...]:
        """Two, and the third where there is one."""
        return (self.leg_a, self.leg_b, *((self.leg_c,) if self.leg_c is not None else ()))

    @property
    def name(self) -> str:
        return str(self.profile)


@dataclass(frozen=True, slots=True)
class Holding:
    """A VM held an address from ``since`` until ``until`` (None: still), as ARP or ND showed."""

    address: str
    vm_id: str
    since: float
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """What was seen of the switch at one moment; the input of every decision about it.

    ``lanes`` have their legs' ofports filled in; ``problems`` are things that no policy can mend
    (two ports with one MAC, a missing leg), each a sentence. ``canary`` is the ofport of Hairpin's own
    port, 0 where there is none. ``ghosts`` are ports that were steered and are gone, or can't be told from
    another now; without a ``vm_id`` where only the MAC is remembered.
    """

    ports: tuple[Port, ...] = ()
    lanes: tuple[Lane, ...] = ()
    problems: tuple[str, ...] = ()
    canary: int = 0
    ghosts: tuple[Port, ...] = ()
