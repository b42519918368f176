"""The stage of the demonstration: a lab, servers in its VMs, and hands to try things with.

Whatever a user would do goes through the command line, in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from appliance.lab import processes
from appliance.lab.changes import start_in_vm
from appliance.lab.demo_policies import Attempt, build_attempt_argv
from appliance.lab.demo_probe import Answer, read_curl, read_redis
from appliance.lab.network import find_namespaces
from appliance.lab.plan import ROOT, LabState
from appliance.lab.processes import find_lab_processes
from appliance.lab.services import build_env
from steering.errors import CommandFailed, HairpinError
from steering.run import Finished, run

T = TypeVar("T")

WEB_SERVERS = ("web-1", "app-1", "db-1", "db-2")
REDIS_SERVERS = ("web-1", "app-1", "db-1")
ANSWER_SECONDS = 3
"""How long an attacker waits for an answer; an uninspected one takes milliseconds."""

NGINX = """\
daemon off;
worker_processes 1;
user nobody nogroup;
pid {directory}/nginx.pid;
error_log stderr notice;
events {{ worker_connections 64; }}
http {{
    access_log {directory}/access.log;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 80;
        listen [::]:80 ipv6only=on;
        location = /bulk {{ root {directory}; }}
        location / {{ return 200 "here is {vm}\\n"; }}
    }}
}}
"""
# protected-mode keeps others than this machine out of a server without a password.
REDIS = """\
port 6379
bind * -::*
protected-mode no
save ""
dir {directory}
unixsocket {directory}/redis.sock
slowlog-log-slower-than 0
slowlog-max-len 10000
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """The lab with what the scenario needs; ``say`` tells a person what is going on."""

    state: LabState
    say: Callable[[str], None]

    @property
    def directory(self) -> Path:
        return self.state.directory / "demo"

    def find_address(self, attempt: Attempt) -> str:
        vm = self.state.vm(attempt.target)
        return vm.address4 if attempt.version == "IPv4" else vm.address6

    def run_hairpin(
        self, *argv: str, timeout: float = 60.0, statuses: tuple[int, ...] = (0,)
    ) -> Any:
        """A command of the product with --json, as a user runs it; its document.

        Raises CommandFailed with what it printed, when it ends with none of ``statuses``.
        """
        env = {**build_env(), **self.state.client_env}
        command = [*self.state.client_argv, sys.executable, "-m", "appliance.cli", *argv, "--json"]
        ended = run(command, timeout=timeout, env=env, check=False)
        if ended.status not in statuses or not ended.stdout.startswith("{"):
            raise CommandFailed(shlex.join(command), ended.status, ended.stderr or ended.stdout)
        return json.loads(ended.stdout)

    def try_it(self, attempt: Attempt, seconds: int = ANSWER_SECONDS) -> Answer:
        """Make a request from inside the source VM, and what came of it."""
        argv = build_attempt_argv(attempt, self.find_address(attempt), seconds)
        inside = self.state.netns_argv(attempt.source, argv)
        ended = run(inside, timeout=seconds + 20.0, check=False)
        return read_redis(ended) if attempt.is_redis else read_curl(ended)

    def try_all(self, attempts: Sequence[Attempt]) -> list[Answer]:
        """All at the same time: one that is blocked takes as long as the attacker waits."""
        return run_all([lambda one=one: self.try_it(one) for one in attempts])  # type: ignore[misc]

    def count_seen(self, attempt: Attempt) -> int:
        """How often the server's own log has the request."""
        if attempt.is_redis:
            socket = str(self.directory / attempt.target / "redis.sock")
            text = run(["redis-cli", "-s", socket, "SLOWLOG", "GET", "10000"]).stdout
        else:
            text = (self.directory / attempt.target / "access.log").read_text(errors="replace")
        return sum(attempt.token in line for line in text.splitlines())

    def read_log(self, role: str) -> str:
        """What a process in a VM has printed so far; "" for nothing."""
        try:
            return (self.state.log_dir / f"{role}.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""


def run_all(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Each in a thread of its own; the results in their order."""
    with ThreadPoolExecutor(max_workers=len(jobs)) as pool:
        return [one.result() for one in [pool.submit(job) for job in jobs]]


def wait_until(look: Callable[[], T], seconds: float, every: float = 0.05) -> T:
    """What ``look`` gives as soon as it is true-ish, or else its last after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(every)
    return found


def set_stage(state: LabState, say: Callable[[str], None]) -> Stage:
    """Start the servers and wait until each listens. Raises HairpinError with the server's log."""
    stage = Stage(state, say)
    stage.directory.mkdir(mode=0o711)
    for vm in sorted({*WEB_SERVERS, *REDIS_SERVERS}):
        directory = stage.directory / vm
        directory.mkdir(mode=0o711)
        if vm in WEB_SERVERS:
            file = directory / "nginx.conf"
            file.write_text(NGINX.format(directory=directory, vm=vm))
            argv = ["nginx", "-p", str(directory), "-e", "stderr", "-c", str(file)]
            start_in_vm(state, vm, argv, role=f"demo-nginx-{vm}")
        if vm in REDIS_SERVERS:
            file = directory / "redis.conf"
            file.write_text(REDIS.format(directory=directory))
            start_in_vm(state, vm, ["redis-server", str(file)], role=f"demo-redis-{vm}")
    for vm, port in [(vm, 80) for vm in WEB_SERVERS] + [(vm, 6379) for vm in REDIS_SERVERS]:
        if not wait_until(lambda vm=vm, port=port: _listens(state, vm, port), 15.0):  # type: ignore[misc]
            role = f"demo-{'nginx' if port == 80 else 'redis'}-{vm}"
            raise HairpinError(f"{role} does not listen on port {port}\n{stage.read_log(role)}")
    return stage


def _listens(state: LabState, vm: str, port: int) -> bool:
    """On IPv4 and on IPv6."""
    shown: Finished = run(state.netns_argv(vm, ["ss", "-Hltn", f"sport = :{port}"]))
    return len(shown.stdout.splitlines()) >= 2


def find_remains(name: str) -> list[str]:
    """Whatever is left on this machine of a lab, each in a few words; empty when nothing is."""
    found = [f"namespace {one}" for one in find_namespaces(f"hp-{name}-")]
    found += [f"process {pid}" for pid in find_lab_processes(name, (), ())]
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    marks = (f"/hp-{name}-", f"/hairpin-lab/{name}")
    found += [f"mount {one.split()[1]}" for one in mounts if any(mark in one for mark in marks)]
    files = ROOT.glob(f"{name}*") if ROOT.exists() else ()
    return found + [f"file {one}" for one in files]


def read_machine() -> dict[str, str]:
    """What this machine's own network is set to: sysctls that a router would change, and links."""
    found = {f"link {one}": "there" for one in os.listdir("/sys/class/net")}
    for root in ("bridge", "ipv4/conf", "ipv6/conf", "ipv4/ip_forward"):
        top = Path("/proc/sys/net", root)
        for path in [top] if top.is_file() else top.rglob("*"):
            # Some are written only, some went away with their link meanwhile.
            with contextlib.suppress(OSError):
                if path.is_file():
                    found[f"sysctl {path.relative_to('/proc/sys')}"] = path.read_text().strip()
    return found


def find_differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What is set otherwise than before, and links of a lab's kind that were not there."""
    changed = [key for key in before if key in after and after[key] != before[key]]
    links = [key for key in after if key.startswith(("link vnet", "link hp-"))]
    return changed + [key for key in links if key not in before]


def read_tails(state: LabState) -> str:
    """The ends of the logs that tell why something failed."""
    parts = []
    for role in ("qemu", "console") if state.service_vm else ("serve", "inspect"):
        tail = processes.read_tail(state.log_dir / f"{role}.log", 60 if role == "console" else 15)
        parts.append(f"--- the end of {role}.log\n{tail}")
    return "\n".join(parts)
