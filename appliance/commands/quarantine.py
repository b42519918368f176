"""`hairpin quarantine`: VMs that are shut off."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from pydantic import ValidationError

from appliance.api.problems import find_faults
from appliance.api.quarantine import LONGEST_SECONDS, QuarantineOrder, QuarantineReport
from appliance.client import open_client
from appliance.commands import options
from appliance.commands.output import clean, print_json, print_line, print_table, render_time
from steering.errors import FieldError, WrongInput

app = typer.Typer(help="Shut VMs off: nothing from or to them passes.", no_args_is_help=True)

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"([1-9][0-9]{0,8})([smhd])")

Named = Annotated[str, typer.Argument(metavar="VM", help="Its name or vm-id.")]


def parse_duration(text: str, where: str) -> int:
    """Seconds of `90s`, `15m`, `8h` or `7d`. Raises WrongInput."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise WrongInput([FieldError(where, f"{text!r} is not a time such as 90s, 15m, 8h or 7d")])
    seconds = int(found[1]) * UNITS[found[2]]
    if seconds > LONGEST_SECONDS:
        raise WrongInput([FieldError(where, f"{text} is longer than 366d")])
    return seconds


@app.command("add")
def add(
    vm: Named,
    for_: Annotated[
        str | None,
        typer.Option("--for", metavar="TIME", help="90s, 15m, 8h, 7d; else until it is removed."),
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; shown where it is listed.")] = "",
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Shut a VM off now, or give its quarantine another end."""
    seconds = None if for_ is None else parse_duration(for_, "--for")
    try:
        order = QuarantineOrder(vm=vm, seconds=seconds, reason=reason)
    except ValidationError as fault:
        raise WrongInput(find_faults(fault)) from fault
    report = open_client(url, token_file).add_quarantine(order)
    _print_report(report, "is shut off", json=json)


@app.command("list")
def show(
    json: options.Json = False, url: options.Url = None, token_file: options.TokenFile = None
) -> None:
    """Show the VMs that are shut off, and what was dropped of them."""
    found = open_client(url, token_file).find_quarantines()
    if json:
        return print_json(found)
    rows = [
        [
            one.vm,
            render_time(one.since),
            "removed" if one.until is None else render_time(one.until),
            one.dropped_packets,
            one.reason,
        ]
        for one in found.items
    ]
    print_table(("vm", "since", "until", "dropped", "reason"), rows, "no VM is in quarantine")


@app.command("remove")
def remove(
    vm: Named,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """End a VM's quarantine."""
    report = open_client(url, token_file).remove_quarantine(vm)
    _print_report(report, "is no longer shut off", json=json)


def _print_report(report: QuarantineReport, what: str, *, json: bool) -> None:
    if json:
        return print_json(report)
    one = report.quarantine
    until = "" if one.until is None else f"; until {render_time(one.until)}"
    where = "" if one.on_switch else "; it has no port on the switch now"
    print_line(f"VM {clean(one.vm)} {what} after {report.seconds:.3f} s{until}{where}")
