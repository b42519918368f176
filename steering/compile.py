"""(policies, machines, lanes) -> flows and groups. Pure; `docs/pipeline.md` walks the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from steering.classes import NO_CLASS, Classes, build_classes
from steering.compile_addresses import add_holder, add_own_claims
from steering.compile_canary import add_canary, find_canary_macs
from steering.compile_guard import add_ghost, add_guard, add_learn, add_many
from steering.compile_quarantine import add_quarantine
from steering.compile_shortcut import (
    add_origin,
    add_shortcuts,
    build_offer,
    find_shortcuts,
    withhold_shortcut,
)
from steering.compile_steer import add_steer, build_groups
from steering.decide import find_lane, resolve_machines
from steering.flows import (
    IP_KEYWORDS,
    KEYWORDS,
    TCP_KEYWORDS,
    Flow,
    FlowBook,
    Group,
    Piece,
    Program,
    build_match,
    build_port_matches,
    go_to,
    render_number,
    set_register,
)
from steering.last import Last
from steering.membership import Membership, build_membership
from steering.model import (
    Action,
    Deny,
    Direct,
    Family,
    Inspect,
    Lane,
    Machine,
    MachineRecord,
    Observed,
    Peer,
    Policy,
    PolicySet,
    Port,
    Profile,
    Protocol,
    Service,
    Zone,
)
from steering.pipeline import (
    CT_ZONE,
    CookieKind,
    Direction,
    Register,
    Table,
    build_conjunction_id,
    build_cookie,
    build_fragments_number,
    build_policy_number,
    build_policy_priority,
    build_steer_key,
)

BASE = build_cookie(CookieKind.BASE)
NETWORK, DIRECTION = Register.NETWORK.value, Register.DIRECTION.value
STEER, DESTINATION = Register.STEER.value, Register.DESTINATION.value
SENDER, RECEIVER = Register.SENDER_CLASS.value, Register.RECEIVER_CLASS.value
TRIGGER = Register.TRIGGER.value


def find_vms_in_scope(policies: PolicySet, membership: Membership) -> frozenset[str]:
    """The vm-ids that some policy names; only their packets meet more than GUARD."""
    members: set[str] = set()
    for policy in policies.policies:
        members |= membership.find_members((*policy.sources, *policy.destinations))
    return frozenset(members)


def find_duplicate_macs(ports: Sequence[Port]) -> frozenset[str]:
    seen: set[str] = set()
    twice: set[str] = set()
    for port in ports:
        (twice if port.mac in seen else seen).add(port.mac)
    return frozenset(twice)


def find_usable_ports(
    ports: Iterable[Port], reserved: frozenset[str] = frozenset()
) -> tuple[Port, ...]:
    """Ports that can be steered: in the switch, with a MAC that no other port has; by ofport.

    ``reserved`` are MACs that are no VM's.
    """
    there = [port for port in ports if port.ofport > 0 and port.vm_id]
    twice = find_duplicate_macs(there) | reserved
    return tuple(sorted((p for p in there if p.mac not in twice), key=lambda port: port.ofport))


def find_steerable_ports(observed: Observed) -> tuple[Port, ...]:
    """`find_usable_ports` of what was seen."""
    reserved = find_canary_macs(observed.lanes) if observed.canary > 0 else frozenset()
    return find_usable_ports(observed.ports, reserved)


def compile_program(
    policies: PolicySet,
    machines: Sequence[Machine],
    lanes: Sequence[Lane],
    canary: int = 0,
    ghosts: Sequence[Port] = (),
    untaught: frozenset[str] = frozenset(),
) -> Program:
    """Everything that Hairpin wants in the switch for these policies, VMs and lanes.

    A lane whose legs the switch lacks gets no flows of its own; what must go through it then meets
    a group without a way into a lane: dropped when closed, delivered when open. ``canary`` is
    the ofport of Hairpin's own port, 0 without one. ``ghosts`` as in `Observed`: of those that a policy
    names nothing passes, nor of those of present ports that can't be told apart by their MACs.
    ``untaught`` are policies whose connections learn no shortcut for now (see `Hold`).
    """
    reserved = find_canary_macs(lanes) if canary > 0 else frozenset()
    every, ports, owners = _list_ports(tuple(machines), reserved)
    membership = _build_membership(policies.zones, tuple(machines))
    in_scope = find_vms_in_scope(policies, membership)
    scoped = tuple(port for port in ports if owners[port.ofport] in in_scope)
    classes = build_classes(policies.policies, membership, (owners[p.ofport] for p in scoped))
    declared = _find_declared(policies.machines)
    shortcuts = find_shortcuts(policies.policies, lanes, membership)
    base, groups = _compile_base(
        tuple(lanes),
        canary,
        bool(scoped),
        tuple(shortcuts),
        untaught,
        tuple(machines) if policies.quarantined else (),
        policies.quarantined,
    )
    pieces = [
        base,
        *_compile_ports(ports, owners, declared, in_scope, classes.by_vm, bool(shortcuts)),
    ]
    steerable = reserved | {port.mac for port in ports}
    lost = [port for port in (*ghosts, *every) if port.mac not in steerable]
    shut = _find_macs_in_scope(policies, lost) if lost else frozenset()
    pieces += [_compile_ghost(mac) for mac in sorted(shut)]
    away = [replace(port, ofport=0) for port in ghosts if port.mac in shut]
    if declared:
        holders = [port for port in (*away, *ports) if port.vm_id in declared]
        for address, holder in {a: port for port in holders for a in declared[port.vm_id]}.items():
            pieces.append(_compile_holder(address, holder))
    ofports: dict[str, list[int]] = {}
    for port in scoped:
        ofports.setdefault(owners[port.ofport], []).append(port.ofport)
    ranks: dict[int, list[tuple[Policy, _Side, _Side]]] = {}
    offering = frozenset(policy.name for policy in shortcuts)
    for policy in (withhold_shortcut(one, offering) for one in policies.policies):
        openers, answerers = (
            _find_side(peers, membership, classes, ofports)
            for peers in (policy.sources, policy.destinations)
        )
        if openers and answerers:
            rank = build_policy_priority(policy)
            ranks.setdefault(rank, []).append((policy, openers, answerers))
    pieces += [_compile_rank(tuple(of_rank), tuple(lanes)) for of_rank in ranks.values()]
    return Program(groups=groups, pieces=tuple(pieces))


# What was compiled before is remembered: of all ports and policies hardly any is another one than it was.


@Last
def _list_ports(
    machines: tuple[Machine, ...], reserved: frozenset[str]
) -> tuple[tuple[Port, ...], tuple[Port, ...], Mapping[int, str]]:
    """All ports, those that can be steered, and whose each is, by ofport."""
    every = tuple(port for machine in machines for port in machine.ports)
    owners = {port.ofport: machine.vm_id for machine in machines for port in machine.ports}
    return every, find_usable_ports(every, reserved), owners


@Last
def _build_membership(zones: tuple[Zone, ...], machines: tuple[Machine, ...]) -> Membership:
    return build_membership(zones, machines)


@Last
def _find_declared(records: tuple[MachineRecord, ...]) -> Mapping[str, tuple[str, ...]]:
    return {one.vm_id: tuple(one.addresses) for one in records if one.addresses}


@Last
def _compile_base(
    lanes: tuple[Lane, ...],
    canary: int,
    any_scoped: bool,
    shortcuts: tuple[Policy, ...],
    untaught: frozenset[str],
    machines: tuple[Machine, ...],
    quarantined: frozenset[str],
) -> tuple[Piece, tuple[Group, ...]]:
    """What belongs to no port and to no one policy."""
    book = FlowBook()
    _add_base(book)
    _add_legs(book, lanes)
    add_shortcuts(book, shortcuts, lanes, untaught)
    # Always: packets that were in scope a moment ago still come back from conntrack.
    _add_connection(book)
    if any_scoped:
        add_many(book)
    if canary > 0:
        add_canary(book, canary, lanes)
    add_quarantine(book, machines, quarantined)
    add_steer(book, lanes)
    return _keep_piece(tuple(book.flows())), tuple(build_groups(lanes)) if lanes else ()


@lru_cache(maxsize=64)
def _keep_piece(flows: tuple[Flow, ...]) -> Piece:
    return Piece(flows)


@Last
def _compile_ports(
    ports: tuple[Port, ...],
    owners: Mapping[int, str],
    declared: Mapping[str, tuple[str, ...]],
    in_scope: frozenset[str],
    classes: Mapping[str, int],
    shortcuts: bool,
) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for port in ports:
        vm_id = owners[port.ofport]
        strict = vm_id in in_scope
        number = classes.get(vm_id, NO_CLASS) if strict else NO_CLASS
        pieces.append(_compile_port(port, declared.get(vm_id, ()), strict, number, shortcuts))
    return tuple(pieces)


@lru_cache(maxsize=32_768)
def _compile_port(
    port: Port, own: tuple[str, ...], strict: bool, number: int, shortcuts: bool
) -> Piece:
    """A port's own flows; in scope (``strict``) with its VM's class, and where some policy has a shortcut."""
    book = FlowBook()
    _add_classify(book, port)
    add_learn(book, port)
    add_guard(book, port, own, strict=strict)
    for address in own:
        add_own_claims(book, port, address, strict=strict)
    # For every port: frames that are in a lane when their VM leaves all policies still arrive.
    cookie = build_cookie(CookieKind.PORT, port.ofport)
    book.add(Table.DELIVER, 100, build_match(dl_dst=port.mac), f"output:{port.ofport}", cookie)
    if strict:
        _add_destination(book, port, shortcuts=shortcuts)
        _add_port_connection(book, port)
        if shortcuts:
            add_origin(book, port)
        _add_class(book, port, number)
    return Piece(tuple(book.flows()))


@lru_cache(maxsize=4_096)
def _compile_ghost(mac: str) -> Piece:
    book = FlowBook()
    add_ghost(book, mac)
    return Piece(tuple(book.flows()))


@lru_cache(maxsize=32_768)
def _compile_holder(address: str, holder: Port) -> Piece:
    book = FlowBook()
    add_holder(book, address, holder)
    return Piece(tuple(book.flows()))


@lru_cache(maxsize=8_192)
def _compile_rank(
    policies: tuple[tuple[Policy, _Side, _Side], ...], lanes: tuple[Lane, ...]
) -> Piece:
    """The policies whose flows have one priority: they may share clauses."""
    book = FlowBook()
    for policy, openers, answerers in policies:
        _add_policy(book, policy, openers, answerers, lanes)
    return Piece(tuple(book.flows()))


def _find_macs_in_scope(policies: PolicySet, ports: Sequence[Port]) -> frozenset[str]:
    """The MACs of ports that the policies name, and of those of which nothing but the MAC is known."""
    machines = resolve_machines(policies, ports)
    named = find_vms_in_scope(policies, build_membership(policies.zones, machines))
    kept_out = named | policies.quarantined
    return frozenset(port.mac for port in ports if not port.vm_id or port.vm_id in kept_out)


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


def _add_destination(book: FlowBook, port: Port, *, shortcuts: bool) -> None:
    cookie = build_cookie(CookieKind.PORT, port.ofport)
    to_port = set_register(DESTINATION, port.ofport)
    onward = go_to(Table.SYN) if shortcuts else go_to(Table.CONNECTION)
    known = {"reg0": render_number(port.tag or 0), "dl_dst": port.mac}
    for keyword in IP_KEYWORDS:
        match = build_match(keyword, **known)
        book.add(Table.ENDPOINT, 100, match, f"{to_port},{onward}", cookie)
    # What is not IP goes to CONNECTION too, to be dropped and counted there by its sender.
    untold = f"{to_port},{go_to(Table.CONNECTION)}"
    book.add(Table.ENDPOINT, 70, build_match(**known), untold, cookie)


def _go_to_policy(direction: Direction) -> str:
    return f"{set_register(DIRECTION, direction)},{go_to(Table.SENDER)}"


def _add_port_connection(book: FlowBook, port: Port) -> None:
    """A connection's direction counts only if it was marked with the sender's or the receiver's port."""
    table = Table.CONNECTION
    cookie, number = build_cookie(CookieKind.PORT, port.ofport), render_number(port.ofport)
    opener = build_match(ct_state="+est-rel-rpl-inv+trk", ct_mark=number, in_port=port.ofport)
    answer = build_match(ct_state="+est-rel+rpl-inv+trk", ct_mark=number, reg6=number)
    book.add(table, 90, opener, _go_to_policy(Direction.OPENER), cookie)
    book.add(table, 90, answer, _go_to_policy(Direction.ANSWER), cookie)
    # Only what is not IP is untracked still: it could carry IP (MPLS, PPPoE) past every policy.
    unread = build_match(ct_state="-trk", in_port=port.ofport)
    book.add(table, 60, unread, "drop", build_cookie(CookieKind.UNREAD, port.ofport))


def _add_class(book: FlowBook, port: Port, number: int) -> None:
    """The class of the port's VM, and where a packet for it goes: looked up behind conntrack, with the policies.

    What is set before conntrack is kept with the packet while the tables may change: a class or a port that is
    no longer any policy's would then meet none, and go direct. So what ENDPOINT found is found anew, by MAC.
    """
    cookie = build_cookie(CookieKind.PORT, port.ofport)
    if number != NO_CLASS:
        sender = f"{set_register(SENDER, number)},{go_to(Table.RECEIVER)}"
        book.add(Table.SENDER, 100, build_match(in_port=port.ofport), sender, cookie)
    to_port = set_register(DESTINATION, port.ofport)
    to_class = f"{set_register(RECEIVER, number)}," if number != NO_CLASS else ""
    receiver = f"{to_port},{to_class}{go_to(Table.POLICY)}"
    book.add(Table.RECEIVER, 100, build_match(dl_dst=port.mac), receiver, cookie)


def _add_connection(book: FlowBook) -> None:
    """Ask conntrack who opened the connection. Without an answer (midstream), both are assumed.

    A connection carries the port that opened it as its mark, and the answer counts only if it is the
    sender's or the receiver's: conntrack knows addresses alone, and a VM that forges the other end's
    could otherwise open a connection in its name and pass its own packets off as answers.
    """
    mark = "exec(move:NXM_OF_IN_PORT[]->NXM_NX_CT_MARK[0..15])"
    commit = f"ct(commit,zone={CT_ZONE},{mark})"
    table = Table.CONNECTION
    for ip, tcp in zip(IP_KEYWORDS, TCP_KEYWORDS, strict=True):
        ask = f"ct(table={table.number},zone={CT_ZONE})"
        book.add(table, 100, build_match(ip, ct_state="-trk"), ask, BASE)
        syn = build_match(tcp, ct_state="+new-inv+trk", tcp_flags="+syn-ack")
        book.add(table, 90, syn, f"{commit},{_go_to_policy(Direction.OPENER)}", BASE)
        midstream = build_match(tcp, ct_state="+new-inv+trk")
        book.add(table, 80, midstream, _go_to_policy(Direction.UNKNOWN), BASE)
        first = build_match(ip, ct_state="+new-rel-inv+trk")
        book.add(table, 70, first, _go_to_policy(Direction.GUESS), BASE)
        book.add(
            Table.COMMIT, 100, build_match(ip, reg1="0x5"), f"{commit},{go_to(Table.STEER)}", BASE
        )
    book.add(table, 0, "", _go_to_policy(Direction.UNKNOWN), BASE)
    book.add(Table.COMMIT, 0, "", go_to(Table.STEER), BASE)
    book.add(Table.SENDER, 0, "", go_to(Table.RECEIVER), BASE)
    book.add(Table.RECEIVER, 0, "", go_to(Table.POLICY), BASE)
    again = f"{set_register(DIRECTION, Direction.GUESS_ANSWER)},{go_to(Table.POLICY)}"
    book.add(Table.POLICY, 1, build_match(reg1="0x5"), again, BASE)
    book.add(Table.POLICY, 0, "", go_to(Table.DIRECT), BASE)


@dataclass(frozen=True, slots=True)
class _Side:
    """Whom one side of a policy names: classes, and ports of VMs that are named one by one."""

    classes: tuple[int, ...]
    ofports: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.classes or self.ofports)


def _find_side(
    peers: Sequence[Peer],
    membership: Membership,
    classes: Classes,
    ofports: Mapping[str, Sequence[int]],
) -> _Side:
    found = classes.find_classes(peers)
    named = membership.find_members(peer for peer in peers if peer.zone is None)
    # A VM that is named and in a zone that is named stands in the class's clause already.
    alone = sorted(
        ofport
        for vm_id in named
        if classes.by_vm.get(vm_id) not in found
        for ofport in ofports.get(vm_id, ())
    )
    return _Side(found, tuple(alone))


def _add_policy(
    book: FlowBook,
    policy: Policy,
    openers: _Side,
    answerers: _Side,
    lanes: Sequence[Lane],
) -> None:
    """A policy as two conjunctions (ovs-fields(7)): what its opener sends, and what answers.

    Clauses: from a class (or port) of these, to one of those, of one of the services. So the flows grow
    with the number of classes in its zones, not of VMs nor of pairs.
    """
    number = build_policy_number(policy.name)
    cookie = build_cookie(CookieKind.POLICY, number)
    priority = build_policy_priority(policy)
    strict = _find_strict_action(policy, lanes)
    parts = [(number, policy.action, False)]
    if isinstance(policy.action, Inspect):
        apart = strict != policy.action
        parts.append((build_fragments_number(policy.name) if apart else number, strict, True))
    for answer in (False, True):
        senders, receivers = (answerers, openers) if answer else (openers, answerers)
        for part, action, fragments in parts:
            matches = tuple(_build_service_matches(policy, answer=answer, fragments=fragments))
            if not matches:
                continue
            conjunction = build_conjunction_id(part, answer=answer)
            clauses = (
                *((build_match(reg4=render_number(one)), 1) for one in senders.classes),
                *((build_match(in_port=ofport), 1) for ofport in senders.ofports),
                *((build_match(reg5=render_number(one)), 2) for one in receivers.classes),
                *((build_match(reg6=render_number(ofport)), 2) for ofport in receivers.ofports),
                *((match, 3) for match in matches),
            )
            for match, dimension in clauses:
                clause = f"conjunction({conjunction},{dimension}/3)"
                book.add_clause(Table.POLICY, priority, match, clause, cookie)
            # What is inspected in another lane than the policy's offers no shortcut.
            offer = build_offer(policy) if part == number else ""
            verdict = offer + _build_verdict(action, lanes, answer=answer)
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
    fragments must be decided alike: what inspects or denies a part of IP takes all fragments that may be
    of it, what passes a part of IP directly takes none.
    """
    direction = _build_direction_match(policy, answer=answer)
    field = "tp_src" if answer else "tp_dst"
    denies, inspects = isinstance(policy.action, Deny), isinstance(policy.action, Inspect)
    for family in policy.families:
        # Fragments that two services of one inspecting policy may claim go where the stricter one's do.
        alike = inspects and not all(_is_told(service, family) for service in policy.services)
        for service in policy.services:
            keyword = KEYWORDS[family][service.protocol]
            told = _is_told(service, family) and not alike
            if fragments:
                if not told:
                    any_of = keyword if family is Family.IPV4 else KEYWORDS[family][Protocol.ANY]
                    yield build_match(any_of, reg1=direction, nw_frag="yes")
                continue
            if denies and not told:
                # A first fragment of IPv6 tells its protocol, so only later ones are anybody's.
                if family is Family.IPV6:
                    later = KEYWORDS[family][Protocol.ANY]
                    yield build_match(later, reg1=direction, nw_frag="later")
                if not _is_every(service):
                    yield build_match(keyword, reg1=direction, nw_frag="yes")
            whole = {} if told or (denies and _is_every(service)) else {"nw_frag": "no"}
            if _is_every(service):
                yield build_match(keyword, reg1=direction, **whole)
                continue
            for piece in service.ports:
                for ports in build_port_matches(piece.first, piece.last):
                    yield build_match(keyword, reg1=direction, **whole, **{field: ports})


def _is_every(service: Service) -> bool:
    """Has it no ports, or all of them?"""
    return not service.ports or any(
        piece.first == 0 and piece.last == 0xFFFF for piece in service.ports
    )


def _is_told(service: Service, family: Family) -> bool:
    """Can any fragment be told to be of the service, or not to be?"""
    return _is_every(service) and (family is Family.IPV4 or service.protocol is Protocol.ANY)
