"""`hairpin shortcut`: connections that the switch passes by itself, uninspected."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from appliance.api.shortcuts import ShortcutAccount, ShortcutConnection, ShortcutEnd
from appliance.client import Values, open_client
from appliance.commands import options
from appliance.commands.output import (
    clean,
    print_json,
    print_line,
    print_table,
    render_endpoint,
)
from appliance.commands.reading import show_next
from steering.errors import FieldError, WrongInput

app = typer.Typer(
    help="Connections that the switch passes by itself, uninspected (docs/shortcut.md).",
    no_args_is_help=True,
)

Policy = Annotated[
    str | None, typer.Option("--policy", metavar="NAME", help="Only of this policy.")
]


@app.command("list")
def show(
    policy: Policy = None,
    vm: options.Vm = None,
    limit: options.Limit = 100,
    cursor: options.Cursor = None,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Show them, the oldest first, and what went uninspected by each policy."""
    query: Values = {"policy": policy, "vm": vm, "limit": limit, "cursor": cursor}
    found = open_client(url, token_file).find_shortcuts(query)
    if json:
        return print_json(found)
    columns = ("id", "policy", "after", "source", "destination", "age", "idle", "packets", "bytes")
    print_table(columns, [_build_row(one) for one in found.items], "no connection takes a shortcut")
    for account in found.accounts:
        print_line(describe_account(account))
    show_next(found.next)


def _build_row(one: ShortcutConnection) -> list[object]:
    ends = [_render_end(end) for end in (one.source, one.destination)]
    ages = [f"{seconds:.0f} s" for seconds in (one.age_seconds, one.idle_seconds)]
    return [one.id, one.policy, one.reason, *ends, *ages, one.packets, one.bytes]


def _render_end(end: ShortcutEnd) -> str:
    return render_endpoint(end.address, end.port, None if end.vm is None else end.vm.name)


def describe_account(one: ShortcutAccount) -> str:
    most = "none more, the policy does not allow it now" if one.limit is None else f"of {one.limit}"
    return (
        f"policy {clean(one.policy)}, after {one.reason}: {one.open} {most}; {one.connections} so far, "
        f"{one.returned} sent back; {one.packets} packets ({one.bytes} bytes) went uninspected"
    )


@app.command("return")
def give_back(
    shortcut_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Which, as `list` names it.")
    ] = None,
    policy: Policy = None,
    vm: options.Vm = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Have connections inspected again: one, a policy's, a VM's (with both: the VM's of the policy), or all."""
    filtered = policy is not None or vm is not None
    if [shortcut_id is not None, filtered, every].count(True) != 1:
        raise WrongInput([FieldError("ID", "name one, or --policy and/or --vm, or --all")])
    if shortcut_id is not None and not re.fullmatch(r"[0-9a-f]{8}", shortcut_id):
        raise WrongInput([FieldError("ID", f"{shortcut_id!r} is not 8 of 0-9 and a-f")])
    client = open_client(url, token_file)
    if shortcut_id is not None:
        report = client.return_shortcut(shortcut_id)
    else:
        report = client.return_shortcuts({"policy": policy, "vm": vm})
    if json:
        return print_json(report)
    print_line(f"{report.returned} connections are inspected again after {report.seconds:.3f} s")
