"""The ledger over the network: a copy of the switch is asked, and says what the switch itself would.

A real ovsdb-server and ovs-vswitchd (dummy datapath) on loopback, and a second pair that is the copy.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from steering.errors import SwitchError
from steering.ledger import Ledger
from steering.model import Lane, PolicySet
from steering.prove import Prover
from steering.reconcile import Reconciler
from steering.switch.replica import Replica
from tests.support.dummy_switch import BRIDGE
from tests.support.shortcut_world import (
    LANES,
    OFPORTS,
    VMS,
    attach_vms,
    build_policies,
    tag_legs,
)
from tests.support.tls_switch import TlsSwitch, open_tls_switch
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]

ADDRESSES = {f"vm-{vm}": (f"10.0.0.{vm}", f"fd00::{vm}") for vm in VMS}


@dataclass
class Bench:
    tls: TlsSwitch
    reconciler: Reconciler
    replica: Replica
    policies: PolicySet

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return self.reconciler.lanes

    async def prove(self, prover: Prover, *, up: bool) -> Ledger:
        forwarding = {lane.name: up for lane in self.lanes}
        machines = self.reconciler.machines()
        return await prover.prove(
            self.policies, machines, self.lanes, forwarding, 0, addresses=ADDRESSES
        )

    async def prove_both(self, *, up: bool = True) -> tuple[Ledger, Ledger]:
        """By the switch's own control socket, and by the copy."""
        self.set_legs(up=up)
        control = self.tls.switch._control
        by_itself = Prover(control, self.tls.switch.target, pause=0.0)
        by_copy = Prover(self.replica, self.tls.openflow, pause=0.0, tls=self.tls.ours)
        return await self.prove(by_itself, up=up), await self.prove(by_copy, up=up)

    def set_legs(self, *, up: bool) -> None:
        for lane in self.lanes:
            for leg in lane.legs:
                state = "up" if up else "down"
                self.tls.switch.appctl("netdev-dummy/set-admin-state", leg.interface, state)
                self.tls.vsctl("wait-until", "Interface", leg.interface, f"link_state={state}")

    def ofctl(self, command: str, text: str) -> None:
        self.tls.switch.run("ovs-ofctl", "-O", "OpenFlow15", command, self.tls.switch.target, text)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with (
        tempfile.TemporaryDirectory(prefix="hp-") as name,
        open_tls_switch(Path(name), OFPORTS, time.time()) as tls,
    ):
        attach_vms(tls.switch)
        tag_legs(tls.switch)
        reconciler = Reconciler(
            ovsdb=tls.ovsdb, openflow=tls.openflow, bridge=BRIDGE, lanes=LANES,
            on_event=lambda _: None, tls=tls.ours,
        )  # fmt: skip
        replica = Replica(Path(name) / "copy", BRIDGE, tls.ovsdb, tls.openflow, tls.ours)
        try:
            await reconciler.start(PolicySet())
            await wait_until(lambda: len(reconciler.machines()) == len(VMS))
            await reconciler.apply(build_policies())
            yield Bench(tls, reconciler, replica, build_policies())
        finally:
            await replica.close()
            await reconciler.close()


def sum_up(ledger: Ledger) -> dict[str, int]:
    names = ("traced", "inspected", "direct", "denied", "bypassed", "blocked", "violation_count")
    return {name: getattr(ledger, name) for name in names}


async def test_the_copy_says_what_the_switch_says(bench: Bench) -> None:
    by_itself, by_copy = await bench.prove_both()
    assert (by_itself.by_copy, by_copy.by_copy) == (False, True)
    assert sum_up(by_copy) == sum_up(by_itself)
    assert by_copy.inspected > 0
    assert by_copy.violation_count == 0


async def test_lanes_that_are_down_are_down_in_the_copy_and_up_again(bench: Bench) -> None:
    by_itself, by_copy = await bench.prove_both(up=False)
    assert sum_up(by_copy) == sum_up(by_itself)
    assert by_copy.inspected == 0
    assert by_copy.bypassed + by_copy.blocked > 0
    _, again = await bench.prove_both(up=True)
    assert again.inspected > 0
    assert again.violation_count == 0


async def test_a_flow_of_others_that_goes_round_inspection_is_found_by_the_copy(
    bench: Bench,
) -> None:
    _, before = await bench.prove_both()
    assert before.violation_count == 0
    await bench.reconciler.close()  # what is ours it would mend; a foreign flow it leaves
    bench.ofctl("add-flow", "table=0,priority=60000,in_port=1,actions=NORMAL")
    by_itself, by_copy = await bench.prove_both()
    assert by_copy.violation_count > 0
    assert sum_up(by_copy) == sum_up(by_itself)
    assert by_copy.foreign_count == 1


async def test_a_port_that_comes_and_goes_does_so_in_the_copy(bench: Bench) -> None:
    await bench.prove_both()
    bench.tls.switch.add_port(77)
    bench.tls.vsctl(
        "set", "Interface", "p77", "external_ids:vm-id=vm-77", "external_ids:iface-id=if-77",
        'external_ids:attached-mac="02:00:00:00:00:77"', "--", "set", "Port", "p77", "tag=9",
    )  # fmt: skip
    await wait_until(lambda: len(bench.reconciler.machines()) == len(VMS) + 1)
    by_itself, by_copy = await bench.prove_both()
    assert sum_up(by_copy) == sum_up(by_itself)
    bench.tls.vsctl("del-port", BRIDGE, "p77")
    await wait_until(lambda: len(bench.reconciler.machines()) == len(VMS))
    _, again = await bench.prove_both()
    assert again.violation_count == 0


async def test_a_copy_that_was_killed_is_made_anew(bench: Bench) -> None:
    await bench.prove_both()
    for process in bench.replica._processes:
        process.kill()
    await wait_until(lambda: all(one.returncode is not None for one in bench.replica._processes))
    by_itself, by_copy = await bench.prove_both()
    assert sum_up(by_copy) == sum_up(by_itself)


async def test_a_copy_that_was_too_slow_once_is_made_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ports came after they were given up, and all later copies failed: they were there already."""
    await bench.replica.open()
    vswitchd = bench.replica._processes[1]
    prover = Prover(bench.replica, bench.tls.openflow, tls=bench.tls.ours)
    vswitchd.send_signal(signal.SIGSTOP)
    try:
        with monkeypatch.context() as hurried:
            hurried.setattr("steering.switch.replica.SECONDS", 2.0)
            with pytest.raises(SwitchError, match="could not be copied"):
                await bench.prove(prover, up=True)
    finally:
        vswitchd.send_signal(signal.SIGCONT)
    by_itself, by_copy = await bench.prove_both()
    assert sum_up(by_copy) == sum_up(by_itself)


async def test_a_switch_that_is_away_gives_no_ledger_but_the_reason(bench: Bench) -> None:
    await bench.prove_both()
    bench.tls.vsctl("del-manager", "--", "del-controller", BRIDGE)
    prover = Prover(bench.replica, bench.tls.openflow, tls=bench.tls.ours)
    with pytest.raises(SwitchError, match="could not be copied"):
        await bench.prove(prover, up=True)


async def test_without_the_programs_the_reason_says_what_to_install(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steering.switch.replica.SCHEMA", Path("/nowhere"))
    with pytest.raises(SwitchError, match="openvswitch-switch"):
        await bench.replica.open()


BEGIN = """
import asyncio, sys
from pathlib import Path
from steering.switch.replica import Replica

async def main():
    replica = Replica(Path(sys.argv[1]), "br-test", "ssl:127.0.0.1:1", "ssl:127.0.0.1:2", None)
    await replica.open()
    print("pids", *[one.pid for one in replica._processes], flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_the_copy_ends_with_the_service_even_when_that_is_killed() -> None:
    with tempfile.TemporaryDirectory(prefix="hp-") as name:
        serving = await asyncio.create_subprocess_exec(
            sys.executable, "-c", BEGIN, f"{name}/copy", stdout=asyncio.subprocess.PIPE
        )
        assert serving.stdout is not None
        said = b""
        while not said.startswith(b"pids "):  # not what it logs
            said = await serving.stdout.readline()
        pids = [int(pid) for pid in said.split()[1:]]
        assert len(pids) == 2
        serving.send_signal(signal.SIGKILL)
        await serving.wait()
        await wait_until(lambda: not any(_is_there(pid) for pid in pids))


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"
