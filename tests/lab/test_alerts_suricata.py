"""What a real engine writes while its file is renamed under it: every alert is stored once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.alerts.attribute import Context
from appliance.alerts.ingest import Ingest
from appliance.alerts.query import AlertFilter, find_alerts, find_latest_alert_id
from appliance.alerts.store import Store
from steering.decide import decide
from steering.model import Lane, PolicySet
from steering.run import run
from tests.support.waiting import wait_until
from tests.support.worlds import LANES

CONFIGURATION = """%YAML 1.1
---
outputs:
  - eve-log:
      enabled: yes
      filetype: regular
      filename: eve.json
      types:
        - alert: {payload: yes, payload-printable: yes, verdict: yes}
"""
RULE = 'alert udp any any -> 10.98.7.2 any (msg:"seen"; sid:1; rev:1;)\n'
SEND = """
import socket, sys, time
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for port in range(int(sys.argv[1]), int(sys.argv[2])):
    sender.sendto(b"x" * 700, ("10.98.7.2", port))
    time.sleep(0.001)
"""
ROTATIONS = 5
PER_STEP = 200


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str]]:
    """Two namespaces joined by a veth pair: the sender, and the one the engine listens in."""
    names = f"tA{os.getpid()}s", f"tA{os.getpid()}e"
    mac = "02:00:00:98:07:02"
    try:
        for name in names:
            run(["ip", "netns", "add", name])
        run(["ip", "-n", names[0], "link", "add", "v0", "type", "veth",
             "peer", "name", "v1", "netns", names[1]])  # fmt: skip
        for name, device, address in zip(names, ("v0", "v1"), ("10.98.7.1/24", "10.98.7.2/24"),
                                         strict=True):  # fmt: skip
            run(["ip", "-n", name, "addr", "add", address, "dev", device])
            run(["ip", "-n", name, "link", "set", device, "up"])
        run(["ip", "-n", names[1], "link", "set", "v1", "address", mac])
        run(["ip", "-n", names[0], "neigh", "add", "10.98.7.2", "lladdr", mac, "dev", "v0"])
        yield names
    finally:
        for name in names:
            run(["ip", "netns", "delete", name], check=False)


@pytest.mark.lab
@pytest.mark.side_by_side
@pytest.mark.slow
async def test_rotation_under_a_running_engine(tmp_path: Path, namespaces: tuple[str, str]) -> None:
    sender, listener = namespaces
    lane = tmp_path / "lane"
    lane.mkdir()
    (tmp_path / "suricata.yaml").write_text(CONFIGURATION)
    (tmp_path / "test.rules").write_text(RULE)
    engine = subprocess.Popen(  # noqa: ASYNC220 - its output goes nowhere, and it is killed
        ["ip", "netns", "exec", listener, shutil.which("suricata") or "suricata",
         "-c", tmp_path / "suricata.yaml", "-S", tmp_path / "test.rules", "-l", lane,
         "-k", "none", "--pcap=v1", "--runmode", "single"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    store = Store(tmp_path / "hairpin.db")
    live = lane / "eve.json"

    def find_context(lane: Lane, at: float) -> Context:
        return Context((), PolicySet(), None, lane, {})

    ingest = Ingest(
        store, {LANES[0]: live}, find_context, decide, poll_seconds=0.02, grace_seconds=1.0
    )
    task = asyncio.create_task(ingest.run())
    first = 20_000
    last = first

    def send() -> subprocess.Popen[bytes]:
        nonlocal last
        last += PER_STEP
        argv = ["ip", "netns", "exec", sender, sys.executable, "-c", SEND]
        return subprocess.Popen([*argv, str(last - PER_STEP), str(last)])

    async def all_stored() -> bool:
        return await find_latest_alert_id(store) >= last - first

    def warm_up() -> bool:
        # An engine that is not ready yet misses what is sent: ports below the counted ones.
        run(["ip", "netns", "exec", sender, sys.executable, "-c", SEND, "9000", "9001"])
        return bool(live.exists() and live.stat().st_size)

    try:
        await wait_until(warm_up, 30)
        await asyncio.sleep(0.3)
        first -= await find_latest_alert_id(store)
        for number in range(ROTATIONS):
            sending = send()
            await asyncio.sleep(0.15)  # so that it is renamed in the middle of the burst
            await wait_until(live.exists)
            rotated = live.rename(lane / f"eve.json.{time.time_ns()}")
            if number % 2:
                await asyncio.to_thread(sending.wait)
                # All of the burst is in the renamed file, until the engine is told, late.
                await wait_until(all_stored, 20)
                assert rotated.exists()
            engine.send_signal(signal.SIGHUP)
            await asyncio.to_thread(sending.wait)
        sending = send()
        await asyncio.to_thread(sending.wait)
        await wait_until(all_stored, 20)
        await wait_until(lambda: len(list(lane.glob("eve.json.*"))) == 0, 20)
        assert engine.poll() is None
    finally:
        engine.kill()
        engine.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    found: Counter[int | None] = Counter()
    cursor: str | None = "0"
    while cursor is not None:
        page = await find_alerts(store, AlertFilter(), cursor, limit=1000, ascending=True)
        found.update(alert.destination.port for alert in page.items)
        cursor = page.next_cursor
    status = ingest.status()[0]
    store.close()
    print(f"\n{found.total()} alerts, {ROTATIONS} rotations, {status}")
    del found[9000]
    assert found == Counter(range(20_000, last))
    assert (status.malformed, status.fault) == (0, "")
