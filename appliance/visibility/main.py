"""`hairpin observe`: gives away every privilege but CAP_NET_RAW, then becomes the observer."""

from __future__ import annotations

import os
import pwd
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import structlog
from pyroute2 import netns

from appliance.settings import Settings
from appliance.visibility.group import make_group
from appliance.visibility.observer import ObserverConfig
from appliance.visibility.state import Isolation
from steering.errors import CommandFailed, HairpinError
from steering.run import run

log = structlog.get_logger("observe")

# The user of the management service, who reads the records and deletes the files.
USER = "hairpin"
CAPABILITY = "net_raw"


def build_group_name(name: str, run_dir: Path) -> str:
    """The control group's name: one for each run directory, for several may share a name."""
    return f"hairpin-observe-{name}-{zlib.crc32(bytes(run_dir)):08x}"


def build_confined(user: tuple[int, int] | None, command: Sequence[str]) -> list[str]:
    """``command`` with CAP_NET_RAW and nothing else, as ``user`` (uid, gid) or still as root.

    Source: setpriv(1), capabilities(7).
    """
    identity = [] if user is None else [f"--reuid={user[0]}", f"--regid={user[1]}"]
    return [
        "setpriv",
        *identity,
        "--clear-groups",
        f"--inh-caps=-all,+{CAPABILITY}",
        f"--ambient-caps=-all,+{CAPABILITY}",
        f"--bounding-set=-all,+{CAPABILITY}",
        "--no-new-privs",
        "--",
        *command,
    ]


def _observer_command(config: ObserverConfig, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "appliance.visibility.observer",
        *options,
        config.model_dump_json(),
    ]


def _find_user() -> tuple[int, int] | None:
    try:
        entry = pwd.getpwnam(USER)
    except KeyError:
        return None
    return entry.pw_uid, entry.pw_gid


def _choose_user(config: ObserverConfig) -> tuple[tuple[int, int] | None, list[str]]:
    """Whom to run as when started as root: the own user if it can do the work, else why not."""
    user = _find_user()
    if user is None:
        return None, [f"runs as root: there is no user {USER}"]
    directory = config.spool.parent
    # The directory only: a file in it could be a link that its owner put there.
    os.chown(directory, *user)
    try:
        run(build_confined(user, _observer_command(config, "--check")), timeout=60.0)
    except CommandFailed as fault:
        why = fault.output.strip().splitlines()[-1:] or [f"exited with {fault.status}"]
        os.chown(directory, 0, 0)
        return None, [f"runs as root: user {USER} can't: {why[0][:300]}"]
    return user, []


def run_observe(settings: Settings) -> int:
    """Observe the mirror port until SIGTERM or SIGINT; the exit status.

    Does not return when all is well: the process becomes the observer, with the same pid. Raises
    HairpinError when no device is set, or the network namespace or the device is missing.
    """
    visibility = settings.visibility
    if visibility.device is None:
        raise HairpinError(
            "no mirror port is set", "set visibility.device in the settings, or don't run `observe`"
        )
    directory = settings.flow_spool.parent
    directory.mkdir(parents=True, exist_ok=True, mode=0o750)
    if visibility.netns is not None:
        try:
            netns.setns(visibility.netns, flags=0)
        except OSError as fault:
            raise HairpinError(
                f"the network namespace {visibility.netns} can't be entered: {fault.strerror}",
                "make it, or correct visibility.netns",
            ) from fault
    config = ObserverConfig(
        device=visibility.device,
        idle_seconds=visibility.idle_seconds,
        active_seconds=visibility.active_seconds,
        spool=settings.flow_spool,
        state=directory / "state.json",
        group=None,
        isolation=Isolation(user="", capabilities=(), group=""),
    )
    as_root = os.geteuid() == 0
    user, reasons = _choose_user(config) if as_root else (None, [])
    group, group_reasons = make_group(build_group_name(settings.name, settings.run_dir), user)
    isolation = Isolation(
        user=USER if user else pwd.getpwuid(os.geteuid()).pw_name,
        capabilities=(CAPABILITY,),
        group=str(group) if group else "process group",
        reasons=(*reasons, *group_reasons),
    )
    for reason in isolation.reasons:
        log.warning("less isolated than it could be", reason=reason)
    config = config.model_copy(
        update={
            "group": (group.version, group.path) if group else None,
            "isolation": isolation,
        }
    )
    command = _observer_command(config)
    if as_root:
        command = build_confined(user, command)
    os.execvp(command[0], command)  # noqa: S606 - a fixed argument list
