"""`hairpin policy`: check, plan, apply, show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from appliance.api.documents import ApiDocument, Count, PlanReport
from appliance.client import ServiceNotFound, open_client
from appliance.commands import options
from appliance.commands.output import clean, print_json, print_line, print_note, show_progress
from steering.errors import FieldError, HairpinError, WrongInput
from steering.model import PolicySet
from steering.parse import parse_documents

app = typer.Typer(help="Check, plan, apply and show the policies.", no_args_is_help=True)

_SIGNS = {"add": "+", "delete": "-", "modify": "~"}
_LARGEST_FILE = 16 * 2**20

File = Annotated[
    str, typer.Argument(metavar="FILE", help="Policy documents, YAML or JSON; `-` for stdin.")
]


class PolicyCheck(ApiDocument):
    """What `hairpin policy check --json` prints when nothing is wrong."""

    machines: Count
    zones: Count
    policies: Count
    checked_against_switch: bool
    reason: str
    plan: PlanReport | None


def read_text(file: str) -> str:
    """The text of a file, or of stdin for `-`. Raises WrongInput when it can't be read."""
    name = "(stdin)" if file == "-" else file
    try:
        if file == "-":
            data = sys.stdin.buffer.read(_LARGEST_FILE + 1)
        else:
            with Path(file).open("rb") as handle:
                data = handle.read(_LARGEST_FILE + 1)
    except OSError as fault:
        raise WrongInput([FieldError(name, fault.strerror or str(fault))]) from fault
    if len(data) > _LARGEST_FILE:
        raise WrongInput([FieldError(name, f"larger than {_LARGEST_FILE} bytes")])
    try:
        return data.decode()
    except UnicodeDecodeError as fault:
        raise WrongInput([FieldError(name, f"not UTF-8: byte {fault.start}")]) from fault


@app.command("check")
def check(
    file: File,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not ask the service for the switch's checks.")
    ] = False,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Check documents, and against the switch where the service answers; change nothing."""
    text = read_text(file)
    found = parse_documents(text)
    plan, reason = (None, "not asked for") if offline else _plan_if_there(text, url, token_file)
    if json:
        return print_json(
            PolicyCheck(
                machines=len(found.machines),
                zones=len(found.zones),
                policies=len(found.policies),
                checked_against_switch=plan is not None,
                reason=reason,
                plan=plan,
            )
        )
    print_line(f"{clean(file)}: {render_counts(found)}: nothing is wrong")
    if plan is None:
        print_line(f"not checked against the switch: {clean(reason)}")
    else:
        print_line(f"checked against the switch: {render_summary(plan)}")
        _print_warnings(plan)


def _plan_if_there(
    text: str, url: str | None, token_file: Path | None
) -> tuple[PlanReport | None, str]:
    """A plan, or why there is none. What the service finds wrong in the documents is raised."""
    try:
        return open_client(url, token_file).put_policies(text, "*", dry_run=True), ""
    except WrongInput:
        raise
    except HairpinError as fault:
        # A service that was named on purpose must answer.
        if url is not None and isinstance(fault, ServiceNotFound):
            raise
        return None, fault.reason


@app.command("plan")
def plan(
    file: File,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Show what applying these documents would change; change nothing."""
    text = read_text(file)
    parse_documents(text)
    client = open_client(url, token_file)
    before = client.read_policies()
    with show_progress("planning"):
        report = client.put_policies(text, before.etag, dry_run=True)
    if json:
        return print_json(report)
    print_report(report)
    print_line(f"planned against revision {report.revision} in {report.seconds:.2f} s")


@app.command("apply")
def apply(
    file: File,
    etag: Annotated[
        str | None,
        typer.Option("--etag", help="Only if this is in force (`etag` of a plan's JSON)."),
    ] = None,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Put these documents in force, in place of those that are; all or nothing."""
    text = read_text(file)
    parse_documents(text)
    client = open_client(url, token_file)
    present = client.read_policies().etag if etag is None else etag.strip('"')
    with show_progress("applying"):
        report = client.put_policies(text, present, dry_run=False)
    if json:
        return print_json(report)
    print_line(render_summary(report))
    _print_warnings(report)
    print_line(f"revision {report.revision} is in force after {report.seconds:.2f} s")


@app.command("show")
def show(
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Print the documents in force; what it prints can be changed and applied again."""
    present = open_client(url, token_file).read_policies()
    if json:
        return print_json(present.documents)
    values = present.documents.model_dump(mode="json", by_alias=True)
    print_line(f"# revision {present.revision}, etag {clean(present.etag)}")
    print_line(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip("\n"))


def print_report(report: PlanReport) -> None:
    """Each change with its sign, the pairs whose coverage changes, and the sum."""
    for change in report.changes:
        print_line(f"{_SIGNS[change.kind]} {clean(change.text)}")
    if report.pairs:
        print_line("coverage:")
    for pair in report.pairs:
        names = f"{pair.source.name} -> {pair.destination.name}"
        print_line(f"  {clean(names)}: {pair.before or 'none'} -> {pair.after or 'none'}")
    print_line(render_summary(report))
    _print_warnings(report)


def _print_warnings(report: PlanReport) -> None:
    for warning in report.warnings:
        print_note(f"warning: {clean(warning)}")


def render_summary(report: PlanReport) -> str:
    total = report.summary
    if not (total.added or total.modified or total.deleted):
        return "the switch stays as it is"
    done = (
        ("added", "modified", "deleted") if report.applied else ("to add", "to modify", "to delete")
    )
    counts = zip((total.added, total.modified, total.deleted), done, strict=True)
    pairs = f"{len(report.pairs)} pair{'' if len(report.pairs) == 1 else 's'}"
    return (
        f"{', '.join(f'{count} {what}' for count, what in counts)}; "
        f"coverage of {pairs} change{'d' if report.applied else 's'}"
    )


def render_counts(found: PolicySet) -> str:
    """As in `2 VMs, 1 zone, 3 policies`."""
    counts = (
        (len(found.machines), "VM", "VMs"),
        (len(found.zones), "zone", "zones"),
        (len(found.policies), "policy", "policies"),
    )
    return ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in counts)
