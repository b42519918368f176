"""The door to the bridge's OpenFlow tables: `ovs-ofctl` over a connection string.

Dumps are taken apart by the `ovs` package's own parser; the texts of match and actions are kept as OVS
wrote them, since compiled flows are written the same way.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from ovs.flow.ofp import OFPFlow

from steering.diff import Bundle
from steering.errors import CommandFailed, SwitchError
from steering.flows import FlowKey, Group, Present, PresentFlow, build_match_id
from steering.pipeline import (
    COOKIE_MASK,
    COOKIE_PREFIX,
    GROUP_MASK,
    GROUP_PREFIX,
    LEARNED_TABLES,
    CookieKind,
    Table,
    build_cookie,
    parse_cookie,
)
from steering.run import Finished, SpareCommand, run_async
from steering.shortcut import Taken, is_learned_shortcut
from steering.shun import PRIORITY, ShunFlow, Shunned, is_shun
from steering.switch.secure import check_openflow
from steering.tls import TlsFiles, find_options

SECONDS = 20.0
VERSION = ("-O", "OpenFlow15", "--no-names")
KIND_MASK = 0xFFFF_FF00_0000_0000
OURS = f"cookie={COOKIE_PREFIX << 48:#x}/{COOKIE_MASK:#x}"


@dataclass(frozen=True, slots=True)
class FlowCounter:
    """Packets and bytes that a flow of ours saw since it was installed."""

    flow: PresentFlow
    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GroupCounter:
    """(packets, bytes) per bucket of a group, in the order of its buckets."""

    group_id: int
    buckets: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class LearnedAddress:
    """An address of a port, last seen ``idle`` seconds ago.

    ``claimed``: by ARP or ND; else it was only sent from.
    """

    address: str
    ofport: int
    claimed: bool
    idle: float = 0.0


LINES_AT_A_TIME = 300  # of a dump, until the event loop has its turn: about 1 ms

_AGES = re.compile(r"(?:duration|idle_age|hard_age)=[^,]*, ")
_COUNTS = re.compile(r"n_packets=(\d+), n_bytes=(\d+), ")


class FlowParser:
    """Takes dumps apart, and remembers what the lines of the last one meant.

    The package's parser takes 0.1 ms for a flow, and nearly all flows of a dump stood in the one before: so
    a switch with 33,000 flows is read back in 0.1 s instead of 4.
    """

    def __init__(self) -> None:
        self._known: dict[str, PresentFlow] = {}
        self._dump: tuple[str, tuple[PresentFlow, ...]] = ("", ())

    def parse(self, lines: Iterable[str]) -> tuple[FlowCounter, ...]:
        """The lines of one dump, with or without statistics. Raises SwitchError for what is no flow."""
        known: dict[str, PresentFlow] = {}
        found = tuple(self._parse_line(line, known) for line in lines)
        self._known = known
        return found

    async def parse_slowly(self, lines: Iterable[str]) -> tuple[FlowCounter, ...]:
        """As `parse`; the event loop has its turn now and then."""
        known: dict[str, PresentFlow] = {}
        found: list[FlowCounter] = []
        for number, line in enumerate(lines, 1):
            found.append(self._parse_line(line, known))
            if number % LINES_AT_A_TIME == 0:
                await asyncio.sleep(0)
        self._known = known
        return tuple(found)

    async def read(self, dump: str) -> tuple[PresentFlow, ...]:
        """The flows of a dump without statistics: the same tuple, if it is the last one's text."""
        before, flows = self._dump
        if dump != before:
            counters = await self.parse_slowly(find_flow_lines(dump))
            flows = tuple(one.flow for one in counters if is_compiled(one.flow))
            self._dump = dump, flows
        return flows

    def _parse_line(self, line: str, known: dict[str, PresentFlow]) -> FlowCounter:
        packets, size, text = 0, 0, line
        counted = _COUNTS.search(line) if "n_packets=" in line else None
        if counted:
            packets, size = map(int, counted.groups())
            text = _AGES.sub("", _COUNTS.sub("", line, count=1))
        flow = self._known.get(text) or known.get(text) or parse_flow(text)
        known[text] = flow
        return FlowCounter(flow, packets, size)


def find_flow_lines(dump: str) -> Iterator[str]:
    return (line for line in dump.splitlines() if " actions=" in line)


def is_compiled(flow: PresentFlow) -> bool:
    """Neither learned nor shunned: those come and go by themselves."""
    return (
        flow.key.table not in LEARNED_TABLES
        and not is_shun(flow.cookie)
        and not is_learned_shortcut(flow.key.table, flow.cookie)
    )


def parse_flow(line: str) -> PresentFlow:
    """A line without statistics. Raises SwitchError when it is no flow.

    Such as we compile them are taken apart here, in a fiftieth of the time; all others by the package.
    """
    found = _PLAIN.fullmatch(line)
    if found is None:
        return parse_flow_counter(line).flow
    cookie, table, priority, match, actions = found.groups()
    return PresentFlow(FlowKey(int(table), int(priority), match or ""), actions, int(cookie, 16))


_PLAIN = re.compile(
    r" cookie=(0x[0-9a-f]{1,16}), table=(\d{1,3}), priority=(\d{1,5})(?:,(\S+))? actions=(\S+)"
)


def parse_flow_counter(line: str) -> FlowCounter:
    """One line of dump-flows, with or without its statistics. Raises SwitchError when it is no flow."""
    try:
        parsed = OFPFlow(line)
    except Exception as fault:  # the package raises its own ParseError, ValueError or KeyError
        raise SwitchError(f"not a flow: {line!r}: {fault}") from fault
    info, texts = parsed.info, {section.name: section.string for section in parsed.sections}
    match = [part for part in texts["match"].split(",") if part]
    rest = [part for part in match if not part.startswith("priority=")]
    flow = PresentFlow(
        FlowKey(info.get("table", 0), parsed.match.get("priority", 32768), ",".join(rest)),
        texts["actions"],
        info.get("cookie", 0),
    )
    return FlowCounter(flow, info.get("n_packets", 0), info.get("n_bytes", 0))


def parse_learned(line: str) -> LearnedAddress | None:
    """A flow of ADDRESSES or USES, from dump-flows or a flow monitor's event; None for any other."""
    text = line.strip()
    if text.startswith("event="):
        text = text.split(" ", 1)[1]
    try:
        parsed = OFPFlow(f" {text}")
        owner = parse_cookie(parsed.info.get("cookie", 0))
        address = parsed.match.get("nw_src") or parsed.match.get("ipv6_src")
        # The action carries the port that claimed the address last.
        claimed = _CLAIM.search(parsed.orig)
        if owner is None or owner[0] is not CookieKind.ADDRESS or not address or not claimed:
            return None
        return LearnedAddress(
            str(ip_address(str(address).split("/")[0])),
            int(claimed.group(1), 0),
            parsed.info.get("table") == Table.ADDRESSES.number,
            float(parsed.info.get("idle_age", 0.0)),
        )
    except Exception:  # whatever the package raises: a hostile or torn line is no address
        return None


def parse_shunned(line: str) -> Shunned | None:
    """A line of dump-flows with its statistics; None where it is no shunned flow."""
    counter = parse_flow_counter(line)
    owner = parse_cookie(counter.flow.cookie)
    if owner is None or owner[0] is not CookieKind.SHUN:
        return None
    info = OFPFlow(line).info
    age, most = float(str(info.get("duration", "0")).rstrip("s")), info.get("hard_timeout", 0)
    match = counter.flow.key.match
    return Shunned(
        build_match_id(match), match, owner[1], most - age, counter.packets, counter.bytes
    )


# What a SYN makes of a connection's flows, as OVS prints it in OpenFlow 1.5 and before.
ENDED = ("set_field:0->reg7", "load:0->NXM_NX_REG7[]")
_TAKEN = re.compile(
    r"cookie=(0x[0-9a-f]+), duration=([0-9.]+)s, table=\d+, n_packets=(\d+), n_bytes=(\d+), "
    r"((?:[a-z_]+=[^,]*, )*)priority=\d+,(\S+) actions="
)
_IDLE = re.compile(r"idle_age=(\d+)")


def parse_taken(line: str) -> Taken | None:
    """A line of dump-flows with its statistics; None where it is no connection's that takes a shortcut.

    Not by the package's parser: there may be ten thousands of them, and they are looked at each second.
    Raises SwitchError for a line that is no flow.
    """
    found = _TAKEN.search(line)
    if found is None:
        parse_flow_counter(line)
        return None
    if line.rstrip().endswith(ENDED):
        return None
    cookie, age, packets, size, rest, match = found.groups()
    idle = _IDLE.search(rest)
    owner = parse_cookie(int(cookie, 16))
    if owner is None or owner[0] is not CookieKind.SHORTCUT or owner[1] == 0:
        return None
    return Taken(
        build_match_id(match),
        match,
        owner[1],
        float(age),
        float(idle[1]) if idle else 0.0,
        int(packets),
        int(size),
    )


_CLAIM = re.compile(r"actions=(?:load|set_field):(0x[0-9a-f]+|\d+)")
_BUCKET_ID = re.compile(r"bucket_id:\d+,")


def parse_group(line: str) -> Group | None:
    """One line of dump-groups; None for a line that is no group."""
    text = line.strip()
    if not text.startswith("group_id="):
        return None
    head, *buckets = _BUCKET_ID.sub("", text).split(",bucket=")
    fields = dict(part.split("=", 1) for part in head.split(",") if "=" in part)
    return Group(int(fields["group_id"]), fields["type"], tuple(buckets))


_BUCKET_STATS = re.compile(r"bucket\d+:packet_count=(\d+),byte_count=(\d+)")


def parse_group_counter(line: str) -> GroupCounter | None:
    """One line of dump-group-stats; None for a line that is no group."""
    found = re.search(r"group_id=(\d+)", line)
    if found is None:
        return None
    buckets = tuple((int(packets), int(size)) for packets, size in _BUCKET_STATS.findall(line))
    return GroupCounter(int(found.group(1)), buckets)


def is_ours(group_id: int) -> bool:
    return group_id & GROUP_MASK == GROUP_PREFIX


class OpenFlowSwitch:
    """One bridge's OpenFlow connection, e.g. ``unix:/run/openvswitch/br-int.mgmt``; ``tls`` for an ssl one."""

    def __init__(self, target: str, tls: TlsFiles | None = None) -> None:
        self.target = target
        self._tls = tls
        self._options = (*VERSION, *find_options(target, tls))
        self._parser = FlowParser()
        self._take_parser = FlowParser()
        self._kind_parsers: dict[CookieKind, FlowParser] = {}
        # It connects once it has read its input, so one that waits knows nothing of the switch yet.
        argv = ("ovs-ofctl", *self._options, "bundle", target, "-")
        self._bundles = SpareCommand(argv, timeout=SECONDS)

    async def open(self) -> None:
        """Be ready for bundles; until `close`, on this event loop. All else works without it."""
        await self._bundles.begin()

    async def close(self) -> None:
        await self._bundles.close()

    async def _ofctl(self, *argv: str) -> str:
        return await self._ask(run_async(["ovs-ofctl", *self._options, *argv], timeout=SECONDS))

    async def _ask(self, asking: Awaitable[Finished]) -> str:
        try:
            return (await asking).stdout
        except CommandFailed as fault:
            if self._tls is not None and self._options != VERSION:
                # Raises what is wrong with the connection, where that is it: the command says little.
                await asyncio.to_thread(check_openflow, self.target, self._tls)
            raise SwitchError(
                f"the bridge at {self.target} did not take a command: {fault.reason}",
                "check that ovs-vswitchd runs and that this user may open the connection",
            ) from fault

    async def _flow_lines(self, *argv: str) -> Iterator[str]:
        return find_flow_lines(await self._ofctl("dump-flows", *argv))

    async def read_present(self) -> Present:
        """All flows (but learned addresses and shunned flows) and groups of ours. Raises SwitchError."""
        dump, groups = await asyncio.gather(
            self._ofctl("dump-flows", "--no-stats", self.target, OURS), self.read_groups()
        )
        return Present(await self._parser.read(dump), tuple(groups))

    async def read_groups(self) -> frozenset[Group]:
        """All groups of ours. Raises SwitchError."""
        text = await self._ofctl("dump-groups", self.target)
        groups = [parse_group(line) for line in text.splitlines()]
        return frozenset(g for g in groups if g is not None and is_ours(g.group_id))

    async def read_flow_counters(self, kind: CookieKind | None = None) -> tuple[FlowCounter, ...]:
        """Of one kind's flows, or of all."""
        if kind is None:
            return await self._parser.parse_slowly(await self._flow_lines(self.target, OURS))
        parser = self._kind_parsers.setdefault(kind, FlowParser())
        cookie = f"cookie={build_cookie(kind):#x}/{KIND_MASK:#x}"
        return parser.parse(await self._flow_lines(self.target, cookie))

    async def read_group_counters(self) -> tuple[GroupCounter, ...]:
        text = await self._ofctl("dump-group-stats", self.target)
        counters = [parse_group_counter(line) for line in text.splitlines()]
        return tuple(c for c in counters if c is not None and is_ours(c.group_id))

    async def send_bundle(self, bundle: Bundle, more: Sequence[str] = ()) -> None:
        """Send all changes as one OpenFlow bundle: all of it takes effect, or nothing. Raises SwitchError.

        ``more``: further lines of the same bundle.
        """
        if bundle or more:
            text = bundle.text + "".join(f"{line}\n" for line in more)
            await self._ask(self._bundles.run(text))

    async def read_shuns(self) -> tuple[Shunned, ...]:
        """The flows that are shunned now. Raises SwitchError."""
        cookie = f"cookie={build_cookie(CookieKind.SHUN):#x}/{KIND_MASK:#x}"
        table = f"table={Table.CONNECTION.number},{cookie}"
        lines = await self._flow_lines(self.target, table)
        return tuple(filter(None, map(parse_shunned, lines)))

    async def add_shuns(self, flows: Sequence[ShunFlow]) -> None:
        """Shun these, or begin their time anew. Raises SwitchError."""
        await self.send_lines([flow.command for flow in flows])

    async def remove_shuns(self, shunned: Sequence[Shunned]) -> None:
        """Raises SwitchError. One that has ended meanwhile is none the less gone."""
        head = f"flow delete_strict table={Table.CONNECTION.number},priority={PRIORITY}"
        await self.send_lines([f"{head},{one.match}" for one in shunned])

    async def read_shortcuts(self) -> tuple[Taken, ...]:
        """The connections that take a shortcut now, each direction by itself. Raises SwitchError."""
        lines = await self._flow_lines(self.target, f"table={Table.SHORTCUTS.number}")
        # Beside the event loop, which has to send connections back at once: there may be 20,000 flows.
        return await asyncio.to_thread(lambda: tuple(filter(None, map(parse_taken, lines))))

    async def read_take_counters(self) -> tuple[FlowCounter, ...]:
        """What was delivered uninspected, table TAKE alone. Raises SwitchError."""
        lines = await self._flow_lines(self.target, f"table={Table.TAKE.number},{OURS}")
        return self._take_parser.parse(lines)

    async def send_lines(self, lines: Sequence[str]) -> None:
        """Send lines of `ovs-ofctl bundle` as one. Raises SwitchError."""
        await self.send_bundle(Bundle(), lines)

    async def forget_addresses(self, ofport: int) -> None:
        """Delete what was learned of a port that is gone, so that its number can be another VM's."""
        cookie = f"{build_cookie(CookieKind.ADDRESS, ofport):#x}"
        for table in LEARNED_TABLES:
            await self._ofctl("del-flows", self.target, f"table={table},cookie={cookie}/-1")
