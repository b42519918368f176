"""What the flow monitor leaves of itself: on a real switch without devices."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from steering.pipeline import CookieKind, build_cookie
from tests.support.dummy_switch import DummySwitch, open_dummy_switch

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]

FOLLOW = """
import asyncio, sys
from steering.switch.monitor import FlowMonitor

async def take(_address): pass

def tell(): print("changed", flush=True)

asyncio.run(FlowMonitor(sys.argv[1], take, tell, lambda: None).run())
"""


def change_flow(switch: DummySwitch) -> None:
    flow = f"cookie={build_cookie(CookieKind.ADDRESS):#x},table=99,priority=1,actions=drop"
    for verb, text in (("add-flow", flow), ("del-flows", "table=99")):
        switch.run("ovs-ofctl", "-O", "OpenFlow15", verb, switch.target, text)


async def test_a_monitor_that_is_killed_leaves_no_files(tmp_path: Path) -> None:
    """As with the service, when the kernel is short of memory: nobody is left to clear up."""
    with (
        tempfile.TemporaryDirectory(prefix="hp-") as name,
        open_dummy_switch(Path(name), ()) as switch,
    ):
        before = sorted(os.listdir(name))
        where = {**os.environ, "TMPDIR": str(tmp_path), "OVS_RUNDIR": name}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FOLLOW, switch.target, env=where, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        line = asyncio.create_task(process.stdout.readline())
        for _ in range(50):
            change_flow(switch)
            await asyncio.wait([line], timeout=0.2)
            if line.done():
                break
        assert line.done()
        assert await line == b"changed\n"
        process.send_signal(signal.SIGKILL)
        await process.wait()
        assert list(tmp_path.iterdir()) == []
        assert sorted(os.listdir(name)) == before
        change_flow(switch)  # by its next news ovs-ofctl, too, finds that nobody reads any more
