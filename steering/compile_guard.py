"""The flows that hold a sender to who it is, note which addresses it claims, and keep out who is gone."""

from __future__ import annotations

from collections.abc import Sequence

from steering.compile_addresses import ABSENT, add_own_addresses
from steering.flows import IP_KEYWORDS, FlowBook, build_match, go_to
from steering.model import Port
from steering.pipeline import ADDRESS_IDLE_SECONDS, ADDRESS_LIMIT, CookieKind, Table, build_cookie


def add_guard(book: FlowBook, port: Port, addresses: Sequence[str], *, strict: bool) -> None:
    """A port in scope sends from its own MAC only; a port out of scope is left as it was.

    If it was told which ``addresses`` are its own (none: any may be), it claims and sends from these only.

    What ARP and ND say is noted for both, and nobody may use the MAC of a port in scope.
    """
    cookie = build_cookie(CookieKind.PORT, port.ofport)
    spoof = build_cookie(CookieKind.SPOOF, port.ofport)
    here, mac = port.ofport, port.mac
    note = go_to(Table.LEARN, Table.DIRECT)
    table = Table.GUARD
    if not strict:
        book.add(table, 60, build_match("arp", in_port=here), note, cookie)
        for kind in (135, 136):
            book.add(table, 60, build_match("icmp6", in_port=here, icmp_type=kind), note, cookie)
        return
    tagged = build_cookie(CookieKind.TAGGED, here)
    book.add(table, 200, build_match(in_port=here, vlan_tci="0x1000/0x1000"), "drop", tagged)
    if addresses:
        add_own_addresses(book, port, addresses)
    else:
        arp = build_match("arp", in_port=here, dl_src=mac, arp_sha=mac)
        book.add(table, 150, arp, note, cookie)
        for kind, option in ((135, "nd_sll"), (136, "nd_tll")):
            for stated in (mac, ABSENT):
                fields = {"dl_src": mac, option: stated}
                match = build_match("icmp6", in_port=here, icmp_type=kind, **fields)
                book.add(table, 150, match, note, cookie)
    book.add(table, 140, build_match("arp", in_port=here), "drop", spoof)
    for kind in (135, 136):
        book.add(table, 140, build_match("icmp6", in_port=here, icmp_type=kind), "drop", spoof)
    own = build_match(in_port=here, dl_src=mac)
    book.add(table, 100, own, go_to(Table.LEARN, Table.ENDPOINT), cookie)
    book.add(table, 90, build_match(in_port=here), "drop", spoof)
    book.add(table, 80, build_match(dl_src=mac), "drop", spoof)


def add_learn(book: FlowBook, port: Port) -> None:
    cookie = build_cookie(CookieKind.PORT, port.ofport)
    here = port.ofport
    learned = build_cookie(CookieKind.ADDRESS, here)

    def learn(family: str, source: str, target: str, into: Table = Table.ADDRESSES) -> str:
        # OVS writes a field that is matched against itself once.
        matched = target if source == target else f"{target}={source}"
        return (
            f"learn(table={into.number},idle_timeout={ADDRESS_IDLE_SECONDS},"
            f"cookie={learned:#x},limit={ADDRESS_LIMIT},{family},{matched},"
            f"load:NXM_OF_IN_PORT[]->NXM_NX_REG0[0..15])"
        )

    v4 = learn("eth_type=0x800", "NXM_OF_ARP_SPA[]", "NXM_OF_IP_SRC[]")
    target = learn("eth_type=0x86dd", "NXM_NX_ND_TARGET[]", "NXM_NX_IPV6_SRC[]")
    source = learn("eth_type=0x86dd", "NXM_NX_IPV6_SRC[]", "NXM_NX_IPV6_SRC[]")
    # An ARP probe (RFC 5227) and a duplicate address detection (RFC 4862) ask, they do not claim.
    table = Table.LEARN
    book.add(table, 110, build_match("arp", in_port=here, arp_spa="0.0.0.0"), "drop", cookie)  # noqa: S104
    book.add(table, 100, build_match("arp", in_port=here), v4, cookie)
    solicit = {"in_port": here, "icmp_type": 135}
    book.add(table, 110, build_match("icmp6", ipv6_src="::", **solicit), "drop", cookie)
    book.add(table, 100, build_match("icmp6", **solicit), source, cookie)
    book.add(table, 100, build_match("icmp6", in_port=here, icmp_type=136), target, cookie)
    # What a VM in scope sends from counts where nobody claimed it: a warm neighbour cache asks nothing.
    for keyword, field, unset in (("ip", "nw_src", "0.0.0.0"), ("ipv6", "ipv6_src", "::")):  # noqa: S104
        name = "NXM_OF_IP_SRC[]" if keyword == "ip" else "NXM_NX_IPV6_SRC[]"
        family = "eth_type=0x800" if keyword == "ip" else "eth_type=0x86dd"
        uses = learn(family, name, name, Table.USES)
        book.add(table, 60, build_match(keyword, in_port=here, **{field: unset}), "drop", cookie)
        book.add(table, 50, build_match(keyword, in_port=here), uses, cookie)


def add_ghost(book: FlowBook, mac: str) -> None:
    """Nothing from or to the MAC of a VM in scope whose port is gone, until its flows are there again.

    Else NORMAL would carry its packets uninspected between its port's return and ours noticing it. In SENDER and
    RECEIVER too: while the switch renews its datapath flows, packets come there that passed GUARD as before.
    """
    cookie = build_cookie(CookieKind.GHOST)
    for table, priority in ((Table.GUARD, 80), (Table.SENDER, 110)):
        book.add(table, priority, build_match(dl_src=mac), "drop", cookie)
    for table, priority in ((Table.ENDPOINT, 95), (Table.RECEIVER, 100)):
        book.add(table, priority, build_match(dl_dst=mac), "drop", cookie)


def add_many(book: FlowBook) -> None:
    """Frames for many go direct, and are counted; only unicast IP in one is dropped.

    It would be flooded past every policy, and UDP takes it. Passed: multicast, the limited broadcast, and
    what looks like a subnet's (host part all ones in /26 or wider).
    """
    many = "01:00:00:00:00:00/01:00:00:00:00:00"
    direct, counted = go_to(Table.DIRECT), build_cookie(CookieKind.MANY)
    for passed in ("224.0.0.0/4", "255.255.255.255", "0.0.0.63/0.0.0.63"):
        match = build_match("ip", dl_dst=many, nw_dst=passed)
        book.add(Table.ENDPOINT, 90, match, direct, counted)
    multicast = build_match("ipv6", dl_dst=many, ipv6_dst="ff00::/8")
    book.add(Table.ENDPOINT, 90, multicast, direct, counted)
    stray = build_cookie(CookieKind.STRAY)
    for keyword in IP_KEYWORDS:
        book.add(Table.ENDPOINT, 80, build_match(keyword, dl_dst=many), "drop", stray)
    book.add(Table.ENDPOINT, 60, build_match(dl_dst=many), direct, counted)
