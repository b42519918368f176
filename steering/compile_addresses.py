"""The flows that hold addresses to the VMs that the documents give them to.

Who an address is given to, is told by ARP and ND everywhere on the switch, and by what VMs in scope send.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_address

from steering.flows import FlowBook, build_match, go_to
from steering.model import Port
from steering.pipeline import CookieKind, Table, build_cookie

ABSENT = "00:00:00:00:00:00"  # how OVS shows an ND option that is not there
LINK_LOCAL = "fe80::/10"
UNSET4, UNSET6 = "0.0.0.0", "::"  # noqa: S104 - no address is bound here


def is_ipv4(address: str) -> bool:
    return ip_address(address).version == 4


def _build_claims(address: str) -> Iterator[tuple[str, dict[str, str | int]]]:
    """Protocol and fields of each packet that says whose MAC the address is at."""
    if is_ipv4(address):
        yield "arp", {"arp_spa": address}
    else:
        yield "icmp6", {"icmp_type": 135, "ipv6_src": address}
        yield "icmp6", {"icmp_type": 136, "nd_target": address}


def add_holder(book: FlowBook, address: str, holder: Port) -> None:
    """Nobody claims the address but the ports for which `add_own_claims` stands. ``holder`` counts it."""
    cookie = build_cookie(CookieKind.CLAIM, holder.ofport)
    for protocol, fields in _build_claims(address):
        book.add(Table.GUARD, 160, build_match(protocol, **fields), "drop", cookie)


def add_own_claims(book: FlowBook, port: Port, address: str, *, strict: bool) -> None:
    """The port claims the address; in scope (``strict``) it does so from its own MAC only."""
    cookie = build_cookie(CookieKind.PORT, port.ofport)
    note = go_to(Table.LEARN, Table.DIRECT)
    for protocol, fields in _build_claims(address):
        for stated in _build_statements(port, fields) if strict else ({},):
            match = build_match(protocol, in_port=port.ofport, **fields, **stated)
            book.add(Table.GUARD, 170, match, note, cookie)


def _build_statements(port: Port, fields: dict[str, str | int]) -> Iterator[dict[str, str | int]]:
    """What a true claim says of the claimer's MAC, in the frame and in the packet."""
    mac = port.mac
    if "icmp_type" not in fields:
        yield {"dl_src": mac, "arp_sha": mac}
        return
    option = "nd_sll" if fields["icmp_type"] == 135 else "nd_tll"
    for stated in (mac, ABSENT):
        yield {"dl_src": mac, option: stated}


def add_own_addresses(book: FlowBook, port: Port, addresses: Sequence[str]) -> None:
    """A port in scope claims by ARP and ND, and sends from, these addresses and no others.

    Besides: what asks whether an address is free, what asks for one, and IPv6's link-local addresses.
    """
    cookie = build_cookie(CookieKind.PORT, port.ofport)
    spoof = build_cookie(CookieKind.SPOOF, port.ofport)
    note, on = go_to(Table.LEARN, Table.DIRECT), go_to(Table.LEARN, Table.ENDPOINT)
    own: dict[str, str | int] = {"in_port": port.ofport, "dl_src": port.mac}
    free: list[tuple[str, dict[str, str | int]]] = [("arp", {"arp_spa": UNSET4})]
    free += [("icmp6", {"icmp_type": 135, "ipv6_src": source}) for source in (UNSET6, LINK_LOCAL)]
    free += [("icmp6", {"icmp_type": 136, "nd_target": LINK_LOCAL})]
    for protocol, fields in free:
        for stated in _build_statements(port, fields):
            match = build_match(protocol, in_port=port.ofport, **fields, **stated)
            book.add(Table.GUARD, 150, match, note, cookie)
    dhcp = build_match("udp", nw_src=UNSET4, tp_src=68, tp_dst=67, **own)
    book.add(Table.GUARD, 120, dhcp, on, cookie)
    asking = build_match("icmp6", ipv6_src=UNSET6, **own)  # for routers, and multicast reports
    book.add(Table.GUARD, 120, asking, on, cookie)
    local = build_match("ipv6", ipv6_src=LINK_LOCAL, **own)
    book.add(Table.GUARD, 120, local, on, cookie)
    for address in addresses:
        protocol, field = ("ip", "nw_src") if is_ipv4(address) else ("ipv6", "ipv6_src")
        match = build_match(protocol, **{field: address}, **own)
        book.add(Table.GUARD, 120, match, on, cookie)
    for protocol in ("ip", "ipv6"):
        match = build_match(protocol, in_port=port.ofport)
        book.add(Table.GUARD, 110, match, "drop", spoof)
