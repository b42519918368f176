"""The rules that send a lane's packets to its queues and drop everything else: two dialects, rendered.

Pure. What is queued: IPv4 and IPv6 from one leg to the other, tagged with the lane's VLAN, or untagged
(the switch's BFD, which so proves this lane's engine). What is not queued is dropped.

In the iptables dialect three mechanisms act together (ebtables, bridge-netfilter, iptables), and the
absence of one must not open the lane: the chain that queues a packet marks it first with the lane's
mark, and ebtables lets no frame leave by a leg without it. So with the iptables rules flushed, or
bridge-netfilter switched off, the lane is closed. Behind the queue stands a drop, which no packet
that was queued comes to: with the queue's rule alone deleted, the lane is closed too.

The rules count as they decide, tagged and plain frames apart, in and out (`counting`).

Where a lane has a third leg, the class of a frame (`shortcut`), told by the priority in its tag, is put into its
mark before it is queued. The mark is written anew there, so no class can come from anywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from appliance.inspection.shortcut import CLASS_SHIFT
from steering.errors import FieldError, WrongInput
from steering.model import Lane
from steering.shortcut import PRIORITY_CODES

CHAIN = "hairpin"
"""Our chain in each table of the iptables dialect, and our table in the nftables dialect."""

TAGGED = "802_1Q"
"""How ebtables writes the protocol of a frame with a tag."""

MARK_MASK = 0xFF00
MARK_SHIFT = 8

SYSCTLS = MappingProxyType(
    {
        "net/bridge/bridge-nf-call-iptables": "1",
        "net/bridge/bridge-nf-call-ip6tables": "1",
        "net/bridge/bridge-nf-filter-vlan-tagged": "1",
        "net/bridge/bridge-nf-pass-vlan-input-dev": "0",
    }
)
"""What the iptables dialect needs of bridge-netfilter, under /proc/sys (kernel, ip-sysctl.rst)."""


class Dialect(StrEnum):
    IPTABLES = "iptables"
    NFTABLES = "nftables"


@dataclass(frozen=True, slots=True)
class Script:
    """A text for a command's standard input that changes everything or nothing."""

    argv: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class TableKind:
    """A table of the iptables dialect: the commands for it, and the built-in chains we hook."""

    family: str
    table: str
    hooks: tuple[str, ...]
    policy: str

    @property
    def restore(self) -> tuple[str, ...]:
        return (f"{self.family}-restore", "--noflush")

    @property
    def save(self) -> tuple[str, ...]:
        # ebtables' rules are also what counts a lane's frames.
        counted = ("-c",) if self.family == "ebtables" else ()
        return (f"{self.family}-save", "-t", self.table, *counted)

    @property
    def name(self) -> str:
        return f"{self.family} {self.table}"


# In the order of application: what closes comes before what lets through.
TABLES = (
    TableKind("ebtables", "filter", ("FORWARD", "INPUT", "OUTPUT"), "RETURN"),
    TableKind("ebtables", "nat", ("POSTROUTING",), "RETURN"),
    TableKind("iptables", "mangle", ("FORWARD",), "-"),
    TableKind("ip6tables", "mangle", ("FORWARD",), "-"),
)


EBTABLES_SAVE = ("ebtables-save", "-c")


def find_bridge_name(lane: Lane) -> str:
    """The lane's bridge in the service host."""
    return f"lane{lane.number}"


def find_mark(lane: Lane) -> str:
    """The lane's packet mark and its mask, as iptables and ebtables write it."""
    return f"0x{lane.number << MARK_SHIFT:x}/0x{MARK_MASK:x}"


def check_queues(lanes: Iterable[Lane]) -> tuple[FieldError, ...]:
    """Queues that no rule can name: an engine with several has a row of them."""
    return tuple(
        FieldError(
            f"lanes[{lane.number - 1}].queues",
            f"{', '.join(map(str, lane.queues))} are not consecutive numbers in rising order",
        )
        for lane in lanes
        if list(lane.queues) != list(range(lane.queues[0], lane.queues[0] + len(lane.queues)))
    )


def _check(lanes: Sequence[Lane]) -> None:
    if faults := check_queues(lanes):
        raise WrongInput(faults, "number each lane's queues in a row, as in [0, 1, 2]")


def _devices(lanes: Iterable[Lane]) -> tuple[str, ...]:
    return tuple(leg.device for lane in lanes for leg in (lane.leg_a, lane.leg_b))


def _directions(lane: Lane) -> tuple[tuple[str, str], tuple[str, str]]:
    a, b = lane.leg_a.device, lane.leg_b.device
    return (a, b), (b, a)


def render_rules(kind: TableKind, lanes: Sequence[Lane]) -> tuple[str, ...]:
    """Our chain's rules in one table, written exactly as the table's `-save` prints them."""
    _check(lanes)
    if kind.family != "ebtables":
        return tuple(line for lane in lanes for line in _render_queueing(lane))
    devices = _devices(lanes)
    if kind.table == "nat":
        return (
            *(line for lane in lanes for line in render_leaving(lane)),
            *(f"-A {CHAIN} -o {device} -j DROP" for device in devices),
        )
    return (
        *(line for lane in lanes for line in render_marking(lane)),
        *(line for lane in lanes for line in render_entering(lane)),
        *(f"-A {CHAIN} -i {device} -j DROP" for device in devices),
        *(f"-A {CHAIN} -o {device} -j DROP" for device in devices),
    )


def _render_queueing(lane: Lane) -> tuple[str, ...]:
    bridge = find_bridge_name(lane)
    if len(lane.queues) == 1:
        target = f"--queue-num {lane.queues[0]}"
    else:
        target = f"--queue-balance {lane.queues[0]}:{lane.queues[-1]}"
    return (
        f"-A {CHAIN} -i {bridge} -j MARK --set-xmark {find_mark(lane)}",
        f"-A {CHAIN} -i {bridge} -j NFQUEUE {target}",
        # What the engine lets pass goes on behind the chain; this is reached where nothing queues.
        f"-A {CHAIN} -i {bridge} -j DROP",
    )


def render_entering(lane: Lane) -> tuple[str, ...]:
    """The rules of ebtables filter that let a lane's frames go on to its queue."""
    rules: list[str] = []
    for entry, leave in _directions(lane):
        way = f"-i {entry} -o {leave}"
        rules += [
            f"-A {CHAIN} -p IPv4 {way} -j ACCEPT",
            f"-A {CHAIN} -p IPv6 {way} -j ACCEPT",
            f"-A {CHAIN} -p {TAGGED} {way} --vlan-id {lane.vlan} --vlan-encap 0800 -j ACCEPT",
            f"-A {CHAIN} -p {TAGGED} {way} --vlan-id {lane.vlan} --vlan-encap 86DD -j ACCEPT",
        ]
    return tuple(rules)


def _find_marks(lane: Lane) -> tuple[tuple[int, int], ...]:
    """(priority of a tag, mark) of each class of frames in a lane; none where it has no third leg."""
    if lane.leg_c is None:
        return ()
    return tuple((code, code << CLASS_SHIFT) for code in sorted(PRIORITY_CODES.values()))


def render_marking(lane: Lane) -> tuple[str, ...]:
    """The rules of ebtables filter that put a frame's class into its mark, and go on.

    By the priority alone: with `--vlan-id` beside it ebtables leaves it out (ebtables-nft 1.8.9), and
    frames of other VLANs are dropped behind.
    """
    rules: list[str] = []
    for entry, leave in _directions(lane) if (marks := _find_marks(lane)) else ():
        way = f"-i {entry} -o {leave}"
        rules.append(f"-A {CHAIN} {way} -j mark --mark-set 0x0 --mark-target CONTINUE")
        rules += [
            f"-A {CHAIN} -p {TAGGED} {way} --vlan-prio {priority} "
            f"-j mark --mark-set 0x{mark:x} --mark-target CONTINUE"
            for priority, mark in marks
        ]
    return tuple(rules)


def render_leaving(lane: Lane) -> tuple[str, ...]:
    """The rules of ebtables nat that let out what was queued, tagged frames and plain ones apart."""
    return tuple(
        f"-A {CHAIN}{kind} -o {device} --mark {find_mark(lane)} -j ACCEPT"
        for device in _devices([lane])
        for kind in (f" -p {TAGGED}", "")
    )


def render_refusing(lane: Lane) -> tuple[str, ...]:
    """The rules that drop a lane's frames: those not let in (filter), and those not let out (nat)."""
    devices = _devices([lane])
    return (
        *(f"-A {CHAIN} -i {device} -j DROP" for device in devices),
        *(f"-A {CHAIN} -o {device} -j DROP" for device in devices),
    )


def parse_jumps(saved: str) -> Mapping[str, int]:
    """How often each built-in chain jumps to ours, from what a `-save` printed."""
    jumps: dict[str, int] = {}
    for line in _find_lines(saved):
        if found := re.fullmatch(rf"-A (\S+) -j {CHAIN}", line):
            jumps[found[1]] = jumps.get(found[1], 0) + 1
    return jumps


def parse_rules(saved: str) -> tuple[str, ...]:
    """Our chain's rules, from what a `-save` printed."""
    return tuple(line for line in _find_lines(saved) if line.startswith(f"-A {CHAIN} "))


def _find_lines(saved: str) -> list[str]:
    """The lines of a `-save`, without the counters that `-c` puts before rules."""
    return [re.sub(r"^\[\d+:\d+\] ", "", line.strip()) for line in saved.splitlines()]


def split_tables(saved: str) -> Mapping[str, str]:
    """What a `-save` of all tables printed, by table."""
    tables: dict[str, list[str]] = {}
    listed: list[str] = []
    for line in saved.splitlines():
        if line.startswith("*"):
            listed = tables.setdefault(line[1:].strip(), [])
        listed.append(line)
    return {name: "\n".join(lines) for name, lines in tables.items()}


def has_chain(saved: str) -> bool:
    return any(line.startswith(f":{CHAIN} ") for line in saved.splitlines())


def find_table_faults(kind: TableKind, lanes: Sequence[Lane], saved: str) -> tuple[str, ...]:
    """How a table differs from what it should hold: our rules in order, and our jumps first of all."""
    faults: list[str] = []
    wanted, present = render_rules(kind, lanes), parse_rules(saved)
    missing = [line for line in wanted if line not in present]
    foreign = [line for line in present if line not in wanted]
    if missing:
        faults.append(f"{kind.name}: {len(missing)} rules missing, the first `{missing[0]}`")
    if foreign:
        faults.append(f"{kind.name}: {len(foreign)} rules too many, the first `{foreign[0]}`")
    if not missing and not foreign and wanted != present:
        faults.append(f"{kind.name}: the rules are in another order")
    lines = _find_lines(saved)
    for hook in kind.hooks:
        first = next((line for line in lines if line.startswith(f"-A {hook} ")), None)
        if first != f"-A {hook} -j {CHAIN}":
            faults.append(f"{kind.name}: {hook} does not jump to `{CHAIN}` first")
    return tuple(faults)


def render_table(kind: TableKind, lanes: Sequence[Lane], saved: str = "") -> Script:
    """What makes one table right, whatever `saved` (its `-save`) shows of it; nothing else is touched."""
    jumps = parse_jumps(saved)
    policy = f"{kind.policy} [0:0]" if kind.policy == "-" else kind.policy
    lines = [f"*{kind.table}", f":{CHAIN} {policy}"]
    if has_chain(saved):
        lines.append(f"-F {CHAIN}")
    for hook in kind.hooks:
        lines += [f"-D {hook} -j {CHAIN}"] * jumps.get(hook, 0)
        lines.append(f"-I {hook} 1 -j {CHAIN}")
    lines += render_rules(kind, lanes)
    lines.append("COMMIT")
    return Script(kind.restore, "\n".join(lines) + "\n")


def render_iptables(
    lanes: Sequence[Lane], saved: Mapping[str, str] = MappingProxyType({})
) -> tuple[Script, ...]:
    """Every table of the iptables dialect, in the order to apply. `saved` is each `-save`, by name.

    Sources: iptables-extensions(8) NFQUEUE and MARK, ebtables(8), iptables-restore(8).
    """
    return tuple(render_table(kind, lanes, saved.get(kind.name, "")) for kind in TABLES)


def render_iptables_removal(saved: Mapping[str, str]) -> tuple[Script, ...]:
    """What takes our chains away again, in the order that keeps the lanes closed longest."""
    scripts = []
    for kind in reversed(TABLES):
        present = saved.get(kind.name, "")
        if not has_chain(present):
            continue
        jumps = parse_jumps(present)
        lines = [f"*{kind.table}"]
        for hook in kind.hooks:
            lines += [f"-D {hook} -j {CHAIN}"] * jumps.get(hook, 0)
        lines += [f"-F {CHAIN}", f"-X {CHAIN}", "COMMIT"]
        scripts.append(Script(kind.restore, "\n".join(lines) + "\n"))
    return tuple(scripts)


NFT_APPLY = ("nft", "-f", "-")
NFT_CHECK = ("nft", "-c", "-f", "-")
NFT_LIST = ("nft", "-s", "list", "table", "bridge", CHAIN)
NFT_COUNTERS = ("nft", "-j", "list", "counters", "table", "bridge", CHAIN)
COUNTED = ("in_tagged", "in_untagged", "out_tagged", "out_untagged", "refused")


def find_counter_name(lane: Lane, what: str) -> str:
    """The nftables counter of a lane; `what` is one of COUNTED."""
    return f"{find_bridge_name(lane)}_{what}"


def _count(lane: Lane, what: str) -> str:
    return f'counter name "{find_counter_name(lane, what)}"'


def render_nftables(lanes: Sequence[Lane]) -> str:
    """The nftables dialect: one table of the bridge family, replaced as a whole (nft(8)).

    Interfaces are matched by name, so the rules stand before the devices do.
    """
    _check(lanes)
    devices = _quote(_devices(lanes))
    lines = [
        # Declaring before deleting makes the deletion succeed whether the table was there or not.
        f"table bridge {CHAIN} {{ }}",
        f"delete table bridge {CHAIN}",
        f"table bridge {CHAIN} {{",
        *(f"\tcounter {find_counter_name(lane, what)} {{ }}" for lane in lanes for what in COUNTED),
    ]
    for lane in lanes:
        first, last = lane.queues[0], lane.queues[-1]
        queue = f"queue num {first}" if first == last else f"queue num {first}-{last}"
        plain, tagged = _count(lane, "in_untagged"), _count(lane, "in_tagged")
        lines += [
            f"\tchain {find_bridge_name(lane)} {{",
            *_mark_classes(lane),
            f"\t\tether type {{ ip, ip6 }} {plain} {queue}",
            f"\t\tether type 8021q vlan id {lane.vlan} vlan type {{ ip, ip6 }} {tagged} {queue}",
            f"\t\t{_count(lane, 'refused')} drop",
            "\t}",
        ]
    lines += ["\tchain forward {", "\t\ttype filter hook forward priority -200; policy accept;"]
    for lane in lanes:
        for entry, leave in _directions(lane):
            lines.append(f'\t\tiifname "{entry}" oifname "{leave}" goto {find_bridge_name(lane)}')
    for lane in lanes:
        lines.append(f"\t\tiifname {_quote(_devices([lane]))} {_count(lane, 'refused')} drop")
    lines += [
        f"\t\toifname {devices} drop",
        "\t}",
        "\tchain input {",
        "\t\ttype filter hook input priority -200; policy accept;",
        f"\t\tiifname {devices} drop",
        "\t}",
        "\tchain output {",
        "\t\ttype filter hook output priority -200; policy accept;",
        f"\t\toifname {devices} drop",
        "\t}",
        "\tchain leaving {",
        "\t\ttype filter hook postrouting priority 300; policy accept;",
    ]
    for lane in lanes:
        legs = _quote(_devices([lane]))
        lines += [
            f"\t\toifname {legs} ether type 8021q {_count(lane, 'out_tagged')} accept",
            f"\t\toifname {legs} {_count(lane, 'out_untagged')} accept",
        ]
    return "\n".join([*lines, "\t}", "}"]) + "\n"


def _mark_classes(lane: Lane) -> list[str]:
    marks = _find_marks(lane)
    tagged = f"\t\tether type 8021q vlan id {lane.vlan} vlan pcp"
    first = ["\t\tmeta mark set 0x00000000"] if marks else []
    return first + [f"{tagged} {priority} meta mark set 0x{mark:08x}" for priority, mark in marks]


def _quote(devices: Iterable[str]) -> str:
    listed = ", ".join(f'"{device}"' for device in devices)
    return f"{{ {listed} }}"


def render_nftables_removal() -> str:
    return f"table bridge {CHAIN} {{ }}\ndelete table bridge {CHAIN}\n"


def render_nftables_probe() -> str:
    """A rule set that is only checked: refused by a kernel whose bridge family can't queue."""
    return (
        f"table bridge {CHAIN}_probe {{\n\tchain probe {{\n\t\tvlan type ip queue num 0\n\t}}\n}}\n"
    )


def count_nftables_rules(text: str) -> int:
    """How many rules a table has, as rendered or as listed: the lines that end in a verdict or set a mark."""
    return sum(
        1
        for line in text.splitlines()
        if re.search(
            r"(\bdrop|\baccept|\bqueue (num|to|flags)\b.*|\bgoto \S+|\bmark set \S+)$", line.strip()
        )
    )


def normalize_listing(text: str) -> tuple[str, ...]:
    """A listing without its blanks, to compare one with another."""
    return tuple(" ".join(line.split()) for line in text.splitlines() if line.strip())
