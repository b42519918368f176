"""(policies, machines, lanes) -> flows and groups. Pure; `docs/pipeline.md` walks the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from steering.decide import find_lane
from steering.flows import (
    FlowBook,
    Group,
    Program,
    build_match,
    build_port_matches,
    render_number,
)
from steering.membership import Membership, build_membership
from steering.model import (
    Action,
    Deny,
    Direct,
    Family,
    Inspect,
    Lane,
    Machine,
    OnFailure,
    Policy,
    PolicySet,
    Port,
    Profile,
    Protocol,
)
from steering.pipeline import (
    ADDRESS_IDLE_SECONDS,
    ADDRESS_LIMIT,
    CT_ZONE,
    DELIVER_GROUP,
    CookieKind,
    Direction,
    Register,
    Table,
    build_conjunction_id,
    build_cookie,
    build_group_id,
    build_policy_number,
    build_policy_priority,
    build_steer_key,
)

BASE = build_cookie(CookieKind.BASE)
NETWORK, DIRECTION = Register.NETWORK.value, Register.DIRECTION.value
STEER, DESTINATION = Register.STEER.value, Register.DESTINATION.value

# (family keyword, its TCP, UDP, SCTP and ICMP keywords), as OVS writes them.
KEYWORDS = {
    Family.IPV4: {
        Protocol.ANY: "ip",
        Protocol.TCP: "tcp",
        Protocol.UDP: "udp",
        Protocol.SCTP: "sctp",
        Protocol.ICMP: "icmp",
    },
    Family.IPV6: {
        Protocol.ANY: "ipv6",
        Protocol.TCP: "tcp6",
        Protocol.UDP: "udp6",
        Protocol.SCTP: "sctp6",
        Protocol.ICMP: "icmp6",
    },
}
IP_KEYWORDS = tuple(KEYWORDS[family][Protocol.ANY] for family in Family)
TCP_KEYWORDS = tuple(KEYWORDS[family][Protocol.TCP] for family in Family)


def go_to(*tables: Table) -> str:
    return ",".join(f"resubmit(,{table.number})" for table in tables)


def set_register(register: str, value: int) -> str:
    return f"set_field:{render_number(value)}->{register}"


def find_ports_in_scope(
    policies: PolicySet, machines: Sequence[Machine], membership: Membership
) -> frozenset[int]:
    """The ofports of every VM that some policy names; only their packets meet more than GUARD."""
    members: set[str] = set()
    for policy in policies.policies:
        members |= membership.find_members((*policy.sources, *policy.destinations))
    return frozenset(
        port.ofport for machine in machines if machine.vm_id in members for port in machine.ports
    )


def find_duplicate_macs(ports: Sequence[Port]) -> frozenset[str]:
    seen: set[str] = set()
    twice: set[str] = set()
    for port in ports:
        (twice if port.mac in seen else seen).add(port.mac)
    return frozenset(twice)


def find_usable_ports(machines: Sequence[Machine]) -> tuple[Port, ...]:
    """Ports that can be steered: in the switch, with a MAC that no other port has; by ofport."""
    ports = [port for machine in machines for port in machine.ports if port.ofport > 0]
    twice = find_duplicate_macs(ports)
    return tuple(sorted((p for p in ports if p.mac not in twice), key=lambda port: port.ofport))


def compile_program(
    policies: PolicySet, machines: Sequence[Machine], lanes: Sequence[Lane]
) -> Program:
    """Everything that Hairpin wants in the switch for these policies, VMs and lanes.

    A lane whose legs the switch lacks gets no flows of its own; what must go through it then meets
    a group without buckets that can take it: dropped when closed, delivered when open.
    """
    book = FlowBook()
    ports = find_usable_ports(machines)
    membership = build_membership(policies.zones, machines)
    in_scope = find_ports_in_scope(policies, machines, membership)
    owners = {port.ofport: machine.vm_id for machine in machines for port in machine.ports}
    scoped = tuple(port for port in ports if port.ofport in in_scope)
    _add_base(book)
    _add_legs(book, lanes)
    for port in ports:
        _add_classify(book, port)
        _add_learn(book, port)
        _add_guard(book, port, strict=port.ofport in in_scope)
        # For every port: frames that are in a lane when their VM leaves all policies still arrive.
        cookie = build_cookie(CookieKind.PORT, port.ofport)
        book.add(Table.DELIVER, 100, build_match(dl_dst=port.mac), f"output:{port.ofport}", cookie)
    for port in scoped:
        _add_destination(book, port)
    if scoped:
        _add_connection(book, scoped)
        _add_strays(book)
    for policy in policies.policies:
        openers = _find_ofports(scoped, owners, membership.find_members(policy.sources))
        answerers = _find_ofports(scoped, owners, membership.find_members(policy.destinations))
        if openers and answerers:
            _add_policy(book, policy, openers, answerers, lanes)
    groups = tuple(_build_groups(lanes)) if lanes else ()
    _add_steer(book, lanes)
    return Program(tuple(book.flows()), groups)


def _add_base(book: FlowBook) -> None:
    # Priority 1, not 0: an administrator's own `priority=0 actions=NORMAL` stays and does not clash.
    book.add(Table.CLASSIFY, 1, "", go_to(Table.GUARD), BASE)
    for table in (Table.GUARD, Table.ENDPOINT):
        book.add(table, 0, "", go_to(Table.DIRECT), BASE)
    book.add(Table.DIRECT, 0, "", "NORMAL", BASE)
    for table in (Table.RETURN, Table.DELIVER):
        book.add(table, 0, "", "drop", BASE)


def _add_legs(book: FlowBook, lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        cookie = build_cookie(CookieKind.LANE, lane.number)
        # A lane's VLAN is its own: NORMAL would carry such a frame of a trunk port into the legs.
        book.add(Table.CLASSIFY, 290, build_match(dl_vlan=lane.vlan), "drop", cookie)
        for leg in (lane.leg_a, lane.leg_b):
            if leg.ofport <= 0:
                continue
            book.add(
                Table.CLASSIFY, 300, build_match(in_port=leg.ofport), go_to(Table.RETURN), cookie
            )
            book.add(
                Table.RETURN,
                100,
                build_match(in_port=leg.ofport, dl_vlan=lane.vlan),
                f"pop_vlan,{go_to(Table.DELIVER)}",
                cookie,
            )


def _add_classify(book: FlowBook, port: Port) -> None:
    book.add(
        Table.CLASSIFY,
        200,
        build_match(in_port=port.ofport),
        f"{set_register(NETWORK, port.tag or 0)},{go_to(Table.GUARD)}",
        build_cookie(CookieKind.PORT, port.ofport),
    )


def _add_guard(book: FlowBook, port: Port, *, strict: bool) -> None:
    """A port in scope sends from its own MAC only; a port out of scope is left as it was.

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
    none = "00:00:00:00:00:00"
    for protocol, fields in (
        ("arp", {"arp_sha": mac}),
        ("icmp6", {"icmp_type": 135, "nd_sll": mac}),
        ("icmp6", {"icmp_type": 135, "nd_sll": none}),  # the option is absent
        ("icmp6", {"icmp_type": 136, "nd_tll": mac}),
        ("icmp6", {"icmp_type": 136, "nd_tll": none}),
    ):
        match = build_match(protocol, in_port=here, dl_src=mac, **fields)
        book.add(table, 150, match, note, cookie)
    book.add(table, 140, build_match("arp", in_port=here), "drop", spoof)
    for kind in (135, 136):
        book.add(table, 140, build_match("icmp6", in_port=here, icmp_type=kind), "drop", spoof)
    own = build_match(in_port=here, dl_src=mac)
    book.add(table, 100, own, go_to(Table.LEARN, Table.ENDPOINT), cookie)
    book.add(table, 90, build_match(in_port=here), "drop", spoof)
    book.add(table, 80, build_match(dl_src=mac), "drop", spoof)


def _add_learn(book: FlowBook, port: Port) -> None:
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


def _add_destination(book: FlowBook, port: Port) -> None:
    cookie = build_cookie(CookieKind.PORT, port.ofport)
    for keyword in IP_KEYWORDS:
        book.add(
            Table.ENDPOINT,
            100,
            build_match(keyword, reg0=render_number(port.tag or 0), dl_dst=port.mac),
            f"{set_register(DESTINATION, port.ofport)},{go_to(Table.CONNECTION)}",
            cookie,
        )


def _add_strays(book: FlowBook) -> None:
    """Unicast IP in a frame for many would be flooded past every policy, and UDP takes it.

    Passed: multicast, the limited broadcast, and what looks like a subnet's (host part all ones in
    /26 or wider).
    """
    many = "01:00:00:00:00:00/01:00:00:00:00:00"
    direct, stray = go_to(Table.DIRECT), build_cookie(CookieKind.STRAY)
    for passed in ("224.0.0.0/4", "255.255.255.255", "0.0.0.63/0.0.0.63"):
        match = build_match("ip", dl_dst=many, nw_dst=passed)
        book.add(Table.ENDPOINT, 90, match, direct, BASE)
    book.add(
        Table.ENDPOINT, 90, build_match("ipv6", dl_dst=many, ipv6_dst="ff00::/8"), direct, BASE
    )
    for keyword in IP_KEYWORDS:
        book.add(Table.ENDPOINT, 80, build_match(keyword, dl_dst=many), "drop", stray)


def _add_connection(book: FlowBook, ports: Sequence[Port]) -> None:
    """Ask conntrack who opened the connection. Without an answer (midstream), both are assumed.

    A connection carries the port that opened it as its mark, and the answer counts only if it is the
    sender's or the receiver's: conntrack knows addresses alone, and a VM that forges the other end's
    could otherwise open a connection in its name and pass its own packets off as answers.
    """

    def policy(direction: Direction) -> str:
        return f"{set_register(DIRECTION, direction)},{go_to(Table.POLICY)}"

    mark = "exec(move:NXM_OF_IN_PORT[]->NXM_NX_CT_MARK[0..15])"
    commit = f"ct(commit,zone={CT_ZONE},{mark})"
    table = Table.CONNECTION
    for port in ports:
        cookie, number = build_cookie(CookieKind.PORT, port.ofport), render_number(port.ofport)
        opener = build_match(ct_state="+est-rel-rpl-inv+trk", ct_mark=number, in_port=port.ofport)
        answer = build_match(ct_state="+est-rel+rpl-inv+trk", ct_mark=number, reg6=number)
        book.add(table, 90, opener, policy(Direction.OPENER), cookie)
        book.add(table, 90, answer, policy(Direction.ANSWER), cookie)
    for ip, tcp in zip(IP_KEYWORDS, TCP_KEYWORDS, strict=True):
        ask = f"ct(table={table.number},zone={CT_ZONE})"
        book.add(table, 100, build_match(ip, ct_state="-trk"), ask, BASE)
        syn = build_match(tcp, ct_state="+new-inv+trk", tcp_flags="+syn-ack")
        book.add(table, 90, syn, f"{commit},{policy(Direction.OPENER)}", BASE)
        midstream = build_match(tcp, ct_state="+new-inv+trk")
        book.add(table, 80, midstream, policy(Direction.UNKNOWN), BASE)
        first = build_match(ip, ct_state="+new-rel-inv+trk")
        book.add(table, 70, first, policy(Direction.GUESS), BASE)
        book.add(
            Table.COMMIT, 100, build_match(ip, reg1="0x5"), f"{commit},{go_to(Table.STEER)}", BASE
        )
    book.add(table, 0, "", policy(Direction.UNKNOWN), BASE)
    book.add(Table.COMMIT, 0, "", go_to(Table.STEER), BASE)
    again = f"{set_register(DIRECTION, Direction.GUESS_ANSWER)},{go_to(Table.POLICY)}"
    book.add(Table.POLICY, 1, build_match(reg1="0x5"), again, BASE)
    book.add(Table.POLICY, 0, "", go_to(Table.DIRECT), BASE)


def _find_ofports(
    ports: Sequence[Port], owners: Mapping[int, str], members: frozenset[str]
) -> tuple[int, ...]:
    return tuple(port.ofport for port in ports if owners[port.ofport] in members)


def _add_policy(
    book: FlowBook,
    policy: Policy,
    openers: Sequence[int],
    answerers: Sequence[int],
    lanes: Sequence[Lane],
) -> None:
    """A policy as two conjunctions (ovs-fields(7)): what its opener sends, and what answers.

    Clauses: from a port of these, to a port of those, of one of the services. So the flows grow with
    the number of VMs, not of pairs.
    """
    number = build_policy_number(policy.name)
    cookie = build_cookie(CookieKind.POLICY, number)
    priority = build_policy_priority(policy)
    strict = _find_strict_action(policy, lanes)
    # Policy names have no slash, so this number is nobody's name.
    parts = [(number, policy.action, False)]
    if isinstance(policy.action, Inspect):
        apart = strict != policy.action
        parts.append(
            (build_policy_number(f"{policy.name}/fragments") if apart else number, strict, True)
        )
    for answer in (False, True):
        senders, receivers = (answerers, openers) if answer else (openers, answerers)
        for part, action, fragments in parts:
            matches = tuple(_build_service_matches(policy, answer=answer, fragments=fragments))
            if not matches:
                continue
            conjunction = build_conjunction_id(part, answer=answer)
            clauses = (
                *((build_match(in_port=ofport), 1) for ofport in senders),
                *((build_match(reg6=render_number(ofport)), 2) for ofport in receivers),
                *((match, 3) for match in matches),
            )
            for match, dimension in clauses:
                clause = f"conjunction({conjunction},{dimension}/3)"
                book.add_clause(Table.POLICY, priority, match, clause, cookie)
            verdict = _build_verdict(action, lanes, answer=answer)
            book.add(Table.POLICY, priority, build_match(conj_id=conjunction), verdict, cookie)


def _find_strict_action(policy: Policy, lanes: Sequence[Lane]) -> Action:
    """How a policy's fragments are inspected: in the lane that prevents, where there is one.

    A fragment may not tell its port or even its protocol, so the policy that takes it need not be the
    one of its connection: cutting packets up must not lead from prevention to mere detection.
    """
    action = policy.action
    if isinstance(action, Inspect) and find_lane(lanes, Profile.PREVENT) is not None:
        return replace(action, profile=Profile.PREVENT)
    return action


def _build_verdict(action: Action, lanes: Sequence[Lane], *, answer: bool) -> str:
    match action:
        case Deny():
            return "drop"
        case Direct():
            return f"{set_register(STEER, 0)},{go_to(Table.COMMIT)}"
        case Inspect(profile=profile, on_failure=on_failure):
            lane = find_lane(lanes, profile)
            if lane is None:
                # Refused before it comes here; if it does, an inspect policy never becomes direct.
                return "drop"
            key = build_steer_key(lane, on_failure, answer=answer)
            return f"{set_register(STEER, key)},{go_to(Table.COMMIT)}"


def _build_direction_match(policy: Policy, *, answer: bool) -> str:
    """What inspects also takes packets of unknown direction; what passes directly never does.

    A deny takes them as the opener's: rather a broken midstream connection than a denied one alive.
    A guessed answer (bit 3, see Direction) is for what inspects only.
    """
    bit = 0x2 if answer else 0x1
    lenient = isinstance(policy.action, Inspect) or (isinstance(policy.action, Deny) and not answer)
    return f"{bit:#x}/{bit:#x}" if lenient else f"{bit:#x}/0xb"


def _build_service_matches(policy: Policy, *, answer: bool, fragments: bool) -> Iterator[str]:
    """Matches of the service clause; with ``fragments``, those that take an inspecting policy's.

    Later fragments carry no ports, and in IPv6 not even the protocol (OVS gives 44), so a datagram's
    fragments must be decided alike: what inspects a part of IP takes all fragments that may be of it,
    what passes a part of IP directly takes none.
    """
    direction = _build_direction_match(policy, answer=answer)
    field = "tp_src" if answer else "tp_dst"
    apart = not isinstance(policy.action, Deny)  # fragments have a clause of their own, or none
    for family in policy.families:
        for service in policy.services:
            keyword = KEYWORDS[family][service.protocol]
            every = not service.ports or any(
                piece.first == 0 and piece.last == 0xFFFF for piece in service.ports
            )
            told = every and (family is Family.IPV4 or service.protocol is Protocol.ANY)
            if fragments:
                if not told:
                    any_of = keyword if family is Family.IPV4 else KEYWORDS[family][Protocol.ANY]
                    yield build_match(any_of, reg1=direction, nw_frag="yes")
                continue
            whole = {"nw_frag": "no"} if apart and not told else {}
            if every:
                yield build_match(keyword, reg1=direction, **whole)
                continue
            for piece in service.ports:
                for ports in build_port_matches(piece.first, piece.last):
                    yield build_match(keyword, reg1=direction, **whole, **{field: ports})


def _add_steer(book: FlowBook, lanes: Sequence[Lane]) -> None:
    book.add(Table.STEER, 100, build_match(reg2="0"), go_to(Table.DIRECT), BASE)
    for lane in lanes:
        cookie = build_cookie(CookieKind.LANE, lane.number)
        for on_failure in OnFailure:
            for answer in (False, True):
                key = build_steer_key(lane, on_failure, answer=answer)
                match = build_match(reg2=render_number(key))
                book.add(Table.STEER, 100, match, f"group:{build_group_id(key)}", cookie)


def _build_groups(lanes: Sequence[Lane]) -> Iterator[Group]:
    """Fast failover in the switch itself: first bucket while BFD through the engine is up, then, if

    open, delivery without inspection. It needs no controller (ovs-vswitchd.conf.db(5), BFD).
    """
    yield Group(DELIVER_GROUP, "all", (f"actions={go_to(Table.DELIVER)}",))
    for lane in lanes:
        for on_failure in OnFailure:
            for answer in (False, True):
                leg = lane.leg_b if answer else lane.leg_a
                buckets: list[str] = []
                if leg.ofport > 0:
                    buckets.append(
                        f"watch_port:{leg.ofport},actions=push_vlan:0x8100,"
                        f"set_field:{0x1000 | lane.vlan}->vlan_vid,output:{leg.ofport}"
                    )
                if on_failure is OnFailure.OPEN:
                    buckets.append(f"watch_group:{DELIVER_GROUP},actions={go_to(Table.DELIVER)}")
                key = build_steer_key(lane, on_failure, answer=answer)
                yield Group(build_group_id(key), "ff", tuple(buckets))
