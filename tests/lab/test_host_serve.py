"""The management service as it is wired, over TLS: VMs, policies, quarantine, ledger, doctor. No engine runs."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from appliance.api.quarantine import QuarantineOrder
from appliance.app import _serve
from appliance.client import Client, Place
from appliance.doctor_probe import read_switch
from appliance.hosting.pki import issue
from appliance.settings import Settings
from steering.errors import HairpinError
from steering.parse import render_documents
from tests.support.damaged_rows import damage_rows
from tests.support.dummy_switch import BRIDGE
from tests.support.shortcut_world import LANES, VMS, build_policies, find_mac
from tests.support.tls_switch import (
    ADDRESS,
    NAME,
    TlsSwitch,
    find_free_ports,
    open_tls_switch,
    write_files,
)
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]

OFPORTS = (*VMS, *(leg.ofport for lane in LANES for leg in lane.legs))


@dataclass
class Service:
    tls: TlsSwitch
    client: Client
    settings: Settings
    serving: asyncio.Task[int]

    async def ask(self, method: Callable[..., Any], *values: Any) -> Any:
        return await asyncio.to_thread(method, *values)


def build_settings(tls: TlsSwitch, port: int) -> Settings:
    directory = tls.switch.directory
    lanes = [
        {
            "profile": lane.profile,
            "vlan": lane.vlan,
            "queues": list(lane.queues),
            "legA": {"interface": lane.leg_a.interface, "device": lane.leg_a.device},
            "legB": {"interface": lane.leg_b.interface, "device": lane.leg_b.device},
        }
        for lane in LANES
    ]
    files = {"caFile": tls.ours.ca, "certFile": tls.ours.certificate, "keyFile": tls.ours.key}
    return Settings.model_validate(
        {
            "stateDir": directory / "state",
            "runDir": directory / "run",
            "lanes": lanes,
            "switch": {
                "ovsdb": tls.ovsdb, "bridge": BRIDGE, "openflow": tls.openflow,
                "tls": {**files, "serverName": NAME},
            },
            "api": {"port": port},
        }
    )  # fmt: skip


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr(Settings, "build_lanes", lambda self: LANES)
    with (
        tempfile.TemporaryDirectory(prefix="hp-") as name,
        open_tls_switch(Path(name), OFPORTS, time.time()) as tls,
    ):
        for vm in VMS:
            tls.vsctl(
                "set", "Interface", f"p{vm}", f"external_ids:vm-id=vm-{vm}",
                f'external_ids:attached-mac="{find_mac(vm)}"', f"external_ids:iface-id=if-{vm}",
            )  # fmt: skip
        for lane in LANES:
            for leg in lane.legs:
                tls.vsctl("set", "Port", leg.interface, f"tag={lane.vlan}", "protected=true")
        (Path(name) / "run").mkdir()
        (port,) = find_free_ports(1)
        settings = build_settings(tls, port)
        service: Service | None = None
        serving = asyncio.create_task(_serve(settings))
        try:
            await wait_until(settings.token_file.exists)
            client = Client(Place(f"http://127.0.0.1:{port}", settings.token_file, "the test"))
            await wait_until(lambda: _has_vms(client, serving), 20.0)
            service = Service(tls, client, settings, serving)
            yield service
            assert not service.serving.done(), service.serving
        finally:
            await stop(serving if service is None else service.serving)


async def stop(serving: asyncio.Task[int]) -> None:
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def _has_vms(client: Client, serving: asyncio.Task[int]) -> bool:
    if serving.done():
        raise RuntimeError(f"the service ended: {serving}")
    try:
        found = await asyncio.to_thread(client.find_vms)
    except Exception:
        return False
    return len(found.items) == len(VMS)


async def put(service: Service) -> None:
    in_force = await service.ask(service.client.read_policies)
    text = json.dumps(render_documents(build_policies()))
    await service.ask(lambda: service.client.put_policies(text, in_force.etag, dry_run=False))


async def test_policies_quarantine_and_ledger_work_over_tls(service: Service) -> None:
    await put(service)
    dump = ["ovs-ofctl", "-O", "OpenFlow15", "dump-flows", service.tls.switch.target]
    assert "cookie=0x4850" in service.tls.switch.run(*dump)

    async def is_proved() -> bool:
        coverage = await service.ask(service.client.read_coverage, {})
        ledger = coverage.ledger
        return (
            ledger is not None
            and ledger.revision > 0
            and ledger.bypassed > 0  # no engine runs, and the policies are open
            and ledger.violation_count == 0
        )

    await wait_until(is_proved, 60.0)
    health = await service.ask(service.client.read_health)
    assert not [
        one for one in health.problems if "not proved" in one.reason and "table" in one.reason
    ]
    assert health.components.switch.status == "ok"
    await service.ask(service.client.add_quarantine, QuarantineOrder(vm="vm-1", reason="a test"))
    await wait_until(lambda: "in_port=1 actions=drop" in service.tls.switch.run(*dump), 10.0)


async def test_health_and_doctor_say_which_certificate_is_wrong(service: Service) -> None:
    facts = await asyncio.to_thread(read_switch, service.settings.switch)
    assert (facts.reachable, facts.found, facts.openflow.works) == (True, True, True)
    stranger = issue(NAME, [], ADDRESS, time.time())
    service.tls.show(stranger.host, service.tls.pki.ca)
    service.tls.listen("pssl")  # which ends the connections that are open

    async def is_told() -> bool:
        health = await service.ask(service.client.read_health)
        return health.status == "failing" and any(
            "is not trusted" in one.reason for one in health.problems
        )

    await wait_until(is_told, 20.0)
    facts = await asyncio.to_thread(read_switch, service.settings.switch)
    assert not facts.reachable
    assert "is not trusted" in facts.reason
    wrong = write_files(service.tls.switch.directory / "wrong", stranger.ca, stranger.appliance)
    other = service.settings.switch.model_copy(
        update={"tls": service.settings.switch.tls.model_copy(  # type: ignore[union-attr]
            update={"ca_file": wrong.ca, "cert_file": wrong.certificate, "key_file": wrong.key})}
    )  # fmt: skip
    facts = await asyncio.to_thread(read_switch, other)
    assert "refused us: our certificate" in facts.reason


COPY = "UPDATE configuration SET copy = replace(copy, 'vm-', 'vn-')"
ROWS = (
    "UPDATE revisions SET documents = replace(documents, 'closed', 'open')",
    "DELETE FROM quarantines",
)


@pytest.mark.parametrize("mended", [True, False])
async def test_damage_at_rest_changes_nothing_on_the_switch(
    service: Service, *, mended: bool
) -> None:
    """Put back where a copy tells what it was, else not used at all; the switch has the same either way."""
    await put(service)
    await service.ask(service.client.add_quarantine, QuarantineOrder(vm="vm-1", reason="a test"))
    before, in_force = dump(service), await service.ask(service.client.read_policies)
    assert any("in_port=1 actions=drop" in line for line in before)
    await stop(service.serving)
    damage_rows(service.settings.database, *(ROWS if mended else (*ROWS, COPY)))
    service.serving = asyncio.create_task(_serve(service.settings))

    async def is_told() -> bool:
        try:
            health = await service.ask(service.client.read_health)
        except HairpinError:
            return False
        word = "put back as written" if mended else "nor is the copy of them"
        return any(word in one.reason and one.mend for one in health.problems)

    await wait_until(is_told, 20.0)
    if mended:
        await wait_until(lambda: _has_vms(service.client, service.serving), 20.0)
        assert (await service.ask(service.client.read_policies)).etag == in_force.etag
        shut_off = await service.ask(service.client.find_quarantines)
        assert [one.vm_id for one in shut_off.items] == ["vm-1"]
    await asyncio.sleep(1.0)  # at the start the switch is compared with what is in force
    after = dump(service)
    assert (sorted(set(before) - set(after)), sorted(set(after) - set(before))) == ([], [])


def dump(service: Service) -> list[str]:
    """All flows but those of table 55: which connections may take a shortcut hangs on the engines, and none runs."""
    argv = ["ovs-ofctl", "-O", "OpenFlow15", "--no-stats", "dump-flows", service.tls.switch.target]
    lines = service.tls.switch.run(*argv).splitlines()[1:]
    return sorted(line.strip() for line in lines if " table=55," not in line)
