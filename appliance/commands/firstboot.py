"""`hairpin firstboot` and `hairpin console-status`: what the appliance's image runs at every boot."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from appliance.commands.output import clean, print_line, print_note
from appliance.version import find_version
from steering.errors import FieldError, HairpinError, WrongInput

Root = Annotated[
    Path,
    typer.Option("--root", metavar="DIR", help="All paths are below this directory (for tests)."),
]


def run(
    serve_faults: Annotated[
        bool,
        typer.Option(
            "--serve-faults",
            help="Configure nothing: answer `GET /health` with what is wrong, until SIGTERM.",
        ),
    ] = False,
    root: Root = Path("/"),
) -> None:
    """Configure an appliance from its seed (docs/first-boot.md); run by the image at every boot.

    Status 2 when the seed is missing or wrong: nothing of it is in force then.
    """
    from appliance.firstboot.main import run_firstboot
    from appliance.firstboot.places import find_places
    from appliance.logs import configure_logs

    configure_logs()
    if not root.is_dir():
        # It would be made, with the appliance's secrets in it.
        raise WrongInput([FieldError("--root", f"{root} is no directory")])
    places = find_places(root, os.environ)
    if serve_faults:
        from appliance.firstboot.document import DEFAULT_PORT
        from appliance.firstboot.faults import build_unfinished, read_report
        from appliance.firstboot.serving import serve_faults as serve

        unfinished = build_unfinished(find_version(), time.time(), DEFAULT_PORT)
        try:
            report = read_report(places.faults)
        except HairpinError as fault:  # that it can't be read is a reason the more to answer
            print_note(clean(fault.reason))
            report = unfinished
        if report is None and places.settings.exists():
            return print_line("nothing is wrong: the management service has the port")
        return asyncio.run(serve(report or unfinished))
    plan = run_firstboot(places)
    print_line(f"{clean(plan.name)} is configured: {len(plan.files)} files")


def show_console(
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on, and show it again whenever it changes.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DEVICE", help="Write there, as /dev/console.")
    ] = None,
    root: Root = Path("/"),
) -> None:
    """Show on the appliance's console who it is, how it is, and how to mend what is wrong."""
    from appliance.firstboot.console import render_console
    from appliance.firstboot.places import find_places
    from appliance.firstboot.status import follow_status, read_facts

    places = find_places(root, os.environ)

    def show(text: str) -> None:
        lines = "".join(f"{clean(line)}\n" for line in text.split("\n")[:-1])
        if to is None:
            return print_line(lines.rstrip("\n"))
        try:
            with open(to, "w", encoding="utf-8", errors="replace") as console:
                console.write(lines.replace("\n", "\r\n"))
        except OSError as fault:
            raise HairpinError(f"{to} can't be written: {fault.strerror}", "see --to") from fault

    if not follow:
        return show(render_console(asyncio.run(read_facts(places))))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(follow_status(places, show))
