"""What the preloaded library makes of connections that are let go, and of hostile packets."""

from __future__ import annotations

import ctypes
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.compat import raw
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import GRE, Dot1Q
from scapy.packet import Packet, Raw

from appliance.inspection.shortcut import (
    CLASS_SHIFT,
    FINAL,
    STATE_SIZE,
    UNTIL_AT,
    LibraryFigures,
    build_state_file,
    build_until,
    find_class_mark,
    find_trigger_mark,
    parse_state_file,
)
from appliance.paths import find_queue_library
from steering.model import Trigger

LANE_MARK = 0x100
SIZE = find_class_mark(Trigger.ONE_MEGABYTE) | LANE_MARK
TRIGGERED = SIZE | find_trigger_mark(Trigger.ONE_MEGABYTE)
WRAP = 32
DROP, ACCEPT = 0, 1


@dataclass
class Library:
    """A copy of the library of its own, with its table and its file. Times are in ms."""

    loaded: ctypes.CDLL
    state: Path
    now: int = 10_000_000
    number: int = 0
    firsts: list[bytes] = field(default_factory=list)

    def allow(self, until: float) -> None:
        content = self.state.read_bytes()
        with self.state.open("r+b") as stream:
            stream.seek(UNTIL_AT)
            stream.write(build_until(until))
        assert len(content) == STATE_SIZE

    def take(self, packet: Packet | bytes, mark: int = SIZE) -> bytes:
        """What the engine sees of a packet."""
        self.number = (self.number + 1) & 0xFFFFFFFF
        content = packet if isinstance(packet, bytes) else raw(packet)
        buffer = ctypes.create_string_buffer(content + b"GUARD", len(content) + 5)
        at = ctypes.c_void_p(ctypes.addressof(buffer))
        size = self.loaded.hairpin_take_packet(
            mark, self.number, ctypes.byref(at), len(content), self.now
        )
        assert buffer.raw == content + b"GUARD", "the packet itself is never touched"
        seen = ctypes.string_at(at, size)
        ids = (ctypes.c_uint32 * 64)()
        if self.loaded.hairpin_find_first(ctypes.c_uint32(self.number), 0, ids) == 0:
            return seen
        # As the queue does: it comes again, and is seen whole.
        assert ids[0] == self.number
        self.forget()
        assert len(self.firsts) < 1000
        self.firsts.append(seen)
        return self.take(content, mark)

    def decide(
        self, mark: int = TRIGGERED, *, verdict: int = ACCEPT, batch: bool = False, number: int = 0
    ) -> bool:
        """Whether the verdict for the last packet has the final bit; else the mark is the engine's."""
        sent = self.loaded.hairpin_decide(number or self.number, verdict, mark, batch, self.now)
        assert sent & ~FINAL == mark & ~FINAL
        return bool(sent & FINAL)

    def forget(self, verdict: int = ACCEPT, *, batch: bool = False) -> None:
        """A verdict without a mark."""
        self.loaded.hairpin_forget(ctypes.c_uint32(self.number), verdict, int(batch))

    def let_go(self, packet: Packet, mark: int = SIZE) -> bool:
        self.take(packet, mark)
        return self.decide()

    @property
    def figures(self) -> LibraryFigures:
        found = parse_state_file(self.state.read_bytes())
        assert found is not None
        return found


@pytest.fixture
def library(tmp_path: Path) -> Library:
    built = find_queue_library()
    assert built is not None, "run `make setup`"
    # Under another name it is loaded anew, with variables of its own.
    copy = shutil.copy(built, tmp_path / f"copy-{time.monotonic_ns()}.so")
    state = tmp_path / "shortcut.state"
    state.write_bytes(build_state_file(300))
    loaded = ctypes.CDLL(str(copy))
    loaded.hairpin_take_packet.argtypes = [
        ctypes.c_uint32, ctypes.c_uint32, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int64,
    ]  # fmt: skip
    loaded.hairpin_decide.argtypes = [ctypes.c_uint32] * 3 + [ctypes.c_int, ctypes.c_int64]
    loaded.hairpin_decide.restype = ctypes.c_uint32
    assert loaded.hairpin_open_state(str(state).encode())
    made = Library(loaded, state)
    made.allow(1e9)
    return made


ENDS = {IP: ("10.0.0.1", "10.0.0.2"), IPv6: ("fd00::1", "fd00::2")}


def segment(
    seq: int = 1000, ack: int = 5000, data: bytes = b"", *, flags: str = "A", up: bool = True,
    family: type[Packet] = IP, port: int = 40_000,
) -> Packet:  # fmt: skip
    one, other = ENDS[family] if up else reversed(ENDS[family])
    sport, dport = (port, 80) if up else (80, port)
    header = TCP(sport=sport, dport=dport, flags=flags, seq=seq % 2**32, ack=ack % 2**32)
    return family(src=one, dst=other) / header / Raw(data)


def find_epoch(seen: bytes, packet: Packet) -> int:
    """0 when the packet was seen as it is; else it must be wrapped rightly."""
    if seen == raw(packet):
        return 0
    assert seen[WRAP:] == raw(packet)
    outer = IP(seen)
    assert (outer.version, outer.ihl, outer.len, outer.proto) == (4, 5, len(seen), 47)
    assert (outer.src, outer.dst) == ("127.72.80.1", "127.72.80.2")
    again = outer.copy()
    again.chksum = None
    assert IP(raw(again)).chksum == outer.chksum
    assert raw(outer[GRE])[:4] == b"\0\0\x81\0"
    low = Dot1Q(seen[24:])
    high = Dot1Q(seen[28:])
    assert low.type == 0x8100
    assert high.type == (0x0800 if IP in packet else 0x86DD)
    return int(high.vlan << 12 | low.vlan)


@pytest.mark.parametrize("family", [IP, IPv6])
def test_a_connection_goes_is_followed_and_returns(library: Library, family: type[Packet]) -> None:
    first = segment(data=b"x" * 500, family=family)
    assert library.take(first) == raw(first)
    assert library.decide()
    library.now += 3
    # What the engine saw up to now, and goes on where it was.
    for late in (
        segment(1500, data=b"y" * 100, family=family),
        segment(1200, data=b"again", family=family),
        segment(5000, 1600, up=False, family=family),
    ):
        assert library.take(late) == raw(late)
        library.now += 3
    # The rest passed elsewhere meanwhile.
    back = segment(3_000_000, 9000, b"back", family=family)
    epoch = find_epoch(library.take(back), back)
    assert epoch == 1
    assert not library.decide()
    answer = segment(9000, 3_000_004, up=False, family=family)
    assert find_epoch(library.take(answer), answer) == epoch
    # As the other side begins to speak, once: the head of an answer, mostly.
    spoken = segment(9000, 3_000_004, b"HTTP/1.1 200 OK", up=False, family=family)
    assert find_epoch(library.take(spoken), spoken) == epoch + 1
    epoch += 1
    library.now += 60_000
    again = segment(3_000_004, 9000, b"x" * 60_000, family=family)
    assert find_epoch(library.take(again), again) == epoch
    assert (library.figures.entered, library.figures.returned, library.figures.present) == (1, 1, 1)


RETURNS = {
    "a gap": (lambda: segment(1501), 3),
    "an acknowledgement of what was not seen": (lambda: segment(1500, 5001), 3),
    "from the other side": (lambda: segment(5001, 1500, up=False), 3),
    "something far behind": (lambda: segment(1500 - 1_000_001), 3),
}


def test_one_that_the_switch_did_not_take_is_what_it_was_after_any_pause(library: Library) -> None:
    assert library.let_go(segment(data=b"x" * 500))
    for number in range(5):
        library.now += 60_000
        late = segment(1500 + 10 * number, data=b"y" * 10)
        assert library.take(late) == raw(late)
    assert library.figures.returned == 0


@pytest.mark.parametrize("name", RETURNS)
def test_what_does_not_go_on_where_the_engine_was_has_returned(library: Library, name: str) -> None:
    make, pause = RETURNS[name]
    assert library.let_go(segment(data=b"x" * 500))
    library.now += pause
    assert find_epoch(library.take(make()), make()) == 1
    assert library.figures.returned == 1


def test_sequence_numbers_go_round(library: Library) -> None:
    assert library.let_go(segment(2**32 - 100, 2**32 - 50, b"x" * 200))
    late = segment(100, 2**32 - 50, b"y")
    assert library.take(late) == raw(late)
    assert find_epoch(library.take(segment(102)), segment(102)) == 1


def test_a_syn_is_a_new_connection_and_never_goes(library: Library) -> None:
    assert not library.let_go(segment(ack=0, flags="S"))
    assert library.let_go(segment(data=b"x" * 500))
    syn = segment(77, 0, flags="S")
    assert find_epoch(library.take(syn), syn) == 1
    assert not library.decide()
    both = segment(99, 78, flags="SA", up=False)
    assert find_epoch(library.take(both), both) == 1
    another = segment(200, 0, flags="S")
    assert find_epoch(library.take(another), another) == 1, "or a SYN could tear a signature in two"
    assert (library.figures.renewed, library.figures.returned) == (1, 0)


def test_what_the_switch_does_not_take_within_a_second_is_never_let_go_again(
    library: Library,
) -> None:
    """Its table is full, or it was told to send all back, or the third leg leads nowhere."""
    assert library.let_go(segment(1000, data=b"x" * 500))
    library.now += 900
    assert library.let_go(segment(1500, data=b"x" * 500))
    library.now += 200
    more = segment(2000, data=b"x" * 500)
    assert library.take(more) == raw(more), "nothing was missed, so its identity stays"
    assert not library.decide()
    assert not library.let_go(segment(2500, data=b"x" * 500))


@pytest.mark.parametrize("flags", ["S", "SA", "FA", "RA", "R", "F", ""])
def test_only_a_packet_in_the_middle_goes(library: Library, flags: str) -> None:
    assert not library.let_go(segment(flags=flags, data=b"x"))
    assert library.figures.entered == 0


def test_one_trigger_lets_no_other_class_go(library: Library) -> None:
    for trigger in Trigger:
        for other in Trigger:
            mark = find_class_mark(trigger) | LANE_MARK
            library.take(segment(port=41_000, data=b"x"), mark)
            went = library.decide(mark | find_trigger_mark(other))
            assert went is (trigger is other)
    library.take(segment(port=42_000), LANE_MARK)
    every = sum(find_trigger_mark(trigger) for trigger in Trigger)
    assert not library.decide(LANE_MARK | every)
    for code in (6, 7):
        library.take(segment(port=42_000), code << CLASS_SHIFT)
        assert not library.decide(code << CLASS_SHIFT | every)


def test_what_the_engine_drops_or_did_not_mark_stays(library: Library) -> None:
    library.take(segment())
    assert not library.decide(verdict=DROP)
    library.take(segment())
    assert not library.decide(SIZE)
    # A final bit of anybody else's is taken out.
    library.take(segment())
    assert not library.decide(SIZE | FINAL)
    assert library.figures.present == 0


@pytest.mark.parametrize("mark", [SIZE, LANE_MARK])
def test_what_the_engine_dropped_keeps_its_identity_when_it_is_sent_again(
    library: Library, mark: int
) -> None:
    """Under another identity the engine would not know that it dropped the connection."""
    assert library.let_go(segment(data=b"x" * 500))
    attack = segment(1500, data=b"second half")
    library.take(attack, mark)
    library.forget(DROP)
    for _ in range(3):
        library.now += 20_000
        assert library.take(attack, mark) == raw(attack)
        assert not library.decide(mark | find_trigger_mark(Trigger.ONE_MEGABYTE))
    beyond = segment(9_000, 9_000)
    assert library.take(beyond, mark) == raw(beyond)
    # One that returned likewise: no turn any more.
    other = segment(port=41_000, data=b"x" * 500)
    assert library.let_go(other)
    back = segment(9000, port=41_000, data=b"back")
    epoch = find_epoch(library.take(back, mark), back)
    assert epoch
    library.decide(mark | find_trigger_mark(Trigger.ONE_MEGABYTE), verdict=DROP)
    answer = segment(5000, 9004, b"answer", up=False, port=41_000)
    assert find_epoch(library.take(answer, mark), answer) == epoch
    # Whatever SYN comes now: the engine, which knows what it dropped, judges it.
    syn = segment(1, 0, flags="S", port=41_000)
    assert find_epoch(library.take(syn, mark), syn) == epoch


def test_a_class_that_is_taken_away_leaves_returned_connections_what_they_are(
    library: Library,
) -> None:
    assert library.let_go(segment(data=b"x" * 500))
    library.now += 1000
    back = segment(9000)
    assert find_epoch(library.take(back, LANE_MARK), back) == 1
    # Nobody else is looked at otherwise for that.
    other = segment(port=41_000)
    assert library.take(other, LANE_MARK) == raw(other)


def test_without_leave_nothing_goes(library: Library) -> None:
    library.allow(0)
    assert not library.let_go(segment())
    library.allow(library.now / 1000)
    assert not library.let_go(segment())
    library.allow(library.now / 1000 + 1)
    assert library.let_go(segment())


def test_without_a_file_nothing_goes(tmp_path: Path) -> None:
    built = find_queue_library()
    assert built is not None
    loaded = ctypes.CDLL(str(shutil.copy(built, tmp_path / "alone.so")))
    loaded.hairpin_decide.restype = ctypes.c_uint32
    alone = Library(loaded, tmp_path / "none")
    loaded.hairpin_take_packet.argtypes = [
        ctypes.c_uint32, ctypes.c_uint32, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int64,
    ]  # fmt: skip
    loaded.hairpin_decide.argtypes = [ctypes.c_uint32] * 3 + [ctypes.c_int, ctypes.c_int64]
    assert not alone.let_go(segment())
    for name, content in (("short", b"HAIRPIN1"), ("other", b"X" * STATE_SIZE)):
        (tmp_path / name).write_bytes(content)
        assert not loaded.hairpin_open_state(str(tmp_path / name).encode())
    (tmp_path / "link").symlink_to(tmp_path / "other")
    assert not loaded.hairpin_open_state(str(tmp_path / "link").encode())


def test_a_batch_goes_whole_or_not_at_all(library: Library) -> None:
    for port in (41_000, 42_000, 43_000):
        library.take(segment(port=port))
    assert library.decide(batch=True)
    assert library.figures.entered == 3
    for flags in ("A", "FA", "A"):
        library.take(segment(port=44_000, flags=flags))
    assert not library.decide(batch=True)
    assert (library.figures.entered, library.figures.refused_mixed) == (3, 1)
    library.take(segment(port=45_000))
    library.take(raw(IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2)))
    assert not library.decide(batch=True)
    # One that returned does not go again, and keeps others of its batch.
    library.now += 100
    library.take(segment(9_000_000, port=41_000))
    library.take(segment(port=46_000))
    assert not library.decide(batch=True)
    assert library.figures.entered == 3


def test_all_that_is_in_a_batch_was_seen(library: Library) -> None:
    for number in range(20):
        library.take(segment(1000 + number * 100, data=b"x" * 100))
        library.take(segment(5000, 1100 + number * 100, b"yy", up=False))
    assert library.decide(batch=True)
    for late in (segment(3000, 5002, b"x"), segment(5002, 3000, up=False)):
        assert library.take(late) == raw(late)
    assert (library.figures.entered, library.figures.returned) == (1, 0)


def test_a_batch_is_what_came_up_to_its_number(library: Library) -> None:
    library.number = 2**32 - 3
    first = segment(port=41_000)
    library.take(first)
    library.take(segment(port=42_000))
    upto = library.number
    library.take(segment(port=43_000))
    library.take(segment(port=44_000))
    assert library.number < upto
    assert library.decide(batch=True, number=upto)
    assert library.figures.entered == 2
    assert library.decide(batch=False)
    assert library.figures.entered == 3
    library.forget(batch=True)
    assert not library.decide(batch=True), "nothing waits any more"


def test_more_packets_than_are_remembered_do_not_go_in_a_batch(library: Library) -> None:
    for _ in range(100):
        library.take(segment())
    assert not library.decide(batch=True)
    assert library.let_go(segment())


SEGMENT = raw(segment())


def build_from(address: int) -> bytes:
    return SEGMENT[:12] + address.to_bytes(4, "big") + SEGMENT[16:]


def test_the_table_is_bounded_and_silence_makes_room(library: Library) -> None:
    went = 0
    for number in range(90_000):
        packet = build_from(0x0A000000 + number)
        library.take(packet)
        went += library.decide()
    figures = library.figures
    assert went == figures.entered == figures.present < 65_537
    assert figures.refused_full == 90_000 - went > 0
    library.now += 400_000
    assert library.let_go(segment(port=50_000))
    # The engine has forgotten it by now, and sees it anew as it is.
    old = build_from(0x0A000000)
    assert library.take(old) == old


def test_one_that_finds_no_room_keeps_its_batch_and_leaves_nothing(library: Library) -> None:
    refused = None
    for number in range(90_000):
        packet = build_from(0x0A000000 + number)
        library.take(packet)
        if not library.decide():
            refused = packet
            break
    assert refused is not None
    before = library.figures
    library.now += 1
    for port in range(41_000, 41_008):
        library.take(segment(port=port))
    library.take(refused)
    assert not library.decide(batch=True)
    assert (library.figures.entered, library.figures.present) == (before.entered, before.present)


def test_what_is_too_long_is_seen_as_it_is(library: Library) -> None:
    assert library.let_go(segment())
    library.now += 1000
    fits = segment(9000, data=b"x" * (65_535 - WRAP - 40))
    assert len(library.take(fits)) == 65_535
    longer = segment(9000, data=b"x" * (65_535 - WRAP - 39))
    assert library.take(longer) == raw(longer)
    assert library.figures.too_long == 1


HOSTILE = {
    "a fragment": raw(IP(flags="MF") / TCP(flags="A") / Raw(b"x" * 40)),
    "a fragment of IPv6": raw(IPv6() / IPv6ExtHdrFragment(m=1) / TCP(flags="A")),
    "a TCP header cut off": raw(IP() / TCP(flags="A"))[:30],
    "a TCP header beyond the packet": raw(IP() / TCP(flags="A", dataofs=15)),
    "a TCP header too short": raw(IP() / TCP(flags="A", dataofs=4)),
    "a length beyond the packet": raw(IP(len=4000) / TCP(flags="A")),
    "a header alone": raw(IP(proto=6)),
    "one byte": b"\x45",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_whole_segment_never_goes(library: Library, name: str) -> None:
    library.let_go(segment(port=41_000))
    assert library.take(HOSTILE[name]) == HOSTILE[name]
    assert not library.decide()
    assert library.figures.entered == 1


@given(packets=st.lists(st.binary(min_size=1, max_size=120), max_size=30))
def test_any_bytes_are_survived(packets: list[bytes]) -> None:
    loaded = ctypes.CDLL(str(find_queue_library()))
    for number, packet in enumerate(packets):
        buffer = ctypes.create_string_buffer(packet + b"GUARD", len(packet) + 5)
        at = ctypes.c_void_p(ctypes.addressof(buffer))
        loaded.hairpin_take_packet(
            ctypes.c_uint32(SIZE), number, ctypes.byref(at), len(packet), ctypes.c_int64(1)
        )
        loaded.hairpin_decide(number, 1, ctypes.c_uint32(TRIGGERED), number % 2, ctypes.c_int64(1))
        assert buffer.raw == packet + b"GUARD"


@pytest.mark.parametrize("family", [IP, IPv6])
def test_what_begins_an_epoch_is_seen_first_without_what_it_carries(
    library: Library, family: type[Packet]
) -> None:
    """Suricata says of a connection's first packet that it is of none established, and most rules ask."""
    assert library.let_go(segment(family=family))
    returned = segment(9000, data=b"GET / HTTP/1.1\r\n\r\n", flags="PA", family=family)
    seen = library.take(returned)
    (headers,) = library.firsts
    bare = segment(9000, flags="A", family=family)
    assert headers[WRAP:] == raw(bare), "its headers alone, with the right lengths and checksums"
    assert headers[20:WRAP] == seen[20:WRAP], "of the same epoch"
    assert seen[WRAP:] == raw(returned)
    library.take(segment(9000 + 18, data=b"more", family=family))
    assert len(library.firsts) == 1, "the next one is not the first"
    library.take(segment(5000, 9022, b"HTTP/1.1 200 OK", up=False, family=family))
    assert len(library.firsts) == 2, "the other side begins the second epoch"


def test_an_epoch_that_begins_with_nothing_carried_needs_no_second_look(library: Library) -> None:
    assert library.let_go(segment())
    library.take(segment(9000))
    library.take(segment(77_000, 0, flags="S"))
    assert library.firsts == []
