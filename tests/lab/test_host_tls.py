"""The switch by TLS, both ends verified: what Hairpin does with it works, and what is wrong is refused and told.

A real ovsdb-server and ovs-vswitchd (dummy datapath) on loopback.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from appliance.hosting.pki import Issued, Pki, issue, renew
from steering.change import SwitchStatus
from steering.errors import SwitchError
from steering.events import SteeringEvent, SwitchChanged
from steering.model import PolicySet
from steering.peer import find_peer_fault
from steering.pipeline import CookieKind, build_cookie
from steering.reconcile import Reconciler
from steering.revive import Reviver
from steering.run import run
from steering.shortcut import Return
from steering.switch.foreign import read_foreign
from steering.switch.monitor import FlowMonitor
from steering.tls import TlsFiles
from tests.support.dummy_switch import BRIDGE
from tests.support.shortcut_world import (
    LANE,
    LANES,
    OFPORTS,
    VMS,
    attach_vms,
    build_policies,
    build_segment,
)
from tests.support.tls_switch import (
    ADDRESS,
    NAME,
    TlsSwitch,
    open_tls_switch,
    speak_old,
    speak_plainly,
    write_files,
)
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]

DAY = 86400.0
ECHO = b'{"id":0,"method":"echo","params":[]}'


@pytest.fixture
def tls() -> Iterator[TlsSwitch]:
    with (
        tempfile.TemporaryDirectory(prefix="hp-") as name,
        open_tls_switch(Path(name), OFPORTS, time.time()) as switch,
    ):
        attach_vms(switch.switch)
        yield switch


@dataclass
class Steered:
    tls: TlsSwitch
    reconciler: Reconciler
    told: list[SteeringEvent]

    def dump(self, table: str = "") -> str:
        argv = ["ovs-ofctl", "-O", "OpenFlow15", "dump-flows", self.tls.switch.target]
        return self.tls.switch.run(*argv, *([f"table={table}"] if table else []))


def build_reconciler(
    tls: TlsSwitch, files: TlsFiles | None, told: list[SteeringEvent]
) -> Reconciler:
    return Reconciler(
        ovsdb=tls.ovsdb, openflow=tls.openflow, bridge=BRIDGE, lanes=LANES, on_event=told.append, tls=files
    )  # fmt: skip


@pytest.fixture
async def steered(tls: TlsSwitch) -> AsyncIterator[Steered]:
    told: list[SteeringEvent] = []
    reconciler = build_reconciler(tls, tls.ours, told)
    try:
        await reconciler.start(PolicySet())
        await wait_until(lambda: len(reconciler.machines()) == len(VMS))
        yield Steered(tls, reconciler, told)
    finally:
        await reconciler.close()


async def is_settled(steered: Steered) -> bool:
    return not (await steered.reconciler.plan(build_policies())).bundle


async def test_vms_are_found_policies_applied_and_drift_is_mended(steered: Steered) -> None:
    assert (await steered.reconciler.apply(build_policies())).bundle
    assert await is_settled(steered)
    before = steered.dump().count("cookie=0x4850")
    steered.tls.switch.run(
        "ovs-ofctl", "-O", "OpenFlow15", "del-flows", steered.tls.switch.target, "table=0"
    )
    await wait_until(lambda: steered.dump().count("cookie=0x4850") == before, 10.0)
    assert steered.reconciler.status.reachable


async def test_addresses_are_told_as_the_switch_learns_them(steered: Steered) -> None:
    """By the flow monitor, the one connection that lasts."""
    await steered.reconciler.apply(build_policies())
    steered.tls.switch.send(1, build_segment(1, 2, 4000, 80, "S"))
    await wait_until(lambda: any("10.0.0.1" in str(event) for event in steered.told))


async def test_a_quarantine_a_counter_and_a_shortcut_s_return_go_by_tls(steered: Steered) -> None:
    await steered.reconciler.apply(build_policies())
    await steered.reconciler.shut_off(frozenset({"vm-1"}))
    await wait_until(lambda: steered.dump().count("actions=drop") > 2)
    await steered.reconciler.read_counters()
    assert await steered.reconciler.read_shortcuts() == ()
    assert await steered.reconciler.return_shortcuts(Return()) >= 0.0
    assert await steered.reconciler.read_shuns() == ()


async def test_a_port_that_comes_is_steered(steered: Steered) -> None:
    await steered.reconciler.apply(build_policies())
    steered.tls.switch.add_port(77)
    steered.tls.vsctl(
        "set", "Interface", "p77", "external_ids:vm-id=vm-77",
        'external_ids:attached-mac="02:00:00:00:00:77"', "external_ids:iface-id=if-77",
    )  # fmt: skip
    await wait_until(lambda: len(steered.reconciler.machines()) == len(VMS) + 1)
    await wait_until(lambda: is_settled(steered))
    assert "in_port=77" in steered.dump("0")


async def test_bfd_is_restarted_and_foreign_flows_are_read_by_tls(steered: Steered) -> None:
    tls = steered.tls
    legs = [LANE.leg_a.interface, LANE.leg_b.interface]
    for leg in legs:
        tls.vsctl("set", "Interface", leg, "bfd:enable=true", "bfd:min_tx=50")
    await Reviver(tls.ovsdb, tls.ours).revive(LANE)
    assert tls.vsctl("get", "Interface", legs[1], "bfd:enable", "bfd:min_tx").split() == [
        '"true"',
        '"50"',
    ]
    tls.switch.run("ovs-ofctl", "add-flow", tls.switch.target, "priority=9,in_port=1,actions=drop")
    foreign = await asyncio.to_thread(read_foreign, tls.openflow, tls.ours)
    assert [(key.priority, port) for key, port, _ in foreign] == [(9, "1")]


async def test_the_flow_monitor_is_there_again_after_the_switch_came_back(steered: Steered) -> None:
    await steered.reconciler.apply(build_policies())
    await wait_until(lambda: steered.reconciler.status.reachable)
    steered.tls.vsctl("del-manager", "--", "del-controller", BRIDGE)
    await wait_until(lambda: "nobody listens" in steered.reconciler.status.reason, 15.0)
    steered.tls.listen("pssl")
    await wait_until(lambda: steered.reconciler.status.reachable, 15.0)
    changed = [event for event in steered.told if isinstance(event, SwitchChanged)]
    assert [event.reachable for event in changed][-2:] == [False, True]
    steered.tls.switch.send(2, build_segment(2, 1, 4000, 80, "S"))
    await wait_until(lambda: any("10.0.0.2" in str(event) for event in steered.told))


# What is wrong: each is refused, and both connections say why


@dataclass(frozen=True)
class Wrong:
    """``break_it`` changes the switch, or returns what we show instead."""

    break_it: Callable[[TlsSwitch, Path], TlsFiles]
    reason: str
    mend: str


def other_pki() -> Pki:
    return issue("elsewhere", [], ADDRESS, time.time())


def show_to(tls: TlsSwitch, host: Issued) -> TlsFiles:
    tls.show(host, tls.pki.ca)
    return tls.ours


def expired(tls: TlsSwitch) -> Pki:
    return renew(tls.pki.ca, NAME, [], ADDRESS, time.time() - 731 * DAY)


WRONG = {
    "the switch's certificate is by another CA": Wrong(
        lambda tls, _: show_to(tls, other_pki().host), "is not trusted", "is the CA that signed"
    ),
    "the switch's certificate has expired": Wrong(
        lambda tls, _: show_to(tls, expired(tls).host), "has expired", "--renew"
    ),
    "the switch's certificate is for another address": Wrong(
        lambda tls, _: show_to(tls, issue_by(tls, "198.51.100.7").host),
        "is for another address than 127.0.0.1",
        "serverName",
    ),
    "the switch's certificate is for another name": Wrong(
        lambda tls, _: replace(tls.ours, name="hv-2"), "another name than hv-2", "serverName"
    ),
    "the switch shows a client's certificate": Wrong(
        lambda tls, _: show_to(tls, tls.pki.appliance), "is not one for a server", "--renew"
    ),
    "ours is by another CA": Wrong(
        lambda tls, at: write_files(at, tls.pki.ca, other_pki().appliance),
        "refused us: our certificate",
        "--renew",
    ),
    "ours has expired": Wrong(
        lambda tls, at: write_files(at, tls.pki.ca, expired(tls).appliance),
        "refused us: our certificate",
        "--renew",
    ),
    "ours is a server's": Wrong(
        lambda tls, at: write_files(at, tls.pki.ca, tls.pki.host),
        "refused us: our certificate",
        "--renew",
    ),
    "the switch speaks plainly": Wrong(
        lambda tls, _: (tls.listen("ptcp"), tls.ours)[1], "", "must listen with pssl:"
    ),
    "nobody listens": Wrong(
        lambda tls, _: (tls.vsctl("del-manager", "--", "del-controller", BRIDGE), tls.ours)[1],
        "nobody listens",
        "hairpin host prepare",
    ),
    "our key can't be read": Wrong(
        lambda tls, at: replace(tls.ours, key=at / "none.key"), "No such file", "switch.tls.keyFile"
    ),
}


def issue_by(tls: TlsSwitch, address: str) -> Pki:
    return renew(tls.pki.ca, "elsewhere", [], address, time.time())


@pytest.mark.parametrize("name", WRONG)
async def test_what_is_wrong_is_refused_and_told(tls: TlsSwitch, tmp_path: Path, name: str) -> None:
    wrong = WRONG[name]
    files = wrong.break_it(tls, tmp_path)
    for kind, target in (("ovsdb", tls.ovsdb), ("openflow", tls.openflow)):

        def find(kind: str = kind, target: str = target) -> SwitchError | None:
            return find_peer_fault(kind, target, files)  # type: ignore[arg-type]

        # ovsdb-server and vswitchd take a new certificate within their next look.
        await wait_until(lambda: _is_told(find(), wrong), 5.0)
    told: list[SteeringEvent] = []
    reconciler = build_reconciler(tls, files, told)
    try:
        await reconciler.start(PolicySet(), wait_seconds=0.5)
        await wait_until(lambda: _has(reconciler.status, wrong), 5.0)
        assert reconciler.machines() == ()
        with pytest.raises(SwitchError):
            await reconciler.apply(build_policies())
    finally:
        await reconciler.close()
    flows = tls.switch.run("ovs-ofctl", "-O", "OpenFlow15", "dump-flows", tls.switch.target)
    assert "cookie=0x4850" not in flows


async def test_a_bridge_that_shows_another_s_name_is_not_followed(tls: TlsSwitch) -> None:
    """ovs-ofctl does not look at the name: with a CA of many hosts it would follow whoever answers."""
    changes: list[int] = []

    async def take(_address: object) -> None:
        return None

    async def follow(name: str) -> tuple[FlowMonitor, asyncio.Task[None]]:
        files = replace(tls.ours, name=name)
        monitor = FlowMonitor(
            tls.openflow, take, lambda: changes.append(1), lambda: None, tls=files
        )
        return monitor, asyncio.create_task(monitor.run())

    def change_flow() -> None:
        flow = f"cookie={build_cookie(CookieKind.ADDRESS):#x},table=99,priority=1,actions=drop"
        for verb, text in (("add-flow", flow), ("del-flows", "table=99")):
            tls.switch.run("ovs-ofctl", "-O", "OpenFlow15", verb, tls.switch.target, text)

    monitor, running = await follow("hv-2")
    try:
        await wait_until(lambda: "for another name than hv-2" in monitor.fault, 5.0)
        change_flow()
        await asyncio.sleep(0.5)
        assert changes == []
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    monitor, running = await follow(NAME)
    try:
        await wait_until(lambda: (change_flow(), changes)[1], 5.0)
        assert monitor.fault == ""
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _is_told(fault: SwitchError | None, wrong: Wrong) -> bool:
    return fault is not None and wrong.reason in fault.reason and wrong.mend in fault.mend


def _has(status: SwitchStatus, wrong: Wrong) -> bool:
    return not status.reachable and wrong.reason in status.reason and wrong.mend in status.reason


def ask_nameless(tls: TlsSwitch, port: int) -> bytes:
    """What is answered to a client that trusts the switch, and shows no certificate."""
    context = ssl.create_default_context(cafile=str(tls.ours.ca))
    with (
        socket.create_connection((ADDRESS, port), 3) as plain,
        context.wrap_socket(plain, server_hostname=ADDRESS) as stream,
    ):
        stream.sendall(ECHO)
        return stream.recv(1)


def test_without_a_client_s_certificate_nothing_is_answered(tls: TlsSwitch) -> None:
    for port in (tls.ovsdb_port, tls.openflow_port):
        try:
            answer = ask_nameless(tls, port)
        except (ssl.SSLError, ConnectionError):
            answer = b""
        assert answer == b""


def test_who_speaks_plainly_to_a_tls_port_is_hung_up_on(tls: TlsSwitch) -> None:
    hello = bytes([6, 0, 0, 8, 0, 0, 0, 1])  # OpenFlow 1.5's
    assert not speak_plainly(tls.openflow_port, hello).startswith(b"\x06")
    assert b"result" not in speak_plainly(tls.ovsdb_port, ECHO)
    tls.listen("ptcp")  # else the same words would be answered
    assert speak_plainly(tls.openflow_port, hello).startswith(b"\x06")
    assert b"result" in speak_plainly(tls.ovsdb_port, ECHO)


def test_tls_before_1_2_is_refused_by_both_ends(tls: TlsSwitch) -> None:
    assert speak_old(tls.ovsdb_port, tls.ours, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    for port in (tls.ovsdb_port, tls.openflow_port):
        with pytest.raises((ssl.SSLError, OSError)):
            speak_old(port, tls.ours, ssl.TLSVersion.TLSv1_1)
    options = list(tls.ours.options)
    assert options[-1] == "--ssl-protocols=TLSv1.2"
    run(["ovs-ofctl", "-O", "OpenFlow15", *options, "show", tls.openflow])


def test_ovs_s_own_programs_verify_the_switch(tls: TlsSwitch, tmp_path: Path) -> None:
    stranger = write_files(tmp_path, other_pki().ca, tls.pki.appliance)
    for argv in (
        ["ovs-ofctl", "-O", "OpenFlow15", *stranger.options, "show", tls.openflow],
        ["ovs-vsctl", f"--db={tls.ovsdb}", *stranger.options, "--timeout=2", "--no-wait", "show"],
    ):
        assert run(argv, check=False).status != 0
        assert (
            run(
                [one.replace(str(tmp_path), str(tls.ours.ca.parent)) for one in argv], check=False
            ).status
            == 0
        )


async def test_a_certificate_that_ends_soon_is_told(tls: TlsSwitch) -> None:
    soon = renew(tls.pki.ca, NAME, [], ADDRESS, time.time() - 710 * DAY)
    tls.show(soon.host, tls.pki.ca)
    reconciler = build_reconciler(tls, tls.ours, [])
    try:
        await reconciler.start(PolicySet())
        await wait_until(lambda: reconciler.status.reachable)
        problems = " ".join(reconciler.status.problems)
        assert "the switch's certificate ends in 19 days" in problems
        assert "our own" not in problems
    finally:
        await reconciler.close()
