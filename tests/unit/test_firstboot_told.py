"""What is wrong is told: by the server that runs while nothing is configured, and on the console."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from appliance.api.documents import Health
from appliance.api.server import open_server
from appliance.client import Client, Place
from appliance.firstboot.console import (
    AGAIN_SECONDS,
    ConsoleFacts,
    Trouble,
    is_news,
    render_console,
)
from appliance.firstboot.faults import Fault, FaultReport, build_unfinished, render_report
from appliance.firstboot.offer import Offered
from appliance.firstboot.serving import build_fault_health, open_fault_server
from appliance.firstboot.status import follow_status, read_addresses, read_facts
from appliance.settings import read_settings
from steering.errors import HairpinError
from tests.support.api_server import ANY_PORT
from tests.support.certificates import NOW
from tests.support.fake_control import FakeControl
from tests.support.seed import TOKEN, Machine, build_seed, change, offer

REPORT = FaultReport(
    "rack-12",
    "0.1.0",
    NOW.timestamp(),
    False,
    8470,
    (Fault("lanes[0].vlan", "must be given", "as in `lanes[0].vlan: 101`"),),
)


@asynccontextmanager
async def open_faults(report: FaultReport) -> AsyncIterator[str]:
    async with open_fault_server(report, 0) as addresses:
        yield f"http://127.0.0.1:{addresses[0].rpartition(' ')[2]}"


@pytest.mark.parametrize("path", ["/health", "/api/v1/health"])
async def test_health_tells_the_faults_with_503(path: str) -> None:
    async with open_faults(REPORT) as url, aiohttp.ClientSession() as session:
        async with session.get(url + path) as got:
            assert (got.status, got.content_type) == (503, "application/json")
            assert got.headers["Cache-Control"] == "no-store"
            health = Health.model_validate_json(await got.text())
        assert (health.status, health.name) == ("failing", "rack-12")
        (problem,) = health.problems
        assert problem.reason == "lanes[0].vlan: must be given"
        assert problem.mend == "as in `lanes[0].vlan: 101`"
        async with session.head(url + path) as got:
            assert got.status == 503


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/api/v1/live"), ("POST", "/health"), ("PUT", "/api/v1/policies")],
)
async def test_nothing_else_is_done(method: str, path: str) -> None:
    async with (
        open_faults(REPORT) as url,
        aiohttp.ClientSession() as session,
        session.request(method, url + path, data=b"x" * 5000) as got,
    ):
        assert (got.status, got.content_type) == (503, "application/problem+json")
        assert "first boot failed" in (await got.json(content_type=None))["detail"]


def test_the_command_line_reads_it_as_any_health(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)

    async def ask() -> Health:
        async with open_faults(REPORT) as url:
            return await asyncio.to_thread(Client(Place(url, token, "test")).read_health)

    assert asyncio.run(ask()) == build_fault_health(REPORT)


async def test_it_is_on_loopback_unless_there_is_a_management_network() -> None:
    async with open_fault_server(REPORT, 0) as addresses:
        assert [one.partition(" ")[0] for one in addresses] == ["127.0.0.1"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    reachable = replace(REPORT, reachable=True, port=port)
    async with open_fault_server(reachable) as addresses:
        assert {one.partition(" ")[0] for one in addresses} == {"0.0.0.0", "::"}
        with pytest.raises(HairpinError, match="can't be served"):
            async with open_fault_server(reachable):
                pass


def test_the_command_serves_until_it_is_ended(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machine.refuse(offer(change("color", "red", change("api.port", port))))
    machine.places.faults.write_text(render_report(replace(machine.read_report(), reachable=False)))
    argv = [sys.executable, "-m", "appliance.cli", "firstboot", "--serve-faults", "--root"]
    process = subprocess.Popen([*argv, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        told = ask_when_up(port)
        assert told["problems"][0]["reason"] == "color: unknown key"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def ask_when_up(port: int) -> Any:
    async def ask() -> Any:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}/health") as got,
        ):
            return json.loads(await got.text())

    ends = time.monotonic() + 20
    while True:
        try:
            return asyncio.run(ask())
        except aiohttp.ClientError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.1)


def test_a_first_boot_that_left_nothing_is_told_too() -> None:
    health = build_fault_health(build_unfinished("0.1.0", 1.0, 8470))
    assert "neither settings nor faults" in health.problems[0].reason


# The console

FACTS = ConsoleFacts(
    name="rack-12",
    version="0.1.0",
    addresses=("ens3 192.0.2.10/24",),
    health="degraded",
    service="https://192.0.2.10:8470",
    fingerprint="AA:BB",
    seed="as accepted at 2026-11-01T00:00:00Z",
    rules="et/open read 9 days ago",
    troubles=(Trouble("the rules are old", "`hairpin rules update`"), Trouble("odd")),
)


def test_the_console_tells_who_it_is_how_it_is_and_how_to_mend_it() -> None:
    assert render_console(FACTS).splitlines() == [
        "",
        "=== Hairpin rack-12, version 0.1.0 ===",
        "addresses  ens3 192.0.2.10/24",
        "API        https://192.0.2.10:8470",
        "           SHA-256 AA:BB",
        "seed       as accepted at 2026-11-01T00:00:00Z",
        "rules      et/open read 9 days ago",
        "health     degraded",
        "  ! the rules are old",
        "      to mend: `hairpin rules update`",
        "  ! odd",
    ]
    many = replace(FACTS, troubles=tuple(Trouble(f"odd {number}") for number in range(50)))
    assert "  ! and 30 more" in render_console(many)
    assert "addresses  none" in render_console(replace(FACTS, addresses=()))


@given(st.text(max_size=30), st.floats(0, 1e6))
def test_what_did_not_change_is_not_shown_again(text: str, seconds: float) -> None:
    assert not is_news(text, text, seconds)
    assert is_news(text, text + "x", seconds)


def test_numbers_alone_are_shown_again_after_a_while() -> None:
    assert not is_news("12 bytes", "13 bytes", AGAIN_SECONDS - 1)
    assert is_news("12 bytes", "13 bytes", AGAIN_SECONDS)
    assert is_news("ok", "failing", 0.0)


async def read_text(machine: Machine) -> str:
    return render_console(await read_facts(machine.places))


async def test_the_console_shows_faults_and_never_a_secret(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert "first boot has not ended" in await read_text(machine)
    machine.refuse(offer(change("lanes.0.vlan", 0, change("api.token", "sesam"))))
    text = await read_text(machine)
    assert "failing: not configured, first boot failed" in text
    assert "lanes[0].vlan" in text
    assert "to mend: as in `lanes[0].vlan: 101`" in text
    assert "sesam" not in text
    machine.places.faults.write_text("{")
    assert "faults.json can't be read" in await read_text(machine)


@asynccontextmanager
async def run_appliance(machine: Machine, control: FakeControl) -> AsyncIterator[None]:
    """The real API by HTTPS, with the files that first boot wrote; its port is written into them."""
    machine.boot(offer(build_seed()))
    document = yaml.safe_load(machine.places.settings.read_text())
    config = machine.places.config_dir
    document["api"] |= {
        "listen": "0.0.0.0", "certFile": str(config / "api.pem"), "keyFile": str(config / "api.key"),
    }  # fmt: skip
    document["stateDir"] = str(machine.root / "var/lib/hairpin")
    machine.places.settings.write_text(yaml.safe_dump(document))
    api = read_settings(machine.places.settings).api
    served = ANY_PORT.model_copy(update={"cert_file": api.cert_file, "key_file": api.key_file})
    async with open_server(control, served, TOKEN) as url:
        document["api"]["port"] = int(url.rpartition(":")[2])
        machine.places.settings.write_text(yaml.safe_dump(document))
        yield


async def test_the_console_asks_the_api_and_takes_no_other_certificate(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    async with run_appliance(machine, FakeControl(status="degraded")):
        text = await read_text(machine)
        assert "health     degraded" in text
        assert "! an engine is down" in text
        assert "taken at this boot" in text
        assert "SHA-256 " in text
        (machine.root / "var/lib/hairpin/token").unlink()
        assert "health     degraded" in await read_text(machine)  # in a word, without the token
        other = build_seed()["switch"]["certificate"]
        (machine.places.config_dir / "api.pem").write_text(other)
        assert "the API does not answer" in await read_text(machine)


async def test_an_api_that_is_not_there_is_told(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.boot(offer(build_seed()))
    machine.boot(Offered({}))
    text = await read_text(machine)
    assert "the API does not answer" in text
    assert "none is offered now; as accepted at" in text


async def test_it_is_shown_again_when_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.firstboot.status.LOOK_SECONDS", 0.05)
    shown: list[str] = []
    machine = Machine(tmp_path)
    machine.refuse(Offered({}))
    task = asyncio.create_task(follow_status(machine.places, shown.append))
    try:
        await asyncio.sleep(0.5)
        assert len(shown) == 1
        machine.refuse(offer(change("color", "red")))
        for _ in range(100):
            await asyncio.sleep(0.05)
            if len(shown) > 1 and "color: unknown key" in shown[-1]:
                break
        assert "color: unknown key" in shown[-1]
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_the_command_cleans_what_it_writes_to_a_terminal(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "root")
    machine.refuse(Offered({"hairpin.\x1b[2J": b"x"}))
    out = tmp_path / "console"
    out.touch()
    argv = [sys.executable, "-m", "appliance.cli", "console-status", "--root", str(machine.root)]
    subprocess.run([*argv, "--to", str(out)], check=True, env={**os.environ})
    text = out.read_bytes()
    assert b"\x1b" not in text
    assert b"credential hairpin." in text
    assert b"\r\n" in text


def test_addresses_are_those_of_this_machine() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.1", 9))  # nothing is sent: only a route is looked up
        except OSError:
            assert isinstance(read_addresses(), tuple)
            return
        own = one.getsockname()[0]
    assert any(f" {own}/" in address for address in read_addresses())


def test_our_own_certificate_is_trusted_by_a_client_that_has_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.boot(offer(build_seed()))
    context = ssl.create_default_context(cafile=str(machine.places.config_dir / "api.pem"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    config = machine.places.config_dir
    server.load_cert_chain(config / "api.pem", config / "api.key")
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server, server_hostname="192.0.2.10")
    other = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(5):
        for end in (client, other):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert client.version() in ("TLSv1.2", "TLSv1.3")
    assert client.getpeercert()
