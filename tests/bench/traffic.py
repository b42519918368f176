"""Real traffic between the bench's VMs, bounded in count and time, and what it cost the machine."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from steering.run import run
from tests.support.appliance import BLOCKED, Appliance

SOURCE = "web-1"
IPERF_PORT = 5201
AT_ONCE = 50
PORTS = ("net.ipv4.ip_local_port_range=1024 65535", "net.ipv4.tcp_tw_reuse=1")
"""So that a client that opens 20,000 connections a second does not run out of ports."""


class BenchError(Exception):
    """Something could not be measured."""


def read_busy() -> float:
    """Seconds in which a processor of this machine worked, all together, since boot (proc(5), stat)."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Idle:
    """What the machine does while nothing is measured: busy seconds a second."""

    rate: float


def measure_idle(looks: int = 8) -> Idle:
    """The least of some looks of a second each: what was just started is not idle yet."""
    rates = []
    for _ in range(looks):
        began, busy = time.monotonic(), read_busy()
        time.sleep(1.0)
        rates.append((read_busy() - busy) / (time.monotonic() - began))
    return Idle(min(rates))


@contextlib.contextmanager
def spending(idle: Idle) -> Iterator[Callable[[], float]]:
    """Busy seconds spent within, over what the machine does anyway; to be asked after the block."""
    began, busy = time.monotonic(), read_busy()
    found: list[float] = []
    yield lambda: found[0]
    found.append(read_busy() - busy - idle.rate * (time.monotonic() - began))


def start_servers(appliance: Appliance, *vms: str) -> None:
    """iperf3 and nginx in each VM."""
    appliance.start_web(*vms)
    for vm in vms:
        appliance.start(vm, "iperf3", "-s", "-p", str(IPERF_PORT), role=f"iperf-{vm}")


@dataclass(frozen=True, slots=True)
class Transfer:
    """``rate`` in Gbit/s as received, ``cpu`` in busy seconds per gigabyte."""

    rate: float
    cpu: float
    retransmits: int


def measure_transfer(appliance: Appliance, vm: str, seconds: float, idle: Idle) -> Transfer:
    """One TCP flow from SOURCE by iperf3(1)."""
    argv = [
        "iperf3",
        "-c",
        appliance.address(vm),
        "-p",
        str(IPERF_PORT),
        "-t",
        f"{seconds:g}",
        "-J",
    ]
    with spending(idle) as ask:
        done = appliance.run(SOURCE, *argv, timeout=seconds + 20)
    try:
        end = json.loads(done.stdout)["end"]
        received = end["sum_received"]
    except (ValueError, KeyError) as fault:
        raise BenchError(f"iperf3 to {vm}: {done.stdout[-200:]} {done.stderr[-200:]}") from fault
    return Transfer(
        rate=received["bits_per_second"] / 1e9,
        cpu=ask() / max(received["bytes"] / 1e9, 1e-9),
        retransmits=end["sum_sent"].get("retransmits", 0),
    )


def measure_round_trips(appliance: Appliance, vm: str, count: int) -> list[float]:
    """Round-trip times in milliseconds of ``count`` pings, 2 ms apart, by ping(8)."""
    argv = ["ping", "-n", "-i", "0.002", "-c", str(count), "-W", "1", appliance.address(vm)]
    done = appliance.run(SOURCE, *argv, timeout=30)
    found = [float(text) for text in re.findall(r"time=([0-9.]+) ms", done.stdout)]
    if len(found) < count * 0.9:
        raise BenchError(f"{len(found)} of {count} pings to {vm} came back")
    return found


def find_quantile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


def measure_connections(appliance: Appliance, vm: str, seconds: float) -> float:
    """New connections a second, one request each, by wrk over 50 at a time."""
    url = f"http://{appliance.address(vm)}/"
    argv = [
        "wrk",
        "-t1",
        f"-c{AT_ONCE}",
        f"-d{math.ceil(seconds)}s",
        "-H",
        "Connection: close",
        url,
    ]
    done = run(appliance.lab.netns_argv(SOURCE, argv), check=False, timeout=seconds + 20)
    found = re.search(r"Requests/sec:\s+([0-9.]+)", done.stdout)
    if found is None:
        raise BenchError(f"wrk to {vm}: {done.stdout[-300:]} {done.stderr[-200:]}")
    return float(found[1])


def is_blocked(appliance: Appliance, vm: str) -> bool:
    """Whether the token exploit is dropped, while a request without it is answered."""
    for _ in range(3):
        if appliance.curl(SOURCE, vm).status == 0:
            return appliance.attack(SOURCE, vm).status == BLOCKED
    raise BenchError(f"{vm} answers no request: nothing can be said of its path")
