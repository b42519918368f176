"""Alerts to a real rsyslogd, stopped and killed meanwhile: each arrives at least once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.alerts.eve import parse_event
from appliance.alerts.model import EveAlert
from appliance.export.exporter import Exporter
from appliance.settings import SyslogExport
from tests.support.eve import render_eve
from tests.support.export import Alerts
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]

TLS_MODULE = """StreamDriver.Name="gtls" StreamDriver.Mode="1"
    StreamDriver.AuthMode="x509/name" PermittedPeer=["appliance.example"]"""
TLS_GLOBAL = """defaultNetstreamDriver="gtls"
    defaultNetstreamDriverCAFile="{directory}/ca.pem"
    defaultNetstreamDriverCertFile="{directory}/server.pem"
    defaultNetstreamDriverKeyFile="{directory}/server.key" """
CONFIGURATION = """global(workDirectory="{directory}" {globals})
module(load="imtcp" {module})
input(type="imtcp" port="{port}" address="127.0.0.1")
template(name="message" type="string" string="%msg%\\n")
action(type="omfile" file="{directory}/received" template="message")
"""


class Rsyslog:
    """One rsyslogd with its own configuration and files, on a port of loopback."""

    def __init__(self, directory: Path, *, tls: bool = False) -> None:
        self.directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        (directory / "rsyslog.conf").write_text(
            CONFIGURATION.format(
                directory=directory,
                port=self.port,
                globals=TLS_GLOBAL.format(directory=directory) if tls else "",
                module=TLS_MODULE if tls else "",
            )
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("rsyslogd") or "/usr/sbin/rsyslogd"
        argv = [program, "-n", "-f", "rsyslog.conf", "-i", str(self.directory / "pid")]
        log = (self.directory / "log").open("ab")
        self._process = subprocess.Popen(argv, cwd=self.directory, stdout=log, stderr=log)
        end = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert time.monotonic() < end, (self.directory / "log").read_text()
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(20)
            self._process = None

    def read(self) -> list[dict[str, object]]:
        """The JSON of every whole line received; a killed rsyslogd may tear one."""
        path = self.directory / "received"
        events = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
        return events

    def count_ids(self) -> Counter[int]:
        found: Counter[int] = Counter()
        for event in self.read():
            hairpin = event["hairpin"]
            assert isinstance(hairpin, dict)
            found[hairpin["id"]] += 1
        return found


@pytest.fixture
async def alerts(tmp_path: Path) -> AsyncIterator[Alerts]:
    alerts = Alerts(tmp_path / "hairpin.db")
    yield alerts
    alerts.store.close()


@contextlib.asynccontextmanager
async def exporting(
    alerts: Alerts, settings: SyslogExport, settle: float
) -> AsyncIterator[Exporter]:
    exporter = Exporter(
        settings,
        alerts.store,
        "lab",
        alerts.wait_newer,
        settle_seconds=settle,
        backoff_seconds=(0.05, 0.3),
    )
    task = asyncio.create_task(exporter.run())
    try:
        yield exporter
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def produce(alerts: Alerts, stop: asyncio.Event) -> None:
    """About 500 alerts a second, in uneven portions, until told to stop."""
    portion = 1
    while not stop.is_set():
        await alerts.add(portion)
        portion = portion % 19 + 1
        await asyncio.sleep(0.02)


async def run_interrupted(
    rsyslog: Rsyslog,
    alerts: Alerts,
    settings: SyslogExport,
    how: signal.Signals,
    rounds: int,
    settle: float,
) -> tuple[Counter[int], Exporter]:
    """Long enough between the interruptions for the cursor to move, so that it is put to the test."""
    rsyslog.start()
    stop = asyncio.Event()
    producer = asyncio.create_task(produce(alerts, stop))
    try:
        async with exporting(alerts, settings, settle) as exporter:
            for number in range(rounds):
                await asyncio.sleep(2 * settle + number * 0.3)
                await asyncio.to_thread(rsyslog.stop, how)
                await asyncio.sleep(0.4)
                await asyncio.to_thread(rsyslog.start)
            await asyncio.sleep(0.5)
            stop.set()
            await producer
            await wait_until(lambda: exporter.status().delivered_id == alerts.latest, 30)
    finally:
        producer.cancel()
        await asyncio.to_thread(rsyslog.stop)
    return rsyslog.count_ids(), exporter


def report(what: str, found: Counter[int], exporter: Exporter) -> None:
    status = exporter.status()
    twice = sum(found.values()) - len(found)
    print(
        f"\n{what}: {len(found)} alerts, {twice} duplicates received,"
        f" {status.sent} sent, {status.repeated} repeated"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("how", "settle"), [(signal.SIGTERM, 0.5), (signal.SIGKILL, 1.0)])
async def test_every_alert_arrives_though_the_receiver_is_stopped_or_killed(
    tmp_path: Path, alerts: Alerts, how: signal.Signals, settle: float
) -> None:
    rsyslog = Rsyslog(tmp_path)
    settings = SyslogExport(name="siem", transport="tcp", host="127.0.0.1", port=rsyslog.port)
    found, exporter = await run_interrupted(rsyslog, alerts, settings, how, 4, settle)
    report(how.name, found, exporter)
    assert set(found) == set(range(1, alerts.latest + 1))
    assert exporter.status().repeated < alerts.latest, "the cursor never moved in between"


def build_certificates(directory: Path) -> None:
    """A test authority, a certificate for `localhost` and one for the appliance."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    for authority in ("ca", "other"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                "-subj", f"/CN={authority}", "-keyout", f"{authority}.key",
                "-out", f"{authority}.pem")  # fmt: skip
    for name, host in (("server", "localhost"), ("client", "appliance.example")):
        (directory / f"{name}.ext").write_text(f"subjectAltName=DNS:{host}\n")
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={host}",
                "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext",
                "-out", f"{name}.pem")  # fmt: skip


def build_tls_settings(directory: Path, port: int, **changes: object) -> SyslogExport:
    return SyslogExport.model_validate(
        {
            "name": "siem",
            "transport": "tls",
            "host": "localhost",
            "port": port,
            "caFile": directory / "ca.pem",
            "certFile": directory / "client.pem",
            "keyFile": directory / "client.key",
            **changes,
        }
    )


@pytest.mark.slow
async def test_every_alert_arrives_over_tls_with_certificates_of_both_sides(
    tmp_path: Path, alerts: Alerts
) -> None:
    build_certificates(tmp_path)
    rsyslog = Rsyslog(tmp_path, tls=True)
    settings = build_tls_settings(tmp_path, rsyslog.port)
    found, exporter = await run_interrupted(rsyslog, alerts, settings, signal.SIGTERM, 2, 0.5)
    report("TLS", found, exporter)
    assert set(found) == set(range(1, alerts.latest + 1))
    (event, *_) = rsyslog.read()
    assert event["hairpin"]["source"] == {"name": "web1", "vmId": "vm-1", "zones": ["web"]}  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"caFile": "other.pem"}, "certificate verify failed"),
        ({"host": "127.0.0.1"}, "IP address mismatch"),
        ({"caFile": "absent.pem"}, "certificate files can't be used"),
    ],
)
async def test_a_receiver_that_does_not_prove_who_it_is_gets_nothing(
    tmp_path: Path, alerts: Alerts, changes: dict[str, str], fault: str
) -> None:
    build_certificates(tmp_path)
    rsyslog = Rsyslog(tmp_path, tls=True)
    rsyslog.start()
    try:
        await alerts.add(3)
        if "caFile" in changes:
            changes = {"caFile": str(tmp_path / changes["caFile"])}
        settings = build_tls_settings(tmp_path, rsyslog.port, **changes)
        async with exporting(alerts, settings, 0.5) as exporter:
            await wait_until(lambda: fault in exporter.status().last_error)
            assert exporter.status().sent == 0
    finally:
        rsyslog.stop()
    assert rsyslog.read() == []


async def test_the_longest_message_passes_rsyslog_whole(tmp_path: Path, alerts: Alerts) -> None:
    rsyslog = Rsyslog(tmp_path)
    rsyslog.start()
    settings = SyslogExport(name="siem", transport="tcp", host="127.0.0.1", port=rsyslog.port)
    long = parse_event(render_eve(x="y" * 6000))
    assert isinstance(long, EveAlert)
    try:
        await alerts.add(1, long)
        async with exporting(alerts, settings, settle=0.1) as exporter:
            await wait_until(lambda: exporter.status().delivered_id == 1)
            await wait_until(rsyslog.read)
    finally:
        rsyslog.stop()
    (event,) = rsyslog.read()
    assert len(json.dumps(event, separators=(",", ":"))) > 7300
    assert "omitted" not in event["hairpin"]  # type: ignore[operator]
