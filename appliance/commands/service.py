"""The long-running commands (serve, inspect, observe), doctor and version."""

from __future__ import annotations

import asyncio
import platform
from pathlib import Path
from typing import Annotated, Literal

import typer

from appliance.api.documents import ApiDocument
from appliance.commands import options
from appliance.commands.output import clean, print_json, print_line, print_table
from appliance.settings import read_settings
from appliance.version import find_version

Level = Literal["ok", "warn", "fail"]


class DoctorFinding(ApiDocument):
    name: str
    level: Level
    found: str
    mend: str


class DoctorReport(ApiDocument):
    """What `hairpin doctor --json` prints; ``level`` is the gravest."""

    level: Level
    findings: tuple[DoctorFinding, ...]


class VersionReport(ApiDocument):
    """What `hairpin version --json` prints."""

    version: str
    python: str


def serve(config: options.Config) -> None:
    """Run the management service in the foreground, until SIGTERM or Ctrl-C."""
    settings = read_settings(config)
    from appliance.app import run_serve
    from appliance.logs import configure_logs

    configure_logs()
    raise typer.Exit(run_serve(settings))


def inspect(config: options.Config) -> None:
    """Run the lanes of the service host: bridges, queues and engines."""
    settings = read_settings(config)
    from appliance.inspection.main import run_inspect
    from appliance.logs import configure_logs

    configure_logs()
    raise typer.Exit(asyncio.run(run_inspect(settings)))


def observe(config: options.Config) -> None:
    """Record the flows of the mirror port."""
    settings = read_settings(config)
    from appliance.logs import configure_logs
    from appliance.visibility.main import run_observe

    configure_logs()
    raise typer.Exit(run_observe(settings))


def doctor(
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Check also what these settings need."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Check every precondition and tell how to mend what is missing; status 1 if one fails."""
    from appliance.doctor import run_checks

    findings = run_checks(None if config is None else read_settings(config))
    levels: tuple[Level, ...] = ("fail", "warn", "ok")
    found = {one.level for one in findings}
    gravest: Level = next((level for level in levels if level in found), "ok")
    if json:
        print_json(
            DoctorReport(
                level=gravest,
                findings=tuple(
                    DoctorFinding(name=one.name, level=one.level, found=one.found, mend=one.mend)
                    for one in findings
                ),
            )
        )
    else:
        rows = [(one.level, one.name, one.found) for one in findings]
        print_table(("level", "what", "found"), rows, "nothing was checked")
        for one in findings:
            if one.level != "ok" and one.mend:
                print_line(f"to mend {clean(one.name)}: {clean(one.mend)}")
    if gravest == "fail":
        raise typer.Exit(1)


def show_version(json: options.Json = False) -> None:
    """Print the version of this program."""
    if json:
        return print_json(VersionReport(version=find_version(), python=platform.python_version()))
    print_line(f"hairpin {find_version()}")
