"""The command line `hairpin`: puts the commands together and turns failures into exit statuses.

0 done; 1 refused or failed; 2 wrong input (as for wrong usage), nothing changed; 130 ended by
Ctrl-C; 141 whoever read the output has gone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

import typer

from appliance.commands.output import JSON_WANTED, OutputClosed, print_error
from steering.errors import HairpinError

INTERRUPTED = 130
OUTPUT_CLOSED = 141


ALONE = {
    "firstboot": ("firstboot", "run"),
    "console-status": ("firstboot", "show_console"),
    "serve": ("service", "serve"),
    "inspect": ("service", "inspect"),
    "observe": ("service", "observe"),
    "image": ("image", "app"),
}
"""Commands that an appliance's units start, and where they are: each is read alone. The modules of all of them take a
second, and most of a minute where a machine is emulated."""


def build_app(first: str = "") -> typer.Typer:
    """All commands, in the order in which the help lists them; or the one of ALONE that is ``first``."""
    app = typer.Typer(
        name="hairpin",
        help="Virtual inline IPS appliance for Open vSwitch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    if first in ALONE:
        module, name = ALONE[first]
        found = getattr(import_module(f"appliance.commands.{module}"), name)
        app.callback()(_keep_names)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=first)
        else:
            app.command(first)(found)
        return app
    from appliance.commands import (
        firstboot,
        host,
        image,
        lab,
        policy,
        proof,
        quarantine,
        reading,
        rules,
        service,
        shortcut,
        shun,
    )

    app.command("vms")(reading.show_vms)
    app.add_typer(policy.app, name="policy")
    app.command("coverage")(proof.show_coverage)
    app.command("canary")(proof.send_canaries)
    app.add_typer(quarantine.app, name="quarantine")
    app.add_typer(shun.app, name="shun")
    app.add_typer(shortcut.app, name="shortcut")
    app.command("explain")(reading.show_explanation)
    app.command("alerts")(reading.show_alerts)
    app.command("flows")(reading.show_flows)
    app.command("events")(reading.show_events)
    app.add_typer(rules.app, name="rules")
    app.command("health")(reading.show_health)
    app.command("doctor")(service.doctor)
    app.add_typer(host.app, name="host")
    app.add_typer(image.app, name="image")
    app.add_typer(lab.app, name="lab")
    app.command("serve")(service.serve)
    app.command("inspect")(service.inspect)
    app.command("observe")(service.observe)
    app.command("firstboot")(firstboot.run)
    app.command("console-status")(firstboot.show_console)
    app.command("version")(service.show_version)
    return app


def _keep_names() -> None:
    """A program of one command would take its name for an argument."""


def run_cli(argv: Sequence[str]) -> int:
    """Run one command line and return its exit status. Prints errors; raises only bugs."""
    from appliance.logs import configure_logs

    JSON_WANTED.set(False)
    try:
        configure_logs("warning")
        build_app(argv[0] if argv else "")(args=list(argv), prog_name="hairpin")
        return 0
    except SystemExit as end:  # how typer ends, also after telling of wrong usage
        return end.code if isinstance(end.code, int) else 1
    except HairpinError as error:
        print_error(error)
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED
    except OutputClosed:
        # Nothing more can be written: also not by the interpreter when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED


def end_orderly() -> None:
    """Have SIGTERM and SIGHUP end this process as Ctrl-C does: what it started is ended, what it unpacked removed.

    Not for commands that run on: they have handlers of their own, and children that would inherit this one.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # else it is ignored, as by nohup(1)
            signal.signal(number, end)


def main() -> None:
    """Entry point of the console script."""
    if sys.argv[1:2] == ["image"]:
        end_orderly()
    sys.exit(run_cli(sys.argv[1:]))


if __name__ == "__main__":
    main()
