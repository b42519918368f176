"""The management service as it is wired, over TLS: VMs, policies, quarantine, ledger, doctor. No engine runs."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from appliance.api.quarantine import QuarantineOrder
from appliance.doctor_probe import read_switch
from appliance.hosting.pki import issue
from appliance.settings import Settings
from steering.errors import HairpinError
from steering.parse import render_documents
from tests.support.damaged_rows import damage_rows
from tests.support.service import Service, build_settings, open_service
from tests.support.shortcut_world import OFPORTS, attach_vms, build_policies, tag_legs
from tests.support.tls_switch import ADDRESS, NAME, TlsSwitch, open_tls_switch, write_files
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]


@pytest.fixture
def tls() -> Iterator[TlsSwitch]:
    with (
        tempfile.TemporaryDirectory(prefix="hp-") as name,
        open_tls_switch(Path(name), OFPORTS, time.time()) as tls,
    ):
        attach_vms(tls.switch)
        tag_legs(tls.switch)
        yield tls


@pytest.fixture
def settings(tls: TlsSwitch) -> Settings:
    files = {"caFile": tls.ours.ca, "certFile": tls.ours.certificate, "keyFile": tls.ours.key}
    switch = {
        "ovsdb": tls.ovsdb,
        "openflow": tls.openflow,
        "tls": {**files, "serverName": NAME},
    }
    return build_settings(tls.switch.directory, switch)


@pytest.fixture
async def service(settings: Settings) -> AsyncIterator[Service]:
    async with open_service(settings) as service:
        yield service


async def put(service: Service) -> None:
    in_force = await service.ask(service.client.read_policies)
    text = json.dumps(render_documents(build_policies()))
    await service.ask(lambda: service.client.put_policies(text, in_force.etag, dry_run=False))


async def test_policies_quarantine_and_ledger_work_over_tls(
    tls: TlsSwitch, service: Service
) -> None:
    await put(service)
    dump = ["ovs-ofctl", "-O", "OpenFlow15", "dump-flows", tls.switch.target]
    assert "cookie=0x4850" in tls.switch.run(*dump)

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
    await wait_until(lambda: "in_port=1 actions=drop" in tls.switch.run(*dump), 10.0)


async def test_health_and_doctor_say_which_certificate_is_wrong(
    tls: TlsSwitch, service: Service
) -> None:
    facts = await asyncio.to_thread(read_switch, service.settings.switch)
    assert (facts.reachable, facts.found, facts.openflow.works) == (True, True, True)
    stranger = issue(NAME, [], ADDRESS, time.time())
    tls.show(stranger.host, tls.pki.ca)
    tls.listen("pssl")  # which ends the connections that are open

    async def is_told() -> bool:
        health = await service.ask(service.client.read_health)
        return health.status == "failing" and any(
            "is not trusted" in one.reason for one in health.problems
        )

    await wait_until(is_told, 20.0)
    facts = await asyncio.to_thread(read_switch, service.settings.switch)
    assert not facts.reachable
    assert "is not trusted" in facts.reason
    wrong = write_files(tls.switch.directory / "wrong", stranger.ca, stranger.appliance)
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
    tls: TlsSwitch, settings: Settings, *, mended: bool
) -> None:
    """Put back where a copy tells what it was, else not used at all; the switch has the same either way."""
    async with open_service(settings) as service:
        await put(service)
        order = QuarantineOrder(vm="vm-1", reason="a test")
        await service.ask(service.client.add_quarantine, order)
        before, in_force = dump(tls), await service.ask(service.client.read_policies)
    assert any("in_port=1 actions=drop" in line for line in before)
    damage_rows(settings.database, *(ROWS if mended else (*ROWS, COPY)))

    async with open_service(settings, whole=mended) as service:

        async def is_told() -> bool:
            try:
                health = await service.ask(service.client.read_health)
            except HairpinError:
                return False
            word = "put back as written" if mended else "nor is the copy of them"
            return any(word in one.reason and one.mend for one in health.problems)

        await wait_until(is_told, 20.0)
        if mended:
            assert (await service.ask(service.client.read_policies)).etag == in_force.etag
            shut_off = await service.ask(service.client.find_quarantines)
            assert [one.vm_id for one in shut_off.items] == ["vm-1"]
        await asyncio.sleep(1.0)  # at the start the switch is compared with what is in force
        after = dump(tls)
        assert (sorted(set(before) - set(after)), sorted(set(after) - set(before))) == ([], [])


def dump(tls: TlsSwitch) -> list[str]:
    """But for what lets connections take shortcuts: it comes a moment after the service, and goes with it."""
    argv = ["ovs-ofctl", "-O", "OpenFlow15", "--no-stats", "dump-flows", tls.switch.target]
    lines = (line.strip() for line in tls.switch.run(*argv).splitlines()[1:])
    return sorted(line for line in lines if "actions=learn(" not in line)
