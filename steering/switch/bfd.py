"""The door to the legs' BFD sessions: have a lane's path seen again at once after its engine returned.

A session that is not up sends once a second at most (RFC 5880, 6.8.3), and two such exchanges bring it
up, so by itself a lane stays down for one to two seconds after its engine is back. A session that is
made anew sends at once, and one that waits in *init* sends at once when its interval changes (OVS
begins a poll sequence). So: off, on, another interval, and the old one again; some 0.1 s in all.
"""

from __future__ import annotations

from collections.abc import Sequence

from steering.errors import CommandFailed, SwitchError
from steering.run import run_async
from steering.tls import TlsFiles, find_options

SECONDS = 5


def render_settings(legs: Sequence[str], setting: str) -> list[str]:
    """ovs-vsctl's arguments that give every leg one key of its column `bfd`, in one transaction."""
    argv: list[str] = []
    for leg in legs:
        argv += ["--", "set", "Interface", leg, f"bfd:{setting}"]
    return argv[1:]


def choose_other(interval: int) -> int:
    """An interval that differs from ``interval`` (ms) and is as good."""
    return interval + 1


async def restart_sessions(ovsdb: str, legs: Sequence[str], tls: TlsFiles | None = None) -> None:
    """Make the legs' sessions anew, and have them exchange what brings them up. Raises SwitchError.

    Until they are up, the switch takes the legs for down as before, but for the moment in which they
    are off: then only the engine's queue decides, which drops what has no listener.
    """
    try:
        found = await _run(ovsdb, tls, "--if-exists", "get", "Interface", legs[0], "bfd:min_tx")
        interval = int(found.strip().strip('"') or 100)
        for setting in (
            "enable=false",
            "enable=true",
            f"min_tx={choose_other(interval)}",
            f"min_tx={interval}",
        ):
            await _run(ovsdb, tls, *render_settings(legs, setting))
    except (CommandFailed, ValueError) as fault:
        raise SwitchError(
            f"BFD on {' and '.join(legs)} was not restarted: {fault}",
            "it comes up by itself within two seconds",
        ) from fault


async def _run(ovsdb: str, tls: TlsFiles | None, *argv: str) -> str:
    options = (f"--db={ovsdb}", *find_options(ovsdb, tls), f"--timeout={SECONDS}")
    done = await run_async(["ovs-vsctl", *options, *argv], timeout=SECONDS + 1)
    return done.stdout
