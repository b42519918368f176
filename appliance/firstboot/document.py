"""The seed, declared once: what an appliance is told at its first boot. `docs/first-boot.md` is made from here.

One document, read strictly: unknown keys, keys given twice and values of another type are refused, all at
once. What the settings file also has (rules, store) is declared there and taken over as it is.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from appliance.settings import RulesSettings, StoreSettings
from appliance.settings_values import Document, InterfaceName, Name, PortNumber, QueueNumber, Vlan
from steering.model import Profile

PEM_LIMIT = 64 * 1024
DEFAULT_PORT = 8470
TOKEN_VARIETY = 8
"""Different characters in a token: of 32 random hexadecimal digits there are about 14."""
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")
TOKEN_LENGTH = 32
"""Characters that a token has at least: longer text is never shown, wherever it stands."""


def _normalise_mac(text: str) -> str:
    if int(text[:2], 16) & 1:
        raise ValueError("a group's address, not a device's")
    return text.lower()


def _check_pem(text: str) -> str:
    if not text.lstrip().startswith("-----BEGIN "):
        raise ValueError("not PEM: it must begin with -----BEGIN")
    return text


def _check_connection(text: str) -> str:
    address, _, port = text.removeprefix("ssl:").rpartition(":")
    _check_address(address.strip("[]"))
    if not 1 <= int(port) <= 65535:
        raise ValueError("the port is not one of 1 to 65535")
    return text


Mac = Annotated[
    str,
    Field(pattern=r"^([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}$"),
    AfterValidator(_normalise_mac),
]
ApiPort = Annotated[int, Field(ge=1024, le=65535)]
Pem = Annotated[str, Field(max_length=PEM_LIMIT), AfterValidator(_check_pem)]
RemoteConnection = Annotated[
    str,
    Field(pattern=r"^ssl:(\[[0-9A-Fa-f:]+\]|[0-9.]+):[0-9]{1,5}$", max_length=64),
    AfterValidator(_check_connection),
]


class ManagementSeed(Document):
    """The one device with an address. Either `address` or `dhcp` is given."""

    mac: Mac = Field(description="The MAC address of the device.", examples=["52:54:00:10:00:01"])
    dhcp: bool = Field(
        default=False, description="Take address, gateway and DNS by DHCP (IPv4).", examples=[True]
    )
    address: str | None = Field(
        default=None,
        max_length=64,
        description="The address with its prefix length, IPv4 or IPv6.",
        examples=["192.0.2.10/24"],
    )
    gateway: str | None = Field(
        default=None,
        max_length=64,
        description="The router, in the same network (IPv6: or a link-local address); none: only that "
        "network is reached.",
        examples=["192.0.2.1"],
    )
    dns: tuple[Annotated[str, Field(max_length=64)], ...] = Field(
        default=(),
        max_length=4,
        description="DNS servers' addresses.",
        examples=[["192.0.2.53"]],
    )

    @field_validator("address")
    @classmethod
    def _address_is_a_hosts(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if "/" not in value:
            raise ValueError("without a prefix length")
        try:
            found = ipaddress.ip_interface(value)
        except ValueError as fault:
            raise ValueError("not an IP address with its prefix length") from fault
        if getattr(found, "scope_id", None) or getattr(found.ip, "ipv4_mapped", None):
            # What follows a `%` may be any text, and would stand in networkd's file.
            raise ValueError("not an address that a host can be reached by")
        network = found.network
        ends = network.prefixlen < network.max_prefixlen - 1 and found.ip in (
            network.network_address,
            *([network.broadcast_address] if found.version == 4 else []),
        )
        odd = found.is_multicast or found.is_loopback or found.is_unspecified or ends
        nobodys = found.version == 4 and (found.is_reserved or found.ip in _THIS_NETWORK)
        if odd or nobodys or found.is_link_local or not network.prefixlen:
            raise ValueError("not an address that a host can be reached by")
        return str(found)

    @field_validator("gateway")
    @classmethod
    def _gateway_is_an_address(cls, value: str | None) -> str | None:
        return None if value is None else _check_address(value)

    @field_validator("dns")
    @classmethod
    def _servers_are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_check_address(one) for one in value)

    @model_validator(mode="after")
    def _one_way_to_an_address(self) -> ManagementSeed:
        if self.dhcp == (self.address is not None):
            raise ValueError("give either `address` or `dhcp: true`")
        if self.dhcp and (self.gateway is not None or self.dns):
            raise ValueError("`gateway` and `dns` come by DHCP: leave them out")
        if self.address is not None and self.gateway is not None:
            own, gateway = ipaddress.ip_interface(self.address), ipaddress.ip_address(self.gateway)
            local = gateway.version == 6 and gateway.is_link_local
            if own.version != gateway.version or (gateway not in own.network and not local):
                raise ValueError(f"the gateway is not in {own.network}")
            if (
                own.version == 4
                and own.network.prefixlen < 31
                and gateway
                in (
                    own.network.network_address,
                    own.network.broadcast_address,
                )
            ):
                raise ValueError("the gateway is no host's address")
            if gateway == own.ip:
                raise ValueError("the gateway has the appliance's own address")
        return self


def _check_address(value: str) -> str:
    try:
        found = ipaddress.ip_address(value)
    except ValueError as fault:
        raise ValueError("not an IP address") from fault
    nobodys = found.version == 4 and (found.is_reserved or found in _THIS_NETWORK)
    if nobodys or found.is_multicast or found.is_unspecified or getattr(found, "scope_id", None):
        raise ValueError("not the address of a host")
    return str(found)


class ApiSeed(Document):
    """Who may manage the appliance, and how it proves who it is. It is served by HTTPS only."""

    token: str = Field(
        pattern=rf"^[A-Za-z0-9._~+/-]{{{TOKEN_LENGTH},512}}=*$",
        repr=False,
        description="The bearer token of the management API, 32 characters or more; or the credential "
        "`hairpin.token`.",
        examples=["(as `openssl rand -hex 32` prints it)"],
    )
    port: ApiPort = Field(
        default=DEFAULT_PORT,
        description="TCP port to listen on; not below 1024, since the service has no privilege.",
        examples=[DEFAULT_PORT],
    )
    certificate: Pem | None = Field(
        default=None,
        description="Its certificate and those between it and the authority that clients know. None: the "
        "appliance makes one by itself, keeps it, and shows its fingerprint on the console.",
        examples=["(PEM)"],
    )
    key: Pem | None = Field(
        default=None,
        repr=False,
        description="The certificate's private key, not encrypted; or the credential `hairpin.api-key`.",
        examples=["(PEM)"],
    )

    @field_validator("token")
    @classmethod
    def _token_is_no_placeholder(cls, value: str) -> str:
        if len(set(value)) < TOKEN_VARIETY:
            raise ValueError("too few different characters for a random token")
        return value

    @model_validator(mode="after")
    def _a_certificate_has_its_key(self) -> ApiSeed:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("`certificate` and `key` are given together or not at all")
        return self


class SwitchSeed(Document):
    """The hypervisor's Open vSwitch, by TLS in both directions (docs/deploy.md)."""

    ovsdb: RemoteConnection = Field(
        description="The OVSDB server, `ssl:ADDRESS:PORT`.", examples=["ssl:192.0.2.2:6640"]
    )
    openflow: RemoteConnection = Field(
        description="The bridge's OpenFlow listener, `ssl:ADDRESS:PORT`.",
        examples=["ssl:192.0.2.2:6653"],
    )
    bridge: InterfaceName = Field(
        default="br-int", description="The integration bridge's name.", examples=["br-int"]
    )
    server_name: str | None = Field(
        default=None,
        alias="serverName",
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$",
        description="The name that the switch's certificate is for; none: the connection's address.",
        examples=["hv-1.example.org"],
    )
    ca: Pem = Field(
        description="The authority that signed the switch's certificate.", examples=["(PEM)"]
    )
    certificate: Pem = Field(
        description="The certificate that the appliance shows to the switch.", examples=["(PEM)"]
    )
    key: Pem = Field(
        repr=False,
        description="Its private key, not encrypted; or the credential `hairpin.switch-key`.",
        examples=["(PEM)"],
    )


class DeviceSeed(Document):
    """A port of the switch and the device in the appliance that is its other end."""

    interface: InterfaceName = Field(
        description="The port's name in Open vSwitch.", examples=["leg-prevent-a"]
    )
    mac: Mac = Field(
        description="The MAC address of the device in the appliance.",
        examples=["52:54:00:10:01:0a"],
    )


class LaneSeed(Document):
    """One lane: an inspection profile with its VLAN and its legs (docs/settings.md, `lanes[]`)."""

    profile: Profile = Field(
        description="What its engine does with what it finds.", examples=["prevent"]
    )
    vlan: Vlan = Field(
        description="Inspected frames carry it between switch and engine.", examples=[101]
    )
    queues: tuple[QueueNumber, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="NFQUEUE numbers in a row; none: an even share of the cores.",
        examples=[[0, 1]],
    )
    leg_a: DeviceSeed = Field(alias="legA", description="One way into the appliance.")
    leg_b: DeviceSeed = Field(alias="legB", description="The other way.")
    leg_c: DeviceSeed | None = Field(
        default=None,
        alias="legC",
        description="For shortcuts (docs/shortcut.md); none: no shortcut.",
    )


class CanarySeed(DeviceSeed):
    """The port by which each lane is proved (docs/proof.md)."""

    every_seconds: int = Field(
        default=30,
        alias="everySeconds",
        ge=1,
        le=3600,
        description="Each lane is proved this often.",
        examples=[30],
    )


class MirrorSeed(Document):
    """The mirror port's device, for flow records."""

    mac: Mac = Field(
        description="The MAC address of the device in the appliance.",
        examples=["52:54:00:10:03:01"],
    )


class ExportSeed(Document):
    """A SIEM that takes alerts as syslog (docs/export.md)."""

    name: Name = Field(description="Its cursor is kept under this name.", examples=["siem"])
    transport: Literal["tcp", "tls"] = Field(
        default="tls", description="`tcp` sends in the clear.", examples=["tls"]
    )
    host: str = Field(
        pattern=r"^[A-Za-z0-9._:-]{1,253}$",
        description="The receiver's name or address.",
        examples=["siem.example.org"],
    )
    port: PortNumber = Field(default=6514, description="The receiver's port.", examples=[6514])
    ca: Pem | None = Field(
        default=None,
        description="The authority that signed its certificate; none: the system's.",
        examples=["(PEM)"],
    )
    certificate: Pem | None = Field(
        default=None, description="Our own certificate, with `key`.", examples=["(PEM)"]
    )
    key: Pem | None = Field(
        default=None, repr=False, description="Its private key.", examples=["(PEM)"]
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> ExportSeed:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("`certificate` and `key` are given together or not at all")
        if self.transport == "tcp" and (self.ca or self.certificate):
            raise ValueError("`ca`, `certificate` and `key` are for the transport tls")
        return self


class SeedDocument(Document):
    """All that an appliance is told. Private keys and the token may come as credentials of their own."""

    api_version: Literal["hairpin/v1"] = Field(
        default="hairpin/v1",
        alias="apiVersion",
        description="The version of this format.",
        examples=["hairpin/v1"],
    )
    kind: Literal["Seed"] = Field(
        default="Seed", description="What the document is.", examples=["Seed"]
    )
    name: Name = Field(
        description="The appliance's name and host name; or the credential `hairpin.name`, or "
        "`local-hostname` in a NoCloud disk's meta-data.",
        examples=["rack-12"],
    )
    management: ManagementSeed = Field(description="The one device with an address.")
    api: ApiSeed = Field(description="The management API.")
    switch: SwitchSeed = Field(description="The switch that is steered.")
    lanes: tuple[LaneSeed, ...] = Field(
        min_length=1, max_length=8, description="At least one; they share nothing."
    )
    canary: CanarySeed | None = Field(
        default=None, description="The proof that each lane inspects; none: health says so."
    )
    visibility: MirrorSeed | None = Field(
        default=None, description="Flow records; none: there are none."
    )
    rules: RulesSettings = Field(
        default_factory=RulesSettings,
        description="As `rules` in the settings file (docs/settings.md).",
    )
    store: StoreSettings = Field(
        default_factory=StoreSettings,
        description="As `store` in the settings file (docs/settings.md).",
    )
    export: tuple[ExportSeed, ...] = Field(
        default=(), max_length=8, description="Receivers of every alert."
    )

    @model_validator(mode="after")
    def _devices_are_distinct(self) -> SeedDocument:
        seen: dict[str, str] = {}
        for path, mac in find_macs(self):
            if mac in seen:
                raise ValueError(f"{path} and {seen[mac]} have the same address {mac}")
            seen[mac] = path
        return self


def find_macs(document: SeedDocument) -> Iterator[tuple[str, str]]:
    """Each device that the seed names: its path and MAC address, the management's first."""
    yield "management.mac", document.management.mac
    for number, lane in enumerate(document.lanes):
        for key, leg in (("legA", lane.leg_a), ("legB", lane.leg_b), ("legC", lane.leg_c)):
            if leg is not None:
                yield f"lanes[{number}].{key}.mac", leg.mac
    if document.canary is not None:
        yield "canary.mac", document.canary.mac
    if document.visibility is not None:
        yield "visibility.mac", document.visibility.mac


SECRET = re.compile(r"(^|\.)(token|key)$")
"""Paths whose values nobody is ever shown."""
