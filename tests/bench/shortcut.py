"""Rows of the shortcut: a flow that took one, and a mix of mice and elephants, each beside the direct path.

Both pairs are of the bench's own lab: one without a policy, one whose policy has a shortcut after 1 MB.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from tests.bench.rows import Path, Row, check
from tests.bench.stage import SHORTCUT_TARGET, TARGETS, Stage
from tests.bench.traffic import (
    SOURCE,
    BenchError,
    find_quantile,
    is_blocked,
    measure_transfer,
)
from tests.support.appliance import Appliance
from tests.support.lab import wait_until

SIDES = {"shortcut": SHORTCUT_TARGET, "direct": TARGETS[Path.DIRECT]}
ECHO_PORT = 5301
AFTER_BYTES = 1_000_000
MICE = (1_000, 10_000)  # bytes: 90 % of the flows
ELEPHANTS = (10_000_000, 100_000_000)
AT_ONCE = 4
SIZES = (
    *(1_000 * kilobytes for kilobytes in range(1, 11)),
    *(10_000_000 * tens for tens in range(1, 11)),
)

# Sends back whatever it is sent, one connection after the other.
ECHO = r"""
import socket, sys
with socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True) as server:
    while True:
        peer, _ = server.accept()
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                while data := peer.recv(1 << 20):
                    peer.sendall(data)
            except OSError:
                pass
"""

# Sends more than the trigger, waits until the switch has learned the connection, then sends single bytes and
# waits for each. Round-trip times in milliseconds as JSON.
TRIPS = r"""
import json, socket, sys, threading, time
address, port, first, count = json.loads(sys.argv[1])
with socket.create_connection((address, port), 5) as peer:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.settimeout(5)
    sender = threading.Thread(target=peer.sendall, args=(bytes(first),))
    sender.start()
    left = first
    while left:
        left -= len(peer.recv(min(left, 1 << 20)))
    sender.join()
    time.sleep(0.3)
    trips = []
    for _ in range(count):
        began = time.perf_counter()
        peer.sendall(b"x")
        peer.recv(1)
        trips.append((time.perf_counter() - began) * 1000)
        time.sleep(0.002)
print(json.dumps(trips))
"""

# Gets each of the files, some at a time, on a connection of its own each. Prints seconds and bytes as JSON.
FETCH = r"""
import json, queue, socket, sys, threading, time
address, sizes, at_once = json.loads(sys.argv[1])
work = queue.SimpleQueue()
for size in sizes:
    work.put(size)
total, failed, lock = 0, [], threading.Lock()
def fetch():
    global total
    buffer = bytearray(1 << 20)
    while True:
        try:
            size = work.get_nowait()
        except queue.Empty:
            return
        got = 0
        try:
            with socket.create_connection((address, 80), 10) as peer:
                peer.settimeout(10)
                peer.sendall(f"GET /blob/{size} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
                while count := peer.recv_into(buffer):
                    got += count
        except OSError as fault:
            failed.append(str(fault))
        if got < size:
            failed.append(f"{got} of {size} bytes came")
        with lock:
            total += got
threads = [threading.Thread(target=fetch) for _ in range(at_once)]
began = time.perf_counter()
for one in threads:
    one.start()
for one in threads:
    one.join()
print(json.dumps([time.perf_counter() - began, total, failed[:3]]))
"""


@dataclass(frozen=True, slots=True)
class Mix:
    """``sizes`` of the answers, in the order in which they are asked for, bytes."""

    sizes: tuple[int, ...]

    @property
    def mice(self) -> float:
        """Their share of the flows."""
        return sum(size <= MICE[1] for size in self.sizes) / len(self.sizes)

    @property
    def elephants(self) -> float:
        """Their share of the bytes."""
        return sum(size for size in self.sizes if size > MICE[1]) / sum(self.sizes)


def build_mix(elephants: int, seed: int = 7) -> Mix:
    """Nine mice for each elephant, shuffled; the sizes of elephants spread evenly by their logarithm."""
    draw = random.Random(seed)
    small = [size for size in SIZES if size <= MICE[1]]
    large = [size for size in SIZES if size >= ELEPHANTS[0]]
    sizes = [draw.choice(small) for _ in range(9 * elephants)]
    weights = [1 / size for size in large]
    sizes += draw.choices(large, weights, k=elephants)
    draw.shuffle(sizes)
    return Mix(tuple(sizes))


def find_taken(appliance: Appliance) -> int:
    """Packets that went uninspected by shortcuts, all together, as the switch counts them."""
    lines = appliance.ofctl("dump-flows", "table=26").splitlines()
    return sum(
        int(line.split("n_packets=")[1].split(",")[0]) for line in lines if "priority=200" in line
    )


def _ask(appliance: Appliance, script: str, *said: object, timeout: float = 60) -> Any:
    done = appliance.run(SOURCE, sys.executable, "-c", script, json.dumps(said), timeout=timeout)
    try:
        return json.loads(done.stdout)
    except ValueError as fault:
        raise BenchError(f"the client said {done.stdout[-200:]} {done.stderr[-300:]}") from fault


def prepare(stage: Stage) -> None:
    """Servers for both pairs, and files for the mix: sparse ones, since their content is nobody's matter."""
    appliance = stage.appliance
    for vm in SIDES.values():
        blobs = appliance.directory / f"nginx-{vm}" / "www" / "blob"
        if blobs.is_dir():
            continue
        appliance.start(vm, sys.executable, "-c", ECHO, str(ECHO_PORT), role=f"echo-{vm}")
        blobs.mkdir()
        blobs.chmod(0o755)
        for size in SIZES:
            _make_file(blobs / str(size), size)


def _make_file(path: FilePath, size: int) -> None:
    with path.open("wb") as stream:
        stream.truncate(size)
    path.chmod(0o644)


def _check_took(stage: Stage, before: int, what: str) -> None:
    """That it was the shortcut that was measured. Counts are up to half a second late."""
    if not wait_until(lambda: find_taken(stage.appliance) > before, 3):
        raise BenchError(f"no packet of {what} took the shortcut")


def _is_dropped(stage: Stage) -> bool:
    return is_blocked(stage.appliance, SHORTCUT_TARGET)


def measure_shortcut(stage: Stage, rounds: int, seconds: float, pings: int) -> list[Row]:
    """One flow of which all but the first megabyte took the shortcut: its rate, and its round trips."""
    prepare(stage)
    appliance = stage.appliance
    found: list[dict[str, float]] = []
    trips: list[dict[str, float]] = []
    for number in range(rounds):
        rates: dict[str, float] = {}
        times: dict[str, float] = {}
        for side, vm in SIDES.items():
            before = find_taken(appliance)
            rates[side] = measure_transfer(appliance, vm, seconds, stage.idle).rate
            if side == "shortcut":
                _check_took(stage, before, "the transfer")
                rates[side] *= _is_dropped(stage)
            said = (appliance.address(vm), ECHO_PORT, 2 * AFTER_BYTES, pings)
            times[side] = find_quantile(_ask(appliance, TRIPS, *said), 0.5)
        found.append(rates)
        trips.append(times)
        stage.say(
            f"    round {number + 1}: {rates['shortcut']:.2f} of {rates['direct']:.2f} Gbit/s, "
            f"{times['shortcut']:.3f} of {times['direct']:.3f} ms"
        )
    ratio = statistics.median(one["shortcut"] / one["direct"] for one in found)
    added = statistics.median(one["shortcut"] - one["direct"] for one in trips)
    noise = max(one["direct"] for one in trips) - min(one["direct"] for one in trips)
    return [
        _build_row(
            "a flow after its shortcut", "Gbit/s", "at least 0.97 of direct", found,
            check((ratio >= 0.97, f"{ratio:.2f} of direct")), ratio,
        ),
        Row(
            name="round-trip time added after the shortcut, p50",
            value=added,
            unit="ms",
            goal="0: within what direct differs from round to round",
            peers={"direct": statistics.median(one["direct"] for one in trips)},
            spread={side: _spread(trips, side) for side in SIDES},
            rounds=trips,
            missed=check((added <= max(noise, 0.005), f"{added:.3f} ms added, direct differs by {noise:.3f}")),
        ),
    ]  # fmt: skip


def measure_mix(stage: Stage, rounds: int, elephants: int) -> list[Row]:
    """A heavy-tailed mix of answers over new connections, shortcut on."""
    prepare(stage)
    appliance, mix = stage.appliance, build_mix(elephants)
    found: list[dict[str, float]] = []
    for number in range(rounds):
        rates: dict[str, float] = {}
        for side, vm in SIDES.items():
            before = find_taken(appliance)
            said = (appliance.address(vm), mix.sizes, AT_ONCE)
            seconds, total, failed = _ask(appliance, FETCH, *said, timeout=120)
            if failed:
                raise BenchError(f"the mix to {vm}: {failed}")
            rates[side] = total * 8 / seconds / 1e9
            if side == "shortcut":
                _check_took(stage, before, "the mix")
                rates[side] *= _is_dropped(stage)
        found.append(rates)
        stage.say(
            f"    round {number + 1}: {rates['shortcut']:.2f} of {rates['direct']:.2f} Gbit/s"
        )
    ratio = statistics.median(one["shortcut"] / one["direct"] for one in found)
    name = f"mix: {mix.mice:.0%} of flows below 10 kB, {mix.elephants:.0%} of bytes in elephants, shortcut on"
    missed = check((ratio >= 0.9, f"{ratio:.2f} of direct"))
    return [_build_row(name, "Gbit/s", "at least 0.9 of direct", found, missed, ratio)]


def _spread(rounds: list[dict[str, float]], side: str) -> tuple[float, float]:
    return min(one[side] for one in rounds), max(one[side] for one in rounds)


def _build_row(
    name: str,
    unit: str,
    goal: str,
    rounds: list[dict[str, float]],
    missed: tuple[str, ...],
    ratio: float,
) -> Row:
    blind = any(one["shortcut"] == 0 for one in rounds)
    told = ("hairpin with shortcut delivered the token exploit",) if blind else ()
    return Row(
        name=name,
        value=statistics.median(one["shortcut"] for one in rounds),
        unit=unit,
        goal=goal,
        peers={"direct": statistics.median(one["direct"] for one in rounds)},
        ratio={"shortcut / direct": ratio},
        spread={side: _spread(rounds, side) for side in SIDES},
        rounds=rounds,
        missed=(*told, *missed),
    )
