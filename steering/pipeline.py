"""The one declaration of tables, registers, priorities, cookies and group ids.

`docs/pipeline.md` walks the tables in this order; a test holds the two together. To add a table: add
a member with a free number, say what it decides and where its packets go, then describe it there.

Register and action names are written the way OVS prints them (ovs-fields(7), ovs-actions(7)), so that
what is compiled can be compared with what the switch reads back, letter by letter.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum, IntEnum

from steering.model import Deny, Lane, OnFailure, Policy


@dataclass(frozen=True, slots=True)
class TableSpec:
    number: int
    decides: str


class Table(Enum):
    """Every table, in the order in which packets meet them."""

    CLASSIFY = TableSpec(
        0, "Who sent it: a leg, a VM's port (its network is noted), or another port."
    )
    LET_GO = TableSpec(
        5,
        "A frame from a third leg, whose connection the engine lets go: its lane's VLAN comes off.",
    )
    ORIGIN = TableSpec(6, "Which VM's port it came from, before it was in the lane.")
    GUARD = TableSpec(10, "Is the sender who it says it is: MAC, ARP, ND, no VLAN tag of its own.")
    LEARN = TableSpec(15, "Which address does the packet claim, or use, for the sender's port.")
    ENDPOINT = TableSpec(20, "Which VM is it for; what is for no VM in scope goes direct.")
    SYN = TableSpec(24, "The same for both: keeps a SYN's datapath flow apart from other packets'.")
    SHORTCUTS = TableSpec(25, "Connections that take a shortcut: learned, one flow a direction.")
    TAKE = TableSpec(26, "Deliver what takes a shortcut, counted by policy; a SYN never takes one.")
    CONNECTION = TableSpec(
        30, "Who opened the connection that it belongs to (conntrack); what is not IP is dropped."
    )
    SENDER = TableSpec(32, "Which class of VMs (those in the same zones) the sender is of.")
    RECEIVER = TableSpec(34, "Which class of VMs the one that it is for is of.")
    POLICY = TableSpec(40, "Which policy names it: one conjunction per policy and direction.")
    COMMIT = TableSpec(45, "Remember who opened a connection that has no SYN to tell (UDP, ICMP).")
    STEER = TableSpec(50, "Which group: lane, leg and failure mode; or direct.")
    TEACH = TableSpec(
        55, "Learn the connection of a frame from a third leg, if its policy says so."
    )
    RETURN = TableSpec(
        60, "A frame from a leg: the lane's VLAN comes off; any other frame is dropped."
    )
    DELIVER = TableSpec(
        70, "Out of the port of the VM that it is for; never learned, never flooded."
    )
    DIRECT = TableSpec(80, "As if Hairpin were not there: NORMAL.")
    ADDRESSES = TableSpec(
        90,
        "Addresses that ARP and ND claimed; no packet passes here, the management service reads it.",
    )
    USES = TableSpec(91, "Addresses that VMs in scope send from; read likewise, believed less.")

    def __init__(self, spec: TableSpec) -> None:
        # An attribute, since an enumeration's `value` is slow and this is asked for with every flow.
        self.number = spec.number


LEARNED_TABLES = (Table.ADDRESSES.number, Table.USES.number)


class Register(Enum):
    """What each register carries between tables."""

    NETWORK = "reg0"  # access VLAN of the sender's port in the bridge, 0 for none
    DIRECTION = "reg1"  # bits of Direction
    STEER = "reg2"  # steer key (see build_steer_key), 0: direct
    SENDER_CLASS = "reg4"  # the sender's class of VMs (steering.classes), 0: in no zone that counts
    RECEIVER_CLASS = "reg5"  # likewise of the VM that the packet is for
    DESTINATION = "reg6"  # ofport of the VM that the packet is for
    # Policy whose shortcut the packet takes (SHORTCUT_TAKEN and the policy's number), or may come to
    # take (the number alone); 0: none.
    SHORTCUT = "reg7"
    TRIGGER = "reg8"  # the policy's trigger as in `PRIORITY_CODES`, 0 without a shortcut
    LET_GO = (
        "reg9"  # of a frame from a third leg: FROM_THIRD_LEG and the code it was in the lane with
    )


class Direction(IntEnum):
    """Values of Register.DIRECTION. Policies match its two low bits."""

    OPENER = 0x1  # from the side that opened the connection
    ANSWER = 0x2  # from the other side
    UNKNOWN = 0x3  # midstream: either; only what inspects or denies is matched, in both directions
    GUESS = 0x5  # first packet without a SYN: the opener's, unless only an answer fits
    GUESS_ANSWER = 0xA  # second try of a guess; only what inspects may take it


SHORTCUT_TAKEN = 0x8000_0000  # policies' numbers have 31 bits
FROM_THIRD_LEG = 0x8

# One conntrack zone of our own; it is asked who opened a connection, nothing else.
CT_ZONE = 18512

# Cookies: 16 bits of ours, 8 bits of kind, 8 spare, 32 bits of number. Nothing else is ever touched.
COOKIE_PREFIX = 0x4850
COOKIE_MASK = 0xFFFF_0000_0000_0000

# Groups have no cookie: ours are those whose id starts with these 16 bits.
GROUP_PREFIX = 0x4850_0000
GROUP_MASK = 0xFFFF_0000

# Learned addresses: how many one port may claim, and how long a claim stands without being repeated.
ADDRESS_LIMIT = 64
ADDRESS_IDLE_SECONDS = 3600


class CookieKind(IntEnum):
    """What a flow is for; shown with its counters."""

    BASE = 0  # the skeleton: number 0
    PORT = 1  # number: ofport
    SPOOF = 2  # a drop of the guard; number: ofport
    POLICY = 3  # number: build_policy_number(name)
    LANE = 4  # number: lane number
    ADDRESS = 5  # learned; number: ofport
    TAGGED = 6  # a drop of the guard: tagged frames of a VM; number: ofport
    STRAY = 7  # a drop: unicast IP in a frame for many; number 0
    CANARY = 8  # Hairpin's own port; number: lane number, 0 where for none or all
    GHOST = 9  # a drop: from or to a VM in scope whose port is gone; number 0
    CLAIM = 10  # a drop of the guard: a claim of another's address; number: ofport of its holder
    UNREAD = (
        11  # a drop: what is neither IP nor ARP, from a VM in scope to one; number: sender's ofport
    )
    MANY = 12  # direct: frames of VMs in scope that are meant for many; number 0
    QUARANTINE = 13  # a drop: whatever a quarantined VM sends, or is sent; number: its ofport
    SHUN = 14  # a drop that ends by itself: a flow that the engine blocked; number: of its policy
    SHORTCUT = 15  # in SHORTCUTS learned, in TAKE delivered uninspected; number: of its policy


def build_cookie(kind: CookieKind, number: int = 0) -> int:
    return COOKIE_PREFIX << 48 | kind << 40 | number & 0xFFFF_FFFF


def parse_cookie(cookie: int) -> tuple[CookieKind, int] | None:
    """Kind and number of one of our cookies; None for a foreign one."""
    if cookie >> 48 != COOKIE_PREFIX:
        return None
    try:
        return CookieKind(cookie >> 40 & 0xFF), cookie & 0xFFFF_FFFF
    except ValueError:
        return None


def build_policy_number(name: str) -> int:
    """A number for a policy that depends on its name only, so that others' changes leave its flows alone.

    31 bits, because the lowest bit of the conjunction id made from it tells the direction.
    """
    digest = hashlib.blake2s(name.encode(), digest_size=4).digest()
    return max(int.from_bytes(digest, "big") >> 1, 1)


def build_fragments_number(name: str) -> int:
    """Likewise for a policy's fragments, where they are inspected apart; policies' names have no slash."""
    return build_policy_number(f"{name}/fragments")


def build_conjunction_id(policy_number: int, *, answer: bool) -> int:
    return policy_number << 1 & 0xFFFF_FFFF | int(answer)


def build_steer_key(lane: Lane, on_failure: OnFailure, *, answer: bool) -> int:
    return lane.number << 4 | (0x2 if answer else 0) | (0x1 if on_failure is OnFailure.OPEN else 0)


def build_group_id(steer_key: int) -> int:
    return GROUP_PREFIX | steer_key


# The one group that only delivers: what an open group falls back to. Its liveness is what makes the
# second bucket of a fast-failover group live (OVS wants a watch on every bucket).
DELIVER_GROUP = GROUP_PREFIX | 0xFFFF

# Policies take the middle of POLICY's flow priorities.
POLICY_PRIORITY_BASE = 10_000
CANARY_PRIORITY = 60_000  # above every policy: it steers canaries, which no policy names


def build_policy_priority(policy: Policy) -> int:
    """The flows' priority. At equal priority of policies a deny goes first.

    Policies that contradict are refused, so this only decides a packet of unknown direction, for
    which a deny one way and an inspection the other way may stand at one priority.
    """
    return POLICY_PRIORITY_BASE + 2 * policy.priority + isinstance(policy.action, Deny)
