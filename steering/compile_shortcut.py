"""The flows of the shortcut (docs/shortcut.md). Pure.

Only for policies that ask for one in a lane that has a third leg; without such a policy none of them stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from steering.decide import find_lane
from steering.flows import (
    KEYWORDS,
    TCP_KEYWORDS,
    FlowBook,
    build_match,
    go_to,
    render_number,
    set_register,
)
from steering.membership import Membership
from steering.model import Family, Inspect, Lane, Policy, Port, Protocol
from steering.pipeline import (
    FROM_THIRD_LEG,
    SHORTCUT_TAKEN,
    CookieKind,
    Register,
    Table,
    build_cookie,
    build_policy_number,
)
from steering.shortcut import (
    IDLE_SECONDS,
    PRIORITY_CODES,
    build_shortcut_cookie,
    find_denied_back,
)

SHORTCUT, TRIGGER, LET_GO = (
    Register.SHORTCUT.value,
    Register.TRIGGER.value,
    Register.LET_GO.value,
)
BASE = build_cookie(CookieKind.BASE)
IS_TAKEN = f"{SHORTCUT_TAKEN:#x}/{SHORTCUT_TAKEN:#x}"
IS_LET_GO = f"{FROM_THIRD_LEG:#x}/{FROM_THIRD_LEG:#x}"
LEARNED_PRIORITY = 100

# A flow of SHORTCUTS is of one sender's port and both MACs: neither addresses that another VM forges, nor ports
# that are another VM's now, take a shortcut that was not given to them.
_FIELDS = {
    Family.IPV4: ("0x800", "NXM_OF_IP_SRC[]", "NXM_OF_IP_DST[]"),
    Family.IPV6: ("0x86dd", "NXM_NX_IPV6_SRC[]", "NXM_NX_IPV6_DST[]"),
}
_PORTS = ("NXM_OF_TCP_SRC[]", "NXM_OF_TCP_DST[]")


def find_shortcuts(
    policies: Sequence[Policy], lanes: Sequence[Lane], membership: Membership
) -> tuple[Policy, ...]:
    """The policies whose connections may take a shortcut: not those of `find_denied_back`."""
    asking = [policy for policy in policies if _has_shortcut(policy, lanes)]
    denied = find_denied_back(asking, policies, membership)
    return tuple(policy for policy in asking if policy.name not in denied)


def withhold_shortcut(policy: Policy, offering: frozenset[str]) -> Policy:
    """The policy as it is compiled: without a shortcut, unless it is one of ``offering``."""
    action = policy.action
    if isinstance(action, Inspect) and action.shortcut is not None and policy.name not in offering:
        return replace(policy, action=replace(action, shortcut=None))
    return policy


def _has_shortcut(policy: Policy, lanes: Sequence[Lane]) -> bool:
    action = policy.action
    if not isinstance(action, Inspect) or action.shortcut is None:
        return False
    lane = find_lane(lanes, action.profile)
    return lane is not None and has_third_leg(lane)


def has_third_leg(lane: Lane) -> bool:
    return lane.leg_c is not None and lane.leg_c.ofport > 0


def build_offer(policy: Policy) -> str:
    """What POLICY notes of a packet whose connection may come to take a shortcut; else nothing.

    ``policy`` as `withhold_shortcut` left it.
    """
    action = policy.action
    if not isinstance(action, Inspect) or action.shortcut is None:
        return ""
    number = set_register(SHORTCUT, build_policy_number(policy.name))
    return f"{number},{set_register(TRIGGER, PRIORITY_CODES[action.shortcut.after])},"


def add_shortcuts(
    book: FlowBook,
    policies: Sequence[Policy],
    lanes: Sequence[Lane],
    untaught: frozenset[str] = frozenset(),
) -> None:
    """``policies`` as `find_shortcuts` found them; of ``untaught`` no connection learns one for now."""
    for lane in lanes:
        if has_third_leg(lane):
            _add_third_leg(book, lane)
    if not policies:
        return
    deliver = go_to(Table.DELIVER)
    for table in (Table.ENDPOINT, Table.POLICY):
        # What no policy names any more; it was inspected, and must not be flooded.
        book.add(table, 2, build_match(reg9=IS_LET_GO), deliver, BASE)
    # OVS accounts for packets of one datapath flow later, by what its first one was; if that was a SYN, it
    # would end what other packets' connections have just come to take.
    book.add(Table.SYN, 0, "", go_to(Table.SHORTCUTS, Table.TAKE), BASE)
    for keyword in TCP_KEYWORDS:
        alone = build_match(keyword, tcp_flags="+syn")
        book.add(Table.SYN, 100, alone, go_to(Table.SHORTCUTS, Table.TAKE), BASE)
    # Those that were on their way as the connection was learned: inspected, so not counted as taken.
    straggler = build_match(reg7=IS_TAKEN, reg9=IS_LET_GO)
    book.add(Table.TAKE, 250, straggler, deliver, BASE)
    book.add(Table.TAKE, 0, "", go_to(Table.CONNECTION), BASE)
    book.add(Table.STEER, 200, build_match(reg9=IS_LET_GO), f"{go_to(Table.TEACH)},{deliver}", BASE)
    for policy in policies:
        _add_policy(book, policy, is_taught=policy.name not in untaught)


def add_origin(book: FlowBook, port: Port) -> None:
    """A frame of this port's VM that the engine let go goes on as if it had just come from the port."""
    network = set_register(Register.NETWORK.value, port.tag or 0)
    back = f"set_field:{port.ofport}->in_port,{network},{go_to(Table.ENDPOINT)}"
    cookie = build_cookie(CookieKind.PORT, port.ofport)
    book.add(Table.ORIGIN, 100, build_match(dl_src=port.mac), back, cookie)


def _add_third_leg(book: FlowBook, lane: Lane) -> None:
    ofport = lane.leg_c.ofport if lane.leg_c is not None else 0
    cookie = build_cookie(CookieKind.LANE, lane.number)
    book.add(Table.CLASSIFY, 300, build_match(in_port=ofport), go_to(Table.LET_GO), cookie)
    code = f"move:OXM_OF_VLAN_PCP[]->NXM_NX_{LET_GO.upper()}[0..2]"
    noted = f"{code},set_field:{IS_LET_GO}->{LET_GO},pop_vlan,{go_to(Table.ORIGIN)}"
    book.add(Table.LET_GO, 100, build_match(in_port=ofport, dl_vlan=lane.vlan), noted, cookie)
    book.add(Table.LET_GO, 0, "", "drop", BASE)
    # Of a VM that left all policies, or its port, while the frame was in the lane.
    book.add(Table.ORIGIN, 0, "", go_to(Table.DELIVER), BASE)


def _add_policy(book: FlowBook, policy: Policy, *, is_taught: bool) -> None:
    action = policy.action
    if not isinstance(action, Inspect) or action.shortcut is None:
        raise TypeError(f"policy {policy.name} has no shortcut")
    number = build_policy_number(policy.name)
    cookie = build_shortcut_cookie(policy.name)
    taken = render_number(SHORTCUT_TAKEN | number)
    book.add(Table.TAKE, 200, build_match(reg7=taken), go_to(Table.DELIVER), cookie)
    for family in policy.families:
        # It passes nothing: OVS may learn from it half a second late, and the new connection's packets would
        # pass meanwhile. The SYN that is sent again, a second later, finds no shortcut any more.
        match = build_match(KEYWORDS[family][Protocol.TCP], reg7=taken, tcp_flags="+syn")
        ended = f"{_learn(family, number, 0)},{_learn_back(family, number, 0)}"
        book.add(Table.TAKE, 300, match, ended, cookie)
    if not is_taught:
        return
    # Only for the trigger that the policy in force has: one of before may still be on its way.
    code = FROM_THIRD_LEG | PRIORITY_CODES[action.shortcut.after]
    most = 2 * action.shortcut.max_flows
    for family in policy.families:
        keyword = KEYWORDS[family][Protocol.TCP]
        offered = build_match(keyword, reg7=render_number(number), reg9=render_number(code))
        learn = f"{_learn(family, number, most)},{_learn_back(family, number, most)}"
        book.add(Table.TEACH, 100, offered, learn, cookie)


def _learn(family: Family, number: int, most: int) -> str:
    """The packet's own direction (ovs-actions(7), learn). ``most`` 0: it takes the usual way again."""
    ethertype, source, destination = _FIELDS[family]
    ends = ("NXM_OF_IN_PORT[]", "NXM_OF_ETH_SRC[]", "NXM_OF_ETH_DST[]")
    fields = (*ends, source, destination, *_PORTS)
    return _render_learn(ethertype, fields, number, most)


def _learn_back(family: Family, number: int, most: int) -> str:
    ethertype, source, destination = _FIELDS[family]
    swapped = ((source, destination), (destination, source), _PORTS, _PORTS[::-1])
    fields = (
        f"NXM_OF_IN_PORT[]=NXM_NX_{Register.DESTINATION.value.upper()}[0..15]",
        "NXM_OF_ETH_SRC[]=NXM_OF_ETH_DST[]",
        "NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[]",
        *(f"{one}={other}" for one, other in swapped),
    )
    return _render_learn(ethertype, fields, number, most)


def _render_learn(ethertype: str, fields: Iterable[str], number: int, most: int) -> str:
    """As OVS prints it. One that ended keeps its policy's cookie, and so its place in the bound."""
    ends = f"idle_timeout={IDLE_SECONDS}{',fin_idle_timeout=2' if most else ''}"
    cookie = build_cookie(CookieKind.SHORTCUT, number)
    limit = f"limit={most}," if most else ""
    value = f"{SHORTCUT_TAKEN | number:#x}" if most else "0"
    return (
        f"learn(table={Table.SHORTCUTS.number},{ends},priority={LEARNED_PRIORITY},cookie={cookie:#x},"
        f"{limit}eth_type={ethertype},nw_proto=6,{','.join(fields)},"
        f"load:{value}->NXM_NX_{SHORTCUT.upper()}[])"
    )
