"""`hairpin shun`: blocked flows that the switch drops by itself."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from appliance.client import open_client
from appliance.commands import options
from appliance.commands.output import print_json, print_line, print_table
from steering.errors import FieldError, WrongInput

app = typer.Typer(
    help="Blocked flows that the switch drops by itself (docs/quarantine.md).", no_args_is_help=True
)


@app.command("list")
def show(
    json: options.Json = False, url: options.Url = None, token_file: options.TokenFile = None
) -> None:
    """Show them, with what was dropped of each and for how long it lasts."""
    found = open_client(url, token_file).find_shuns()
    if json:
        return print_json(found)
    rows = [
        [one.id, one.policy, f"{one.seconds_left:.0f}", one.dropped_packets, one.flow]
        for one in found.items
    ]
    columns = ("id", "policy", "seconds left", "dropped", "flow")
    print_table(columns, rows, "no flow is shunned")
    if found.refused:
        print_line(
            f"{found.refused} flows were left to the engine: at most {found.limit} at a time"
        )


@app.command("remove")
def remove(
    shun_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Which, as `list` names it.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Give shunned flows back to the engine, which blocks them as it did."""
    if every is (shun_id is not None):
        raise WrongInput([FieldError("ID", "name one, or --all")])
    if shun_id is not None and not re.fullmatch(r"[0-9a-f]{8}", shun_id):
        raise WrongInput([FieldError("ID", f"{shun_id!r} is not 8 of 0-9 and a-f")])
    report = open_client(url, token_file).remove_shuns(shun_id)
    if json:
        return print_json(report)
    print_line(f"{report.removed} flows given back to the engine")
