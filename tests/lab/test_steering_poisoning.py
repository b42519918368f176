"""ARP and ND poisoning with real packets: a VM's traffic is not led to another that claims its address."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator

import pytest

from appliance.lab import LabState
from steering.events import AddressContested
from steering.model import (
    Direct,
    Family,
    MachineRecord,
    Peer,
    Policy,
    PolicySet,
    Service,
)  # fmt: skip
from tests.support.lab import run_in_vm
from tests.support.wire import Follower, follow

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

# Claims two addresses for this VM's MAC in every way there is, unasked and as answers, to one target.
POISONER = """
import json, sys, time
from scapy.all import (ARP, Ether, ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, ICMPv6NDOptSrcLLAddr,
                       IPv6, sendp)
t = json.loads(sys.argv[1])
me, many = t["mac"], "ff:ff:ff:ff:ff:ff"
def na(dst, **flags):
    return (Ether(src=me, dst=dst) / IPv6(src=t["stolen6"], dst=t["target6"])
            / ICMPv6ND_NA(tgt=t["stolen6"], O=1, **flags) / ICMPv6NDOptDstLLAddr(lladdr=me))
frames = [
    Ether(src=me, dst=t["target_mac"])
        / ARP(op=2, hwsrc=me, psrc=t["stolen4"], hwdst=t["target_mac"], pdst=t["target4"]),
    Ether(src=me, dst=many) / ARP(op=1, hwsrc=me, psrc=t["stolen4"], pdst=t["target4"]),
    Ether(src=me, dst=many) / ARP(op=2, hwsrc=me, psrc=t["stolen4"], hwdst=many, pdst=t["stolen4"]),
    na(t["target_mac"], S=1), na(t["target_mac"], S=0), na("33:33:00:00:00:01", S=0),
    Ether(src=me, dst=t["target_mac"]) / IPv6(src=t["stolen6"], dst=t["target6"])
        / ICMPv6ND_NS(tgt=t["target6"]) / ICMPv6NDOptSrcLLAddr(lladdr=me),
]
for _ in range(5):
    sendp(frames, iface="eth0", verbose=False)
    time.sleep(0.1)
"""


def build_policies(lab: LabState, *, given: bool) -> PolicySet:
    """A policy names web-1 and app-1; db-1, the poisoner, is in none."""
    records = []
    for name in ("web-1", "app-1", "db-1"):
        vm = lab.vm(name)
        own = (vm.address4, vm.address6) if given and name != "db-1" else ()
        records.append(MachineRecord(vm.vm_id, name, addresses=own))
    pair = (Peer(vm="web-1"),), (Peer(vm="app-1"),)
    both = (Family.IPV4, Family.IPV6)
    policy = Policy("pair", 9, *pair, (Service(),), both, Direct("to see where it goes"))
    return PolicySet(tuple(records), (), (policy,))


@pytest.fixture
async def follower(bare_lab: LabState) -> AsyncIterator[Follower]:
    async with follow(bare_lab) as one:
        yield one
    heal(bare_lab)


def heal(lab: LabState) -> None:
    for name in ("web-1", "app-1"):
        run_in_vm(lab, name, "ip", "neigh", "flush", "all")


async def poison(lab: LabState, poisoner: str) -> None:
    """Tell web-1 that app-1's addresses are at the poisoner's MAC."""
    web, app = lab.vm("web-1"), lab.vm("app-1")
    told = {
        "mac": lab.vm(poisoner).mac, "target_mac": web.mac, "target4": web.address4,
        "target6": web.address6, "stolen4": app.address4, "stolen6": app.address6,
    }  # fmt: skip
    argv = (sys.executable, "-c", POISONER, json.dumps(told))
    done = await asyncio.to_thread(run_in_vm, lab, poisoner, *argv, timeout=30)
    assert done.status == 0, done.stderr


def find_neighbour(lab: LabState, address: str) -> str:
    """The MAC that web-1 would send to for the address."""
    shown = run_in_vm(lab, "web-1", "ip", "-j", "neigh", "show", address).stdout
    return str(json.loads(shown)[0].get("lladdr"))


async def reach(lab: LabState, *addresses: str) -> list[bool]:
    argvs = [("ping", "-n", "-q", "-c1", "-W1", address) for address in addresses]
    done = [await asyncio.to_thread(run_in_vm, lab, "web-1", *argv) for argv in argvs]
    return [one.status == 0 for one in done]


async def test_a_stolen_address_is_told_where_none_were_given(follower: Follower) -> None:
    """And the poisoning works then: so the tests below test something."""
    lab, app, thief = follower.lab, follower.lab.vm("app-1"), follower.lab.vm("db-1")
    await follower.reconciler.apply(build_policies(lab, given=False))
    heal(lab)
    assert await reach(lab, app.address4, app.address6) == [True, True]
    await poison(lab, "db-1")
    assert [find_neighbour(lab, a) for a in (app.address4, app.address6)] == [thief.mac, thief.mac]

    def find_contests() -> list[tuple[str, frozenset[str]]]:
        told = [event for event in follower.events if isinstance(event, AddressContested)]
        return sorted((one.address, frozenset((one.holder, one.claimant))) for one in told)

    # The switch learns anew from what its datapath already knows when that is looked at again.
    for _ in range(8):
        if len(find_contests()) >= 2:
            break
        await asyncio.sleep(1)
        await poison(lab, "db-1")
    heal(lab)
    await reach(lab, app.address4, app.address6)
    await poison(lab, "db-1")
    await asyncio.sleep(1.0)
    two = frozenset((app.vm_id, thief.vm_id))
    assert find_contests() == [(app.address4, two), (app.address6, two)], "once, and not again"


@pytest.mark.parametrize("poisoner", ["db-1", "web-2"])
async def test_given_addresses_are_not_diverted(follower: Follower, poisoner: str) -> None:
    lab, app = follower.lab, follower.lab.vm("app-1")
    await follower.reconciler.apply(build_policies(lab, given=True))
    heal(lab)
    assert await reach(lab, app.address4, app.address6) == [True, True]
    await poison(lab, poisoner)
    assert [find_neighbour(lab, a) for a in (app.address4, app.address6)] == [app.mac, app.mac]
    assert await reach(lab, app.address4, app.address6) == [True, True]
    await asyncio.sleep(1.2)
    counters = await follower.reconciler.read_counters()
    port = next(p for p in follower.reconciler.observed.ports if p.mac == app.mac)
    assert counters.claims[port.ofport].packets == 35, "7 frames, 5 times"
    thief = lab.vm(poisoner).vm_id
    contests = [event for event in follower.events if isinstance(event, AddressContested)]
    assert thief not in [one.claimant for one in contests], "what is dropped is no claim"


async def test_a_vm_in_scope_sends_from_no_address_but_its_own(follower: Follower) -> None:
    lab, web, app = follower.lab, follower.lab.vm("web-1"), follower.lab.vm("app-1")
    await follower.reconciler.apply(build_policies(lab, given=True))
    heal(lab)
    assert await reach(lab, app.address4, app.address6) == [True, True]
    port = next(p for p in follower.reconciler.observed.ports if p.mac == web.mac)
    for spare, source in (("10.77.0.222/24", "10.77.0.222"), ("fd77::222/64", "fd77::222")):
        add = ("ip", "addr", "add", spare, "dev", "eth0")
        run_in_vm(lab, "web-1", *add, *(("nodad",) if ":" in spare else ()))
        try:
            target = app.address6 if ":" in spare else app.address4
            before = (await follower.reconciler.read_counters()).spoofed.get(port.ofport)
            argv = ("ping", "-n", "-q", "-c3", "-i0.2", "-W1", "-I", source, target)
            assert (await asyncio.to_thread(run_in_vm, lab, "web-1", *argv)).status != 0
            await asyncio.sleep(1.2)
            after = (await follower.reconciler.read_counters()).spoofed[port.ofport]
            assert after.packets - (before.packets if before else 0) >= 3
        finally:
            run_in_vm(lab, "web-1", "ip", "addr", "del", spare, "dev", "eth0")
    assert await reach(lab, app.address4, app.address6) == [True, True]
