"""One lane with a third leg on the lab's own switch: real VMs, real engine, flows put in by hand.

The switch's part of the shortcut (`steering`) is not here. Frames of two VMs are steered into the lane with
a priority in their tag that the test chooses; what comes back by leg C is delivered and counted.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from appliance.inspection.publish import EngineState, LaneState, Shortcut
from appliance.lab import LabState
from appliance.lab.plan import render_settings
from appliance.rules.shortcut import build_shortcut_rules
from appliance.settings import parse_settings
from steering.run import run
from tests.support.inspection_lane import INSPECT, RULES, SERVER, LaneLab, in_namespace, wait_for

CLIENT, TARGET = "web-1", "app-1"
RAW_PORT, TLS_PORT = 81, 443
RULES_TEXT = RULES + (
    'drop tls any any -> any any (msg:"test sni"; tls.sni; content:"evil.example"; sid:3; rev:1;)\n'
)
# Asked "NNNNNNMMMMMM", it takes NNNNNN kB and then sends MMMMMM kB and "end!".
RAW_SERVER = f"""
import socket, ssl, sys, threading
def work(c, wrap):
    try:
        if wrap: c = wrap(c)
        while True:
            head = b""
            while len(head) < 12:
                part = c.recv(12 - len(head))
                if not part: return
                head += part
            left, wanted = int(head[:6]) * 1000, int(head[6:]) * 1000
            while left:
                part = c.recv(min(left, 65536))
                if not part: return
                left -= len(part)
            c.sendall(b"r" * wanted + b"end!")
    except OSError: pass
def serve(port, wrap):
    s = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    while True: threading.Thread(target=work, args=(s.accept()[0], wrap), daemon=True).start()
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
def wrap(c): return context.wrap_socket(c, server_side=True)
threading.Thread(target=serve, args=({TLS_PORT}, wrap), daemon=True).start()
serve({RAW_PORT}, None)
"""


@dataclass
class ShortcutLab(LaneLab):
    """``inspect`` on the lab's lane `prevent`, and its switch."""

    lab: LabState | None = None

    @property
    def state(self) -> LabState:
        assert self.lab is not None
        return self.lab

    def start(self) -> None:
        with (self.directory / "inspect.log").open("ab") as log:
            self.inspect = subprocess.Popen(
                [sys.executable, "-c", INSPECT, str(self.directory / "settings.yaml")],
                cwd=Path(__file__).parents[2], stdout=log, stderr=log,
            )  # fmt: skip

    def add_flows(self, *flows: str) -> None:
        run(self.state.ofctl_argv(["add-flows", "-"]), stdin="\n".join(flows) + "\n")

    def steer(self, priority: int) -> None:
        """Both VMs' IP into the lane, with this priority in the tag."""
        lane, vms = self.state.lanes[0], [self.state.vm(name) for name in (CLIENT, TARGET)]
        tag = f"push_vlan:0x8100,set_field:{0x1000 | lane.vlan}->vlan_vid"
        tag += f",set_field:{priority}->vlan_pcp"
        self.add_flows(
            *(
                f"priority=300,{family},in_port={vm.ofport},dl_dst={peer.mac},"
                f"actions={tag},output:{leg}"
                for vm, peer, leg in ((*vms, lane.ofport_a), (*reversed(vms), lane.ofport_b))
                for family in ("ip", "ipv6")
            )
        )

    def deliver(self) -> None:
        """What comes from the legs, to whom it is for; counted is what comes by leg C."""
        lane, vms = self.state.lanes[0], [self.state.vm(name) for name in (CLIENT, TARGET)]
        legs = (lane.ofport_a, lane.ofport_b, lane.ofport_c)
        flows = [f"priority=390,in_port={leg},actions=drop" for leg in legs]
        for vm in vms:
            target = f"dl_vlan={lane.vlan},dl_dst={vm.mac}"
            out = f"actions=pop_vlan,output:{vm.ofport}"
            flows += [f"priority=400,in_port={leg},{target},{out}" for leg in legs]
            by_c = f"in_port={lane.ofport_c},{target}"
            flows += [
                f"priority=410,cookie={0xC0 + code},{by_c},dl_vlan_pcp={code},{out}"
                for code in range(8)
            ]
            flows += [
                f"priority=420,cookie=0xcf,{family},tcp_flags=+syn,{by_c},{out}"
                for family in ("tcp", "tcp6")
            ]
        self.add_flows(*flows)

    def by_leg_c(self, cookie: int) -> int:
        """Packets that came back by leg C: cookie 0xc0 and the priority in the tag, 0xcf a SYN."""
        return self.all_by_leg_c().get(cookie, 0)

    def all_by_leg_c(self) -> dict[int, int]:
        """The same for each cookie that there is."""
        # The userspace datapath's figures come to the flows twice a second, or when asked for.
        self._settle()
        shown = run(self.state.ofctl_argv(["dump-flows", "cookie=0xc0/0xfffffffffffffff0"])).stdout
        found: dict[int, int] = {}
        for cookie, count in re.findall(r"cookie=(0x[0-9a-f]+),.* n_packets=(\d+)", shown):
            found[int(cookie, 16)] = found.get(int(cookie, 16), 0) + int(count)
        return found

    def _settle(self) -> None:
        run(["ovs-appctl", "-t", str(self.state.vswitchd), "revalidator/wait"])

    @contextlib.contextmanager
    def passing(self, port: int) -> Iterator[None]:
        """Meanwhile the switch passes the connection by itself: the engine sees nothing of it."""
        one, other = self.state.vm(CLIENT), self.state.vm(TARGET)
        self.add_flows(
            *(
                f"priority=500,cookie=0xdd,{family},in_port={vm.ofport},{side}={port},"
                f"actions=output:{peer.ofport}"
                for vm, peer, side in ((one, other, "tp_src"), (other, one, "tp_dst"))
                for family in ("tcp", "tcp6")
            )
        )
        # Until then the datapath goes on by what it remembers.
        self._settle()
        try:
            yield
        finally:
            run(self.state.ofctl_argv(["del-flows", "cookie=0xdd/-1"]))
            self._settle()

    def shortcut(self) -> Shortcut:
        lane = self.lane()
        return Shortcut() if lane is None else lane.shortcut

    def wait_shortcut(self, *states: str, seconds: float = 10.0) -> Shortcut:
        return wait_for(  # type: ignore[no-any-return]
            lambda: (found := self.shortcut()) and found.state in states and found, seconds
        )

    def address(self, family: int) -> str:
        vm = self.state.vm(TARGET)
        return vm.address4 if family == 4 else vm.address6

    def socket(self, family: int, port: int, source: int = 0) -> socket.socket:
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        made = in_namespace(self.state.vm(CLIENT).netns, lambda: socket.socket(kind))
        made.settimeout(4)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if source:
            made.bind(("", source))
        made.connect((self.address(family), port))
        return made

    def connect(self, family: int, source: int = 0) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.address(family), timeout=4)
        connection.sock = self.socket(family, 80, source)
        return connection


def ask(connection: socket.socket, up: int, down: int, data: bytes = b"") -> int:
    """Send ``up`` kB (or ``data``, of that size), get ``down`` kB; bytes got, -1 when they don't come."""
    try:
        connection.sendall(f"{up:06}{down:06}".encode() + (data or b"u" * (up * 1000)))
        got = 0
        last = b""
        while not last.endswith(b"end!"):
            part = connection.recv(2**20)
            if not part:
                return -1
            got += len(part)
            last = (last + part)[-4:]
    except OSError:
        return -1
    return got


@contextlib.contextmanager
def open_shortcut_lane(lab: LabState, rules: str = "") -> Iterator[ShortcutLab]:
    directory = Path(tempfile.mkdtemp(prefix="hairpin-shortcut-"))
    directory.chmod(0o755)
    document: dict[str, Any] = yaml.safe_load(render_settings(lab))
    document |= {"stateDir": f"{directory}/state", "runDir": f"{directory}/run"}
    document["inspection"] = {"netns": lab.service_host}
    document["lanes"] = document["lanes"][:1]
    document.pop("canary", None)
    text = yaml.safe_dump(document)
    (directory / "settings.yaml").write_text(text)
    made = ShortcutLab(directory, parse_settings(text), lab=lab)
    key = directory / "tls.pem"
    run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out",
         f"{key}.crt", "-days", "2", "-subj", "/CN=lab", "-batch"],
    )  # fmt: skip
    key.write_text(key.read_text() + Path(f"{key}.crt").read_text())
    own = "".join(f"{line}\n" for line in build_shortcut_rules())
    made.write_rules(RULES_TEXT + rules + own, loaded=3 + rules.count("\n") + own.count("\n"))
    servers: list[subprocess.Popen[bytes]] = []
    made.deliver()
    try:
        for argv in ([SERVER], [RAW_SERVER, str(key)]):
            inside = lab.netns_argv(TARGET, [sys.executable, "-c", *argv])
            servers.append(subprocess.Popen(inside))
        made.start()
        made.wait_state(EngineState.RUNNING, seconds=30)
        made.wait_shortcut("ready", "on")
        yield made
    finally:
        if made.inspect is not None and made.inspect.poll() is None:
            made.end()
        for server in servers:
            server.kill()
            server.wait()
        shutil.rmtree(directory)


def talk_tls(connection: socket.socket, name: str, version: ssl.TLSVersion) -> int:
    """A handshake and 1 kB each way; as `ask`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    try:
        with context.wrap_socket(connection, server_hostname=name) as wrapped:
            got = ask(wrapped, 1, 1)
            time.sleep(0.05)
            return got if got < 0 else ask(wrapped, 1, 1)
    except OSError:
        return -1


def find_lane(lab: ShortcutLab) -> LaneState:
    lane = lab.lane()
    assert lane is not None
    return lane
