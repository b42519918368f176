"""What is read from `ofproto/trace`, and how it is judged."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from steering.errors import SwitchError
from steering.expected import Kind, Treatment
from steering.ledger import (
    GroupUse,
    Output,
    Result,
    Scene,
    Seen,
    find_foreign,
    judge_entry,
    judge_return,
)
from steering.model import Family, OnFailure, Protocol
from steering.switch.foreign import parse_foreign
from steering.switch.trace import ControlSocket, find_frames, find_socket, parse_ports, parse_trace
from steering.witnesses import Case, End, Fragment, State, TraceRequest, Way, Witness
from tests.support.worlds import LANES

PORTS = """\
netdev@ovs-netdev: hit:45 missed:48
  br-int:
    br-int 65534/12: (tap)
    hp-prev-a 200/5: (system)
    patch-up 9/none: (patch: peer=patch-down)
    vnet01 1/6: (system)
    vnet02 2/8: (system)
  br-ex:
    eth0 1/3: (system)
"""

TRACE = """\
Flow: tcp,in_port=1,vlan_tci=0x0000,dl_src=02:48:50:00:00:01,dl_dst=02:48:50:00:00:02,tp_dst=80

bridge("br-int")
----------------
 0. in_port=1, priority 200, cookie 0x4850010000000001
    set_field:0->reg0
    resubmit(,10)
30. ct_state=-trk,ip, priority 100, cookie 0x4850000000000000
    ct(table=30,zone=18512)
    drop
     -> A clone of the packet is forked to recirculate. The forked pipeline will be resumed at table 30.

Final flow: tcp,reg6=0x2,in_port=1
Megaflow: recirc_id=0,ct_state=-trk,eth,ip,in_port=1
Datapath actions: 11,ct(zone=18512),recirc(0x3)

===============================================================================
recirc(0x3) - resume conntrack with ct_state=new|trk
===============================================================================

Flow: recirc_id=0x3,ct_state=new|trk,ct_zone=18512,eth,tcp,reg6=0x2,in_port=1,vlan_tci=0x0000

bridge("br-int")
----------------
    thaw
        Resuming from table 30
50. reg2=0x11, priority 100, cookie 0x4850040000000001
    group:1213202449
     -> bucket 0: not live due to port 200
     -> using bucket 1
    bucket 1
            resubmit(,70)
        70. dl_dst=02:48:50:00:00:02, priority 100, cookie 0x4850010000000002
            output:2

Final flow: recirc_id=0x3,eth,tcp,reg1=0x1
Megaflow: recirc_id=0x3,ct_state=+new-est-rel-rpl-inv+trk,eth,tcp,in_port=1
Datapath actions: ct(commit,zone=18512,mark=0x1/0xffff),8
"""


def test_ports_are_read_with_their_bridge() -> None:
    ports = parse_ports(PORTS)
    assert ports[6] == ("br-int", 1, "vnet01")
    assert ports[3] == ("br-ex", 1, "eth0")
    assert sorted(ports) == [3, 5, 6, 8, 12]


def test_a_trace_is_read_with_its_recirculation_group_and_path() -> None:
    seen = parse_trace(TRACE, "br-int", parse_ports(PORTS))
    assert seen.outputs == (Output(0, "datapath port 11"), Output(2, "vnet02"))
    assert seen.told == {2}
    assert seen.groups == (GroupUse(1213202449, 1, ("not live due to port 200",)),)
    assert seen.path == (
        (0, 200, 0x4850010000000001),
        (30, 100, 0x4850000000000000),
        (50, 100, 0x4850040000000001),
        (70, 100, 0x4850010000000002),
    )
    assert not seen.normal


def test_a_port_of_another_bridge_is_no_port_of_ours() -> None:
    text = "Flow: in_port=1\n 0. priority 0\n    output:9\nDatapath actions: 3,6\n"
    seen = parse_trace(text, "br-int", parse_ports(PORTS))
    assert seen.outputs == (Output(0, "eth0"), Output(1, "vnet01"))


@pytest.mark.parametrize(
    ("actions", "tagged", "frames"),
    [
        ("drop", None, ()),
        ("push_vlan(vid=3901,pcp=0),5", None, ((5, 3901),)),
        ("pop_vlan,8", 3901, ((8, None),)),
        ("11,push_vlan(vid=3,pcp=0),8,pop_vlan,9", None, ((11, None), (8, 3), (9, None))),
        ("clone(push_vlan(vid=7,pcp=0),5),8", None, ((5, 7), (8, None))),
        ("set(vlan(vid=3902,pcp=0)),7", 3901, ((7, 3902),)),
        ("sample(sample=50.0%,actions(userspace(pid=0,flow_sample(probability=1)),5)),8", None,
         ((5, None), (8, None))),
        ("trunc(100),11,check_pkt_len(size=200,gt(drop),le(5))", None, ((11, None), (5, None))),
    ],
)  # fmt: skip
def test_frames_are_found_in_nested_actions_with_their_tags(
    actions: str, tagged: int | None, frames: tuple[tuple[int, int | None], ...]
) -> None:
    assert find_frames(actions, tagged) == frames


def test_actions_that_nobody_knows_are_an_error_and_a_broken_translation_is_told() -> None:
    with pytest.raises(SwitchError, match="not understood"):
        find_frames("teleport(5)", None)
    with pytest.raises(SwitchError, match="no datapath actions"):
        parse_trace("Flow: in_port=1\n", "br-int", {})
    text = "Flow: in_port=1\nTranslation failed (Too many resubmits), packet is dropped.\n"
    assert parse_trace(text, "br-int", {}).fault == "the switch gave up on it: Too many resubmits"


def test_flooding_is_told_from_a_learned_port() -> None:
    text = "Flow: in_port=1\n 0. priority 0\n    NORMAL\n     -> {}\nDatapath actions: 6,8\n"
    ports = parse_ports(PORTS)
    flooded = parse_trace(text.format("no learned MAC for destination, flooding"), "br-int", ports)
    learned = parse_trace(text.format("forwarding to learned port"), "br-int", ports)
    assert (flooded.normal, flooded.wide) == (True, True)
    assert (learned.normal, learned.wide) == (True, False)


# The socket


def serve(path: Path, *answers: bytes) -> threading.Thread:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer() -> None:
        with listener, listener.accept()[0] as client:
            for one in answers:
                client.recv(65536)
                for start in range(0, len(one), 7):
                    client.sendall(one[start : start + 7])

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return thread


def test_answers_come_in_pieces_and_may_have_braces_inside(tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    serve(
        path, b'{"id":1,"result":"a } b","error":null}', b'{"id":2,"result":null,"error":"no {}"}'
    )
    with ControlSocket(path) as control:
        assert control.call("ofproto/trace", []) == "a } b"
        with pytest.raises(SwitchError, match=r"refused ofproto/trace: no \{\}"):
            control.call("ofproto/trace", [])


@pytest.mark.parametrize("answer", [b"", b"nonsense}", b'{"id":99,"result":"x","error":null}'])
def test_a_switch_that_does_not_answer_is_an_error_in_time(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "ctl"
    serve(path, answer)
    with (
        ControlSocket(path, seconds=0.3) as control,
        pytest.raises(SwitchError, match="did not answer dpif/show"),
    ):
        control.read_ports()


# The judge

WEB = End("vm-1", "web-1", "vnet1", 1, "02:00:00:00:00:01", ("br-int", None), "10.0.0.1", "fd::1")
APP = End("vm-2", "app-1", "vnet2", 2, "02:00:00:00:00:02", ("br-int", None), "10.0.0.2", "fd::2")
CASE = Case(Family.IPV4, Protocol.TCP, 80, Fragment.WHOLE, Way.OPENER, State.NEW)
WITNESS = Witness(WEB, APP, CASE)
UP = Scene(LANES, {"prevent": True, "detect": True}, frozenset({1, 2, 3}))
DOWN = Scene(LANES, {"prevent": False, "detect": True}, frozenset({1, 2, 3}))
OPEN = Treatment(Kind.INSPECTED, "p", LANES[0], False, OnFailure.OPEN)
CLOSED = Treatment(Kind.INSPECTED, "p", LANES[0], False, OnFailure.CLOSED)
DIRECT = Treatment(Kind.DIRECT, None)
DENIED = Treatment(Kind.DENIED, "p")
LEG_A = Output(201, "p-a", 3901)
RECEIVER = Output(2, "vnet2")
COPY = Output(290, "hp-mirror")
GROUP = (GroupUse(1, 1),)


@pytest.mark.parametrize(
    ("expected", "seen", "scene", "result"),
    [
        (OPEN, Seen((COPY, LEG_A)), UP, Result.INSPECTED),
        (OPEN, Seen((LEG_A, LEG_A)), UP, Result.VIOLATION),
        (OPEN, Seen((LEG_A, RECEIVER)), UP, Result.VIOLATION),
        (OPEN, Seen((Output(202, "p-b", 3901),)), UP, Result.VIOLATION),
        (OPEN, Seen((Output(201, "p-a", 3902),)), UP, Result.VIOLATION),
        (OPEN, Seen((Output(201, "p-a"),)), UP, Result.VIOLATION),
        (OPEN, Seen((RECEIVER,), groups=GROUP), UP, Result.VIOLATION),
        (OPEN, Seen((RECEIVER,), groups=GROUP), DOWN, Result.BYPASSED),
        (OPEN, Seen((RECEIVER,)), DOWN, Result.VIOLATION),
        (OPEN, Seen((RECEIVER,), groups=GROUP, normal=True), DOWN, Result.VIOLATION),
        (OPEN, Seen(), DOWN, Result.VIOLATION),
        (CLOSED, Seen(), DOWN, Result.BLOCKED),
        (CLOSED, Seen(), UP, Result.VIOLATION),
        (CLOSED, Seen((RECEIVER,), groups=GROUP), DOWN, Result.VIOLATION),
        (DENIED, Seen((COPY,)), UP, Result.DENIED),
        (DENIED, Seen((RECEIVER,)), UP, Result.VIOLATION),
        (DENIED, Seen((Output(3, "vnet3"),)), UP, Result.VIOLATION),
        (DENIED, Seen((Output(9, "uplink"),), told=frozenset({9})), UP, Result.VIOLATION),
        (DIRECT, Seen((COPY, RECEIVER), normal=True), UP, Result.DIRECT),
        (DIRECT, Seen((RECEIVER, Output(3, "vnet3"), Output(9, "uplink")), normal=True, wide=True),
         UP, Result.DIRECT),
        (DIRECT, Seen((RECEIVER, Output(3, "vnet3")), normal=True), UP, Result.VIOLATION),
        (DIRECT, Seen((RECEIVER, LEG_A), normal=True, wide=True), UP, Result.VIOLATION),
        (DIRECT, Seen((Output(3, "vnet3"),), normal=True), UP, Result.VIOLATION),
        (DIRECT, Seen(fault="too many resubmits"), UP, Result.VIOLATION),
    ],
)  # fmt: skip
def test_what_is_seen_is_judged(
    expected: Treatment, seen: Seen, scene: Scene, result: Result
) -> None:
    assert judge_entry(WITNESS, (expected,), seen, scene).result is result


def test_what_comes_back_leaves_once_untagged_by_its_own_port() -> None:
    for outputs, result in (
        ((RECEIVER, COPY), Result.INSPECTED),
        ((Output(2, "vnet2", 3901),), Result.VIOLATION),
        ((Output(3, "vnet3"),), Result.VIOLATION),
        ((RECEIVER, Output(3, "vnet3")), Result.VIOLATION),
        ((LEG_A,), Result.VIOLATION),
        ((), Result.VIOLATION),
    ):
        assert judge_return(WITNESS, OPEN, Seen(outputs), UP).result is result


def test_flows_of_others_that_may_go_first_are_found() -> None:
    lines = [
        " cookie=0x77, table=0, priority=200,udp actions=NORMAL",
        " cookie=0x77, table=0, priority=199,udp actions=NORMAL",
        " cookie=0x77, table=0, priority=250,in_port=9 actions=NORMAL",
        " cookie=0x77, table=0, priority=250,in_port=1 actions=NORMAL",
        " cookie=0x77, table=0, priority=299,in_port=201 actions=NORMAL",
        " table=0, priority=0 actions=NORMAL",
        " table=40, priority=1,ip actions=drop",
        " table=41, priority=1,ip actions=drop",
        " something else that has actions=drop",
    ]
    found = find_foreign([parse_foreign(line) for line in lines], [WEB, APP], LANES)
    assert [one.flow for one in found] == [lines[n].strip() for n in (0, 3, 6, 8)]


def test_a_request_is_ready_for_a_shell() -> None:
    request = TraceRequest("br-int", "in_port=1,ip", "trk,new")
    assert str(request) == "br-int 'in_port=1,ip' --ct-next 'trk,new'"
    assert request.arguments == ["br-int", "in_port=1,ip", "--ct-next", "trk,new"]


def test_the_socket_is_found_by_the_pid_file_after_every_start(tmp_path: Path) -> None:
    named = tmp_path / "ovs-vswitchd.ctl"
    assert find_socket(named) == named
    pid_file = tmp_path / "ovs-vswitchd.pid"
    for pid in (17, 4242):
        pid_file.write_text(f"{pid}\n")
        assert find_socket(pid_file) == tmp_path / f"ovs-vswitchd.{pid}.ctl"
    pid_file.write_text("nonsense")
    with ControlSocket(pid_file) as control, pytest.raises(SwitchError, match="did not answer"):
        control.read_ports()
