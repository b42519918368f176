"""One real lane: two clients in namespaces, the service host between them, a real engine.

No switch: the clients are wired straight to the legs, and frames with tags are made by hand.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import TypeAdapter
from pyroute2 import netns
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from appliance.inspection.publish import EngineState, LaneState, read_inspection_state
from appliance.rules.files import write_note
from appliance.rules.model import RevisionReport
from appliance.rules.store import CURRENT, LAST_GOOD, RuleStore, build_revision
from appliance.settings import Settings, parse_settings
from steering.model import Profile
from steering.run import run

T = TypeVar("T")

# No two runs on this machine have the same names.
A, B, HOST = (f"lane{os.getpid()}-{end}" for end in ("a", "b", "svc"))
MAC_A, MAC_B = "02:00:00:00:97:01", "02:00:00:00:97:02"
VLAN = 100
RULES = """\
drop http any any -> any any (msg:"test uri"; http.uri; content:"/etc/passwd"; \
metadata:cve CVE_2021_41773; classtype:web-application-attack; sid:1; rev:1;)
drop tcp any any -> any any (msg:"test payload"; content:"RAWATTACK"; sid:2; rev:1;)
"""
SERVER = """
import http.server, socket
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b"x" * int(self.headers.get("Wanted", 2))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_GET
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
Server(("::", 80), Handler).serve_forever()
"""
INSPECT = """
import asyncio, sys
from pathlib import Path
from appliance.inspection.main import run_inspect
from appliance.settings import read_settings
sys.exit(asyncio.run(run_inspect(read_settings(Path(sys.argv[1])))))
"""


def in_namespace(name: str, make: Callable[[], T]) -> T:
    """What `make` returns, made in a namespace; a socket stays where it was made."""
    result: list[T] = []
    faults: list[BaseException] = []

    def work() -> None:
        try:
            netns.setns(name)
            result.append(make())
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if faults:
        raise faults[0]
    return result[0]


def wait_for(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


@dataclass
class LaneLab:
    directory: Path
    settings: Settings
    inspect: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.directory / "inspect.log").open("ab") as log:
            self.inspect = subprocess.Popen(
                [sys.executable, "-c", INSPECT, str(self.directory / "settings.yaml")],
                cwd=Path(__file__).parents[2],
                stdout=log,
                stderr=log,
            )

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.inspect is not None
        self.inspect.send_signal(number)
        return self.inspect.wait(20)

    def lane(self) -> LaneState | None:
        state = read_inspection_state(self.settings.inspection_state)
        return state.lanes[0] if state else None

    def wait_state(
        self, state: EngineState, other_than: int | None = 0, seconds: float = 15.0
    ) -> LaneState:
        def reached() -> LaneState | None:
            lane = self.lane()
            good = lane is not None and lane.state is state and lane.pid != other_than
            return lane if good else None

        return wait_for(reached, seconds)  # type: ignore[no-any-return]

    def running(self) -> LaneState:
        """The lane with an engine that runs, whatever the test before left."""
        if self.inspect is None or self.inspect.poll() is not None:
            self.settings.inspection_state.unlink(missing_ok=True)
            self.start()
        if not self.settings.ruleset(self.settings.build_lanes()[0]).exists():
            self.write_rules(RULES, loaded=2)
        return self.wait_state(EngineState.RUNNING)

    def write_rules(self, text: str, loaded: int | None = None) -> Path:
        """Put a ruleset in force as the management service does; the one before is the last good one.

        `loaded`: how many rules its trial is said to have loaded; None: there is no report.
        """
        store, profile = RuleStore(self.settings.rules_dir), Profile.PREVENT
        revision = build_revision(text.encode())
        directory = store.profile_dir(profile) / revision
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "suricata.rules").write_text(text)
        if loaded is not None:
            report = RevisionReport(profile, revision, 0.0, "", loaded, 0, 0, (), (), 0, {})
            write_note(directory / "report.json", TypeAdapter(RevisionReport).dump_json(report))
        former = store.find_linked(profile, CURRENT)
        if former not in (None, revision):
            store.write_link(profile, LAST_GOOD, former)
        store.write_link(profile, CURRENT, revision)
        return directory / "suricata.rules"

    def events(self, kind: str) -> list[dict[str, Any]]:
        eve = self.settings.eve_file(self.settings.build_lanes()[0])
        if not eve.exists():
            return []
        lines = eve.read_text().splitlines()
        return [event for line in lines if (event := json.loads(line))["event_type"] == kind]


def connect(host: str = "10.97.0.2") -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(host, timeout=1.5)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    connection.sock = in_namespace(A, lambda: socket.socket(family))
    connection.sock.settimeout(1.5)
    connection.sock.connect((host, 80))
    return connection


def get(
    connection: http.client.HTTPConnection, path: str, headers: dict[str, str] | None = None
) -> int | None:
    """The status of a request, None when no answer came."""
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        response.read()
    except TimeoutError:
        return None
    return response.status


def pings(count: int = 3) -> int:
    """How many of `count` pings came back."""
    ping = ["ping", "-q", "-i", "0.1", "-W", "1", "-c", str(count), "10.97.0.2"]
    ended = run(["ip", "netns", "exec", A, *ping], check=False)
    return int(ended.stdout.split(" received")[0].rsplit(" ", 1)[-1])


class Sniffer:
    """Everything that reaches a client's device."""

    def __init__(self, namespace: str, device: str) -> None:
        self.socket = in_namespace(
            namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        )
        self.socket.bind((device, 3))
        self.socket.settimeout(0.4)

    def read(self) -> list[bytes]:
        """What came, until nothing has come for 0.4 s."""
        frames = []
        with contextlib.suppress(TimeoutError):
            while True:
                frame, address = self.socket.recvfrom(65535)
                if address[2] != socket.PACKET_OUTGOING:
                    frames.append(frame)
        return frames


def crosses(*layers: Any) -> bool:
    """Whether a frame of these layers (after Ethernet) reaches the other client."""
    marker = f"marker {time.monotonic_ns()}".encode()
    sniffer = Sniffer(B, "b0")
    try:
        frame = Ether(src=MAC_A, dst=MAC_B)
        for layer in layers:
            frame = frame / layer
        sender = in_namespace(A, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        sender.bind(("a0", 0))
        with sender:
            sender.send(bytes(frame / Raw(marker)))
        return any(marker in seen for seen in sniffer.read())
    finally:
        sniffer.socket.close()


V4 = (IP(src="10.97.0.1", dst="10.97.0.2"), UDP(sport=1000, dport=3784))
V6 = (IPv6(src="fd97::1", dst="fd97::2"), UDP(sport=1000, dport=3784))


def remove_namespaces() -> None:
    """Ours, and those of runs that were killed; with the processes in them."""
    for name in run(["ip", "netns", "list"]).stdout.split():
        match = re.fullmatch(r"lane(\d+)-(a|b|svc)", name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            for pid in run(["ip", "netns", "pids", name], check=False).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run(["ip", "netns", "del", name], check=False)


def make_namespaces() -> None:
    for name in (A, B, HOST):
        run(["ip", "netns", "add", name])
        run(["ip", "-n", name, "link", "set", "lo", "up"])
    ends = ((A, "a0", "legA", MAC_A, 1, 2, MAC_B), (B, "b0", "legB", MAC_B, 2, 1, MAC_A))
    for name, device, leg, mac, own, peer, peer_mac in ends:
        run(
            ["ip", "link", "add", device, "netns", name, "type", "veth", "peer", leg, "netns", HOST]
        )
        off = [part for what in ("tx", "tso", "gso") for part in (what, "off")]
        run(["ip", "netns", "exec", name, "ethtool", "-K", device, *off])
        run(["ip", "-n", name, "link", "set", device, "address", mac, "up"])
        run(["ip", "-n", name, "addr", "add", f"10.97.0.{own}/24", "dev", device])
        run(["ip", "-n", name, "addr", "add", f"fd97::{own}/64", "dev", device, "nodad"])
        for address in (f"10.97.0.{peer}", f"fd97::{peer}"):
            run(["ip", "-n", name, "neigh", "replace", address, "lladdr", peer_mac, "dev", device])  # fmt: skip


@contextlib.contextmanager
def open_lane(queues: tuple[int, ...] = (7,)) -> Iterator[LaneLab]:
    """A lane with nothing but its supervisor: no ruleset yet."""
    # Not pytest's own directories: they are closed to the engine's user.
    directory = Path(tempfile.mkdtemp(prefix="hairpin-lane-"))
    directory.chmod(0o755)
    text = f"""
        stateDir: {directory}/state
        runDir: {directory}/run
        inspection: {{netns: {HOST}, eveLimitBytes: 1048576}}
        lanes:
          - profile: prevent
            vlan: {VLAN}
            queues: {list(queues)}
            legA: {{interface: leg0, device: legA}}
            legB: {{interface: leg1, device: legB}}
        """
    (directory / "settings.yaml").write_text(text)
    lab = LaneLab(directory, parse_settings(text))
    server: subprocess.Popen[bytes] | None = None
    remove_namespaces()
    try:
        make_namespaces()
        server = subprocess.Popen(["ip", "netns", "exec", B, sys.executable, "-c", SERVER])
        lab.start()
        yield lab
    finally:
        if lab.inspect is not None and lab.inspect.poll() is None:
            lab.end()
        shutil.rmtree(directory)
        if server is not None:
            server.kill()
            server.wait()
        remove_namespaces()
