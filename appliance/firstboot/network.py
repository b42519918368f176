"""systemd-networkd's files: one device with an address, all others silent. Pure (systemd.network(5))."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from appliance.firstboot.document import ManagementSeed

_QUIET = {
    "LLMNR": "no",
    "MulticastDNS": "no",
    "LLDP": "no",
    "EmitLLDP": "no",
}
Section = tuple[str, Sequence[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Device:
    """A network device of the appliance; ``mac`` in lower case."""

    name: str
    mac: str


def render_management(management: ManagementSeed, device: Device) -> str:
    """The management network's device. Router advertisements are not taken: they would add routes."""
    network: list[tuple[str, str]] = list(_QUIET.items())
    if management.address is None:
        network += [("DHCP", "ipv4"), ("LinkLocalAddressing", "no"), ("IPv6AcceptRA", "no")]
    else:
        version = ipaddress.ip_interface(management.address).version
        network += [
            ("DHCP", "no"),
            ("LinkLocalAddressing", "ipv6" if version == 6 else "no"),
            ("IPv6AcceptRA", "no"),
            ("Address", management.address),
        ]
        if management.gateway is not None:
            network.append(("Gateway", management.gateway))
        network += [("DNS", server) for server in management.dns]
    sections: list[Section] = [
        ("Match", _match([device])),
        ("Link", [("RequiredForOnline", "routable")]),
        ("Network", network),
    ]
    if management.address is None:
        # The name is the seed's, and a search domain would let the network choose who is meant.
        sections.append(("DHCPv4", [("UseHostname", "no"), ("UseDomains", "no")]))
    return _render("The management network.", sections)


def render_silent(devices: Sequence[Device], *, up: bool) -> str:
    """Devices without an address, that say nothing by themselves. ``up``: networkd puts them up; else
    `hairpin inspect` does, once its rules stand. A master that was set is left alone: it is a lane's bridge."""
    link = [
        ("RequiredForOnline", "no"),
        ("ARP", "no"),
        ("Multicast", "no"),
        ("ActivationPolicy", "up" if up else "manual"),
    ]
    network = [
        *_QUIET.items(),
        ("DHCP", "no"),
        ("LinkLocalAddressing", "no"),
        ("IPv6AcceptRA", "no"),
        ("KeepMaster", "yes"),
        ("ConfigureWithoutCarrier", "yes"),
        ("IgnoreCarrierLoss", "yes"),
    ]
    what = "The mirror port: it only listens." if up else "Legs and canary: no address, no word."
    return _render(what, [("Match", _match(devices)), ("Link", link), ("Network", network)])


def _match(devices: Sequence[Device]) -> list[tuple[str, str]]:
    # By both: a lane's bridge takes the address of one of its legs.
    return [
        ("MACAddress", " ".join(device.mac for device in devices)),
        ("Name", " ".join(device.name for device in devices)),
    ]


def _render(what: str, sections: Sequence[Section]) -> str:
    parts = [f"# {what} Written by `hairpin firstboot` at each boot.\n"]
    for title, lines in sections:
        parts.append(f"\n[{title}]\n" + "".join(f"{key}={value}\n" for key, value in lines))
    return "".join(parts)
