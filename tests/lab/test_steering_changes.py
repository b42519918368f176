"""Policies and VMs that change under traffic: no packet of a pair that stays inspected goes another way.

Without an engine a closed lane passes nothing, so every packet that arrives went round it. With a plain
wire in the engine's place, none may be lost either.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from appliance.lab import LabState, add_vm, remove_vm
from steering.diff import Bundle
from steering.errors import HairpinError
from steering.model import (
    Direct,
    Family,
    Inspect,
    MachineRecord,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Profile,
    Protocol,
    Service,
    Zone,
)
from steering.pipeline import CookieKind, parse_cookie
from steering.run import run
from steering.switch.openflow import OpenFlowSwitch
from tests.support.lab import run_in_vm
from tests.support.spray import FIRST_PORT, PORTS, spray
from tests.support.wire import Follower, follow, wire_first_lane

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

RATE = 1_500
CLOSED = Inspect(Profile.PREVENT, OnFailure.CLOSED)
# Ports are asked for, so that each packet's are looked at.
SPRAYED = (Service(Protocol.UDP, (PortRange(FIRST_PORT, FIRST_PORT + PORTS - 1),)),)


def build_policy(
    name: str, priority: int, source: Peer, action: Inspect | Direct = CLOSED
) -> Policy:
    return Policy(name, priority, (source,), (Peer(zone="app"),), SPRAYED, tuple(Family), action)


def build_sets(lab: LabState) -> list[PolicySet]:
    """In all of them web-1 to app-1 is inspected: by other classes, clauses, numbers and priorities."""
    tags = {"web": {"tier": "web"}, "app": {"tier": "app"}, "db": {"tier": "db"}}
    plain = tuple(
        MachineRecord(vm.vm_id, vm.name, tags[vm.name.partition("-")[0]]) for vm in lab.vms
    )
    blue = tuple(
        replace(one, tags={**one.tags, "colour": "blue"}) if one.name == "web-1" else one
        for one in plain
    )
    zones = tuple(Zone(name, {"tier": name}) for name in tags)
    zones += (Zone("blue", {"colour": "blue"}),)
    web, named = Peer(zone="web"), Peer(vm="web-1")
    colour = replace(
        build_policy("colour", 5, Peer(zone="blue"), Direct("a lower one")),
        destinations=(Peer(zone="db"),),
    )
    return [
        PolicySet(plain, zones, (build_policy("pair", 9, web),)),
        PolicySet(blue, zones, (build_policy("pair", 9, web), colour)),  # web-1 in another class
        PolicySet(blue, zones, (build_policy("pair", 11, Peer(zone="blue")),)),
        PolicySet(plain, zones, (build_policy("pair", 9, named),)),  # in no class at all
        PolicySet(plain, zones, (build_policy("other", 9, web), colour)),
    ]


@pytest.fixture(scope="module")
def pair_lab(bare_lab: LabState) -> LabState:
    """The VMs know each other's MACs for good, so that nothing but what is sprayed is sent."""
    web, app = bare_lab.vm("web-1"), bare_lab.vm("app-1")
    for vm, peer in ((web, app), (app, web)):
        neighbour = ("neigh", "replace", peer.address4, "lladdr", peer.mac, "dev", "eth0")
        assert run_in_vm(bare_lab, vm.name, "ip", *neighbour, "nud", "permanent").status == 0
    return bare_lab


@pytest.fixture
async def follower(pair_lab: LabState) -> AsyncIterator[Follower]:
    async with follow(pair_lab) as follower:
        yield follower


async def test_what_is_sprayed_arrives_where_no_policy_names_it(follower: Follower) -> None:
    """So that no arrivals mean something."""
    web, app = follower.lab.vm("web-1"), follower.lab.vm("app-1")
    with spray(web, app, RATE, 10) as told:
        await asyncio.sleep(1.5)
    assert len(told.arrived) > 0.95 * told.sent > RATE


async def test_a_change_of_policy_lets_no_packet_round_the_engine(follower: Follower) -> None:
    sets = build_sets(follower.lab)
    await follower.reconciler.apply(sets[0])
    await asyncio.sleep(1)
    web, app = follower.lab.vm("web-1"), follower.lab.vm("app-1")
    changes = 0
    with spray(web, app, RATE, 60) as told:
        began = time.monotonic()
        # Each to each other one.
        for one, other in itertools.permutations(sets, 2):
            for policies in (one, other):
                applied = await follower.reconciler.apply(policies)
                changes += bool(applied.bundle)
                await asyncio.sleep(0.05)
        seconds = time.monotonic() - began
    assert changes > 30
    # All the while: how long that is says how fast the machine is.
    assert told.sent > 0.9 * RATE * seconds
    assert told.arrived == set()


async def test_a_vm_that_arrives_or_goes_lets_no_packet_round_the_engine(
    follower: Follower,
) -> None:
    await follower.reconciler.apply(build_sets(follower.lab)[0])
    await asyncio.sleep(1)
    web, app = follower.lab.vm("web-1"), follower.lab.vm("app-1")
    with spray(web, app, RATE, 60) as told:
        for name in ("web-8", "app-8"):
            state = await asyncio.to_thread(add_vm, follower.lab, name)
            await follower.wait(lambda s=state: count_vms(follower) == len(s.vms))
            record = MachineRecord(state.vm(name).vm_id, name, {"tier": name[:3]})
            before = follower.reconciler.policies
            grown = replace(before, machines=(*before.machines, record))
            await follower.reconciler.apply(grown)
            await asyncio.sleep(0.3)
            await follower.reconciler.apply(before)
            await asyncio.to_thread(remove_vm, state, name)
            await follower.wait(lambda s=state: count_vms(follower) == len(s.vms) - 1)
            await asyncio.sleep(0.3)
    assert told.sent > RATE
    assert told.arrived == set()


async def test_what_can_not_be_recorded_is_taken_back(follower: Follower) -> None:
    reconciler, sets = follower.reconciler, build_sets(follower.lab)
    await reconciler.apply(sets[0])
    before = await read_flows(follower.lab)

    async def refuse() -> None:
        await asyncio.sleep(0.05)
        raise HairpinError("the store is full")

    with pytest.raises(HairpinError, match="the store is full"):
        await reconciler.apply(sets[4], refuse)
    assert reconciler.policies == sets[0]
    assert await read_flows(follower.lab) == before
    assert not (await reconciler.apply(sets[0])).bundle


async def test_what_others_change_right_after_a_change_of_ours_is_mended_at_once(
    follower: Follower,
) -> None:
    """The flow monitor tells of both; ours must not hide theirs."""
    reconciler, sets = follower.reconciler, build_sets(follower.lab)
    for policies in (*sets, sets[0]):
        await reconciler.apply(policies)
        before = await read_flows(follower.lab)
        run(
            follower.lab.ofctl_argv(
                ["del-flows", "table=40,cookie=0x4850030000000000/0xffffff0000000000"]
            )
        )
        began = time.monotonic()
        while await read_flows(follower.lab) != before:
            assert time.monotonic() - began < 1.5, "not within what a full check takes anyway"
            await asyncio.sleep(0.02)


async def read_flows(lab: LabState) -> set[tuple[object, ...]]:
    present = await OpenFlowSwitch(lab.openflow).read_present()
    return {(flow.key, flow.actions, flow.cookie) for flow in present.flows}


def count_vms(follower: Follower) -> int:
    return len({port.vm_id for port in follower.reconciler.observed.ports if port.vm_id})


async def test_a_change_loses_no_packet_and_sends_each_by_the_lane(pair_lab: LabState) -> None:
    """All that arrive were in the lane, and all that were sent arrive."""
    lane = pair_lab.settings.build_lanes()[0]
    with wire_first_lane(pair_lab):
        async with follow(pair_lab) as follower:
            reconciler = follower.reconciler
            sets = build_sets(pair_lab)
            await reconciler.apply(sets[0])
            await follower.wait(lambda: reconciler.is_forwarding(reconciler.lanes[0]), 10)
            await asyncio.sleep(1)
            web, app = pair_lab.vm("web-1"), pair_lab.vm("app-1")
            where = pair_lab.service_host, lane.leg_a.device
            with spray(web, app, RATE // 3, 60, where) as told:
                for policies in (*sets, *reversed(sets)):
                    await reconciler.apply(policies)
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.5)
                sent = told.sent
                await asyncio.sleep(0.5)
            assert told.arrived <= told.steered, "none went round the lane"
            lost = set(range(sent)) - told.arrived
            assert len(lost) <= sent // 500, f"{len(lost)} of {sent} lost"


async def test_a_vm_that_arrives_in_a_class_is_one_bundle_of_its_own_flows(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its document is there before it, so nothing but its port is new."""
    reconciler, lab = follower.reconciler, follower.lab
    sets = build_sets(lab)
    await reconciler.apply(sets[0])
    sent: list[Bundle] = []
    really_send = reconciler._switch.__class__.send_bundle

    async def note(switch: object, bundle: Bundle, more: Sequence[str] = ()) -> None:
        if bundle:
            sent.append(bundle)
        await really_send(switch, bundle, more)  # type: ignore[arg-type]

    monkeypatch.setattr(reconciler._switch.__class__, "send_bundle", note)
    state = await asyncio.to_thread(add_vm, lab, "web-7")
    try:
        newcomer = state.vm("web-7")
        await follower.wait(lambda: count_vms(follower) == len(state.vms))
        record = MachineRecord(newcomer.vm_id, "web-7", {"tier": "web"})
        await reconciler.apply(replace(sets[0], machines=(*sets[0].machines, record)))
        # Out and in again: now the document knows it.
        sent.clear()
        await asyncio.to_thread(remove_vm, state, "web-7")
        await follower.wait(lambda: count_vms(follower) == len(state.vms) - 1)
        gone = await wait_bundle(sent)
        sent.clear()  # before it comes: the bundle may be sent before the port's script has ended
        state = await asyncio.to_thread(add_vm, lab, "web-7")
        again = state.vm("web-7")
        await follower.wait(lambda: count_vms(follower) == len(state.vms))
        came = await wait_bundle(sent)
    finally:
        await asyncio.to_thread(remove_vm, state, "web-7")
        await reconciler.apply(PolicySet())
    for bundle in (gone, came):
        owners = {
            parse_cookie(int(one.text.partition(",")[0].removeprefix("cookie="), 0))
            for one in bundle.changes
        }
        kinds = {owner[0] for owner in owners if owner}
        assert kinds <= {
            CookieKind.PORT,
            CookieKind.SPOOF,
            CookieKind.TAGGED,
            CookieKind.UNREAD,
            CookieKind.GHOST,
        }
        assert {owner[1] for owner in owners if owner} <= {0, again.ofport}, "no other VM's flow"
        assert 0 < len(bundle.changes) < 45


async def wait_bundle(sent: list[Bundle]) -> Bundle:
    until = time.monotonic() + 5
    while not sent:
        assert time.monotonic() < until
        await asyncio.sleep(0.02)
    return sent[0]
