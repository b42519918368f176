"""The management service as it is wired, on a real switch: a shortcut from the policy's PUT to its return.

No engine runs: frames are let go by the test, as a third leg would bring them. The way with an engine is the lab's.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from appliance.api.quarantine import QuarantineOrder
from appliance.client import Client, ServiceRefused
from steering.parse import render_documents
from tests.support.dummy_switch import DummySwitch, open_dummy_switch
from tests.support.service import Service, build_settings, open_service
from tests.support.shortcut_world import (
    LANE,
    OFPORTS,
    World,
    attach_vms,
    build_policies,
    build_segment,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab


@pytest.fixture
def switch() -> Iterator[DummySwitch]:
    with (
        tempfile.TemporaryDirectory(prefix="hp-") as name,
        open_dummy_switch(Path(name), OFPORTS) as switch,
    ):
        attach_vms(switch)
        yield switch


@pytest.fixture
async def service(switch: DummySwitch) -> AsyncIterator[Service]:
    doors = {"ovsdb": f"unix:{switch.directory}/db.sock", "openflow": switch.target}
    async with open_service(build_settings(switch.directory, doors)) as service:
        yield service


@pytest.fixture
def world(switch: DummySwitch, service: Service) -> World:
    """What is done to the switch and to EVE; the service is its own reconciler."""
    return World(
        switch=switch, reconciler=None, store=None, ingest=None,  # type: ignore[arg-type]
        eve=service.settings.eve_file(LANE), policies=build_policies(),
    )  # fmt: skip


async def find_metrics(service: Service) -> dict[str, float]:
    page = await service.ask(read_page, service.client, "/metrics")
    lines = [
        line.rpartition(" ") for line in page.splitlines() if line.startswith("hairpin_shortcut")
    ]
    return {name.removeprefix("hairpin_shortcut_"): float(value) for name, _, value in lines}


def read_page(client: Client, path: str) -> str:
    token = client.place.token_file.read_text().strip()
    request = urllib.request.Request(  # noqa: S310 - the test's own service
        f"{client.place.url}/api/v1{path}", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        return str(answer.read().decode())


async def test_a_shortcut_from_its_policy_to_its_return(service: Service, world: World) -> None:
    ask, client = service.ask, service.client
    documents = json.dumps(render_documents(world.policies))
    await ask(lambda: client.put_policies(documents, "*", dry_run=False))
    await world.wait_taught()

    async def open_both() -> None:
        for source, port in ((1, 40_000), (3, 50_000)):
            world.open(source, 2, port)
            for _ in range(4):
                world.switch.send(source, build_segment(source, 2, port, 873))
        world.account()

    async def find_ports(**query: str) -> list[int]:
        found = await ask(client.find_shortcuts, query)
        return sorted(one.source.port for one in found.items)

    await open_both()
    assert await find_ports() == [40_000, 50_000]
    assert await find_ports(vm="host-1") == [40_000]
    # Counted by the second, and told everywhere.
    key = '{policy="backup",reason="1MB"}'

    async def is_counted() -> bool:
        return (await find_metrics(service)).get(f"packets_total{key}") == 4

    await wait_until(is_counted)
    metrics = await find_metrics(service)
    assert metrics[f"open_connections{key}"] == metrics[f"connections_total{key}"] == 1
    coverage = await ask(client.read_coverage, {})
    assert [one.policy for one in coverage.shortcuts] == ["backup", "quiet"]
    assert coverage.summary.inspected == 0
    assert {pair.status for pair in coverage.items if pair.parts[0].policy} == {"partial"}
    told = await ask(client.explain, {"source": "host-1", "destination": "host-2", "port": 873})
    assert told.inspected_until == "1MB"
    # An alert sends back VM 1's; `quiet` says that alerts do not.
    world.alert(1, 2, 12_345, blocked=False)

    async def is_returned() -> bool:
        return await find_ports() == [50_000]

    await wait_until(is_returned)
    # So does a quarantine, and an operator.
    await ask(client.add_quarantine, QuarantineOrder(vm="host-3"))

    async def is_empty() -> bool:
        return await find_ports() == []

    await wait_until(is_empty)
    await ask(client.remove_quarantine, "host-3")
    await world.wait_taught()
    await open_both()
    assert await find_ports() == [40_000, 50_000]
    report = await ask(client.return_shortcuts, {"policy": "quiet"})
    assert report.returned == 1
    (one,) = (await ask(client.find_shortcuts, {})).items
    assert (await ask(client.return_shortcut, one.id)).returned == 1
    with pytest.raises(ServiceRefused) as refused:
        await ask(client.return_shortcut, one.id)
    assert refused.value.problem.status == 404
    # A policy that is withdrawn takes its connections back with it.
    await world.wait_taught()
    await open_both()
    assert await find_ports() == [40_000, 50_000]
    await asyncio.sleep(1.2)  # a look of the service itself
    empty = '{"apiVersion": "hairpin/v1", "kind": "List", "items": []}'
    await ask(lambda: client.put_policies(empty, "*", dry_run=False))
    assert await find_ports() == []

    async def find_causes() -> list[str]:
        page = await ask(client.find_events, {"kind": "shortcut.returned"})
        return [event.subject for event in reversed(page.items)]

    expected = ["alert", "quarantine", "operator", "operator", "policies"]

    async def are_told() -> bool:
        return await find_causes() == expected

    await wait_until(are_told)
    accounts = (await ask(client.find_shortcuts, {})).accounts
    assert [(one.policy, one.limit, one.connections, one.returned) for one in accounts] == [
        ("backup", None, 3, 3),
        ("quiet", None, 3, 3),
    ]
