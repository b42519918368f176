"""Hairpin's own processes in the lab, `inspect`, `serve`, `observe`: each with what it needs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pwd
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path

import structlog

import appliance
from appliance.inspection.process import write_group_nice
from appliance.lab import expose, processes
from appliance.lab.hypervisor import find_forwarding_legs, record_process
from appliance.lab.plan import LabState, ProcessRecord, render_settings
from appliance.lab.store import write_state
from steering.errors import HairpinError

USER = "hairpin"
INSPECT = "inspect"
SERVE = "serve"
OBSERVE = "observe"
ROLES = (INSPECT, SERVE, OBSERVE)
SERVE_NICE = -5
"""Between what an engine and the switch have and everybody else: a changed policy waits for no batch job."""
log = structlog.get_logger("lab.services")

Progress = Callable[[str], None]


def find_user() -> pwd.struct_passwd:
    """The user that the management service runs as. Raises HairpinError before set-up."""
    try:
        return pwd.getpwnam(USER)
    except KeyError as fault:
        raise HairpinError(f"there's no user {USER!r}", "run `make setup`") from fault


def _write(path: Path, text: str, mode: int, uid: int, gid: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        os.fchown(file.fileno(), uid, gid)
        os.fchmod(file.fileno(), mode)


def write_files(state: LabState) -> None:
    """The appliance's directories and settings, the API's token, and the client's note of both."""
    user = find_user()
    state.state_dir.mkdir(mode=0o711)
    os.chown(state.state_dir, user.pw_uid, user.pw_gid)
    state.run_dir.mkdir(mode=0o755)
    os.chown(state.run_dir, 0, user.pw_gid)
    spool = state.run_dir / "observe"
    spool.mkdir(mode=0o750)
    os.chown(spool, user.pw_uid, user.pw_gid)
    _write(state.settings_file, render_settings(state), 0o640, 0, user.pw_gid)
    _write(state.token_file, secrets.token_urlsafe(32) + "\n", 0o600, user.pw_uid, user.pw_gid)
    client = {"url": state.url, "tokenFile": str(state.token_file)}
    _write(state.client_file, json.dumps(client) + "\n", 0o600, 0, 0)


def _setpriv(capabilities: str) -> list[str]:
    """The command that becomes the user with these capabilities and can never get another one."""
    keep = f"-all{capabilities}"
    sets = [f"--inh-caps={keep}", f"--ambient-caps={keep}", f"--bounding-set={keep}"]
    return [
        "setpriv",
        f"--reuid={USER}",
        f"--regid={USER}",
        "--init-groups",
        *sets,
        "--no-new-privs",
        "--",
    ]


def build_service_argv(state: LabState, role: str) -> list[str]:
    """How a process of Hairpin is started in the lab, with all that is put before it."""
    command = [sys.executable, "-m", "appliance.cli", role, "--config", str(state.settings_file)]
    if role == SERVE:
        return expose.build_argv(["nice", "-n", str(SERVE_NICE), *_setpriv(""), *command])
    if role == OBSERVE:
        # Not by `ip netns exec`, which hides the control groups: it enters the namespace by itself,
        # then gives up all but CAP_NET_RAW.
        return expose.build_argv(command)
    if role == INSPECT:
        # Root in the service host: it makes bridges, and gives up what an engine doesn't need.
        return ["ip", "netns", "exec", state.service_host, *expose.build_argv(command)]
    raise ValueError(f"no such role: {role}")


def build_env() -> dict[str, str]:
    root = Path(appliance.__file__).resolve().parent.parent
    return {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}


def start_service(state: LabState, role: str) -> LabState:
    """Start one of Hairpin's processes (`inspect`, `serve`, `observe`), or start it again."""
    have = state.process(role)
    if have is not None and processes.is_running(have.pid, have.started):
        raise HairpinError(f"{role} is running already", "end it first")
    state = record_process(state, role)
    log_file = state.log_dir / f"{role}.log"
    pid, started = processes.start_process(
        build_service_argv(state, role),
        lab=state.name,
        log_file=log_file,
        env={**build_env(), "HOME": str(state.state_dir)},
    )
    # Its session is one of its own here; under systemd a unit's is, too.
    if role == SERVE and (refused := write_group_nice(pid, SERVE_NICE)):
        log.warning("the management service is not as urgent as in production", reason=refused)
    return write_state(state.with_process(ProcessRecord(role, pid, started, str(log_file))))


def start_services(state: LabState, progress: Progress) -> LabState:
    """Start everything of Hairpin in this lab; does not wait until it is ready."""
    for role in ROLES:
        progress(f"starting hairpin {role}")
        state = start_service(state, role)
    return state


def read_health(state: LabState) -> int:
    """The status that the API answers its health with, 0 when it does not answer."""
    try:
        token = state.token_file.read_text().strip()
    except OSError:
        return 0
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", state.api_port, timeout=2)
    ) as connection:
        try:
            headers = {"Authorization": f"Bearer {token}"}
            connection.request("GET", "/api/v1/health", headers=headers)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0


def find_dead(state: LabState) -> list[str]:
    """The roles that were started and do not run any more."""
    return [
        record.role
        for record in state.processes
        if not processes.is_running(record.pid, record.started)
    ]


def describe_logs(state: LabState) -> str:
    """The end of each log of Hairpin's processes, for a message to a person."""
    parts = []
    for record in state.processes:
        tail = processes.read_tail(Path(record.log)) if record.role in ROLES else ""
        if tail:
            parts.append(f"--- {record.role}.log\n{tail}")
    return "\n".join(parts)


def wait_ready(state: LabState, progress: Progress, seconds: float = 60.0) -> None:
    """Until frames pass through every lane and the API is healthy.

    Raises HairpinError with the ends of the logs after ``seconds``, or when a process has ended.
    """
    deadline = time.monotonic() + seconds
    said = ""
    while True:
        legs = find_forwarding_legs(state)
        health = read_health(state)
        waiting = [f"leg {leg}" for leg, forwarding in legs.items() if not forwarding]
        if health != 200:
            waiting.append(f"the API ({health or 'no answer'})")
        if not waiting:
            return
        dead = find_dead(state)
        if dead or time.monotonic() >= deadline:
            why = f"ended: {', '.join(dead)}" if dead else f"not ready after {seconds:.0f} s"
            raise HairpinError(
                f"Hairpin did not come up in the lab ({why}; waiting for {', '.join(waiting)})\n"
                f"{describe_logs(state)}",
                "see `hairpin doctor`",
            )
        line = f"waiting for {', '.join(waiting)}"
        if line != said:
            progress(line)
            said = line
        time.sleep(0.2)
