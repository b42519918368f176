"""`hairpin rules`: update, show."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from appliance.api.documents import LaneRules, UpdateJob
from appliance.client import open_client
from appliance.commands import options
from appliance.commands.output import (
    clean,
    print_json,
    print_line,
    print_note,
    print_table,
    render_time,
    show_progress,
)
from appliance.commands.reading import show_next
from steering.errors import HairpinError

app = typer.Typer(help="Update and show the rules of the engines.", no_args_is_help=True)

_POLL_SECONDS = 0.5


@app.command("update")
def update(
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended.")] = True,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Fetch the rules, test them, and load them on each lane; the last good ones are kept."""
    client = open_client(url, token_file)
    job = client.start_rules_update()
    if wait:
        with show_progress("updating the rules"):
            while job.state == "running":
                time.sleep(_POLL_SECONDS)
                job = client.read_rules_update()
    if json:
        print_json(job)
    else:
        _print_job(job)
    if job.state == "failed":
        if json:
            raise typer.Exit(1)
        raise HairpinError(f"the update failed: {job.reason}", job.mend)


def _print_job(job: UpdateJob) -> None:
    if job.state == "running":
        print_line(f"running: {clean(job.step)}")
        return
    if job.state == "succeeded":
        print_line("the rules were changed" if job.changed else "the rules were up to date")
    print_lanes(job.lanes)


def print_lanes(lanes: tuple[LaneRules, ...]) -> None:
    """The ruleset of each lane, its sources, and what could not be loaded."""
    rows = [
        (
            one.lane,
            one.loaded,
            one.failed,
            one.revision[:12],
            render_time(one.updated_at),
            "yes" if one.last_good else "no: the newest was refused",
            ",".join(source.name for source in one.sources),
        )
        for one in lanes
    ]
    columns = ("lane", "loaded", "failed", "revision", "updated", "newest", "sources")
    print_table(columns, rows, "no lane has rules")
    for one in lanes:
        for source in one.sources:
            if source.problem:
                print_note(f"warning: source {clean(source.name)}: {clean(source.problem)}")
        for failure in one.failures:
            print_line(
                f"not loaded on {one.lane}: sid {failure.sid or '-'}: {clean(failure.reason)}"
            )


@app.command("show")
def show(
    sid: options.Sid = None,
    cve: options.Cve = None,
    lane: options.Lane = None,
    limit: options.Limit = 100,
    cursor: options.Cursor = None,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Show the rulesets in force; with --sid, --cve or --lane the rules themselves."""
    client = open_client(url, token_file)
    if sid is None and cve is None and lane is None:
        status = client.read_rules()
        return print_json(status) if json else print_lanes(status.lanes)
    page = client.find_rules(
        {"sid": sid, "cve": cve, "lane": lane, "limit": limit, "cursor": cursor}
    )
    if json:
        return print_json(page)
    rows = [
        (rule.sid, rule.revision, rule.lane, rule.action, rule.message, ",".join(rule.cves))
        for rule in page.items
    ]
    print_table(("sid", "rev", "lane", "action", "message", "cves"), rows, "no such rules")
    if sid is not None:
        for rule in page.items:
            print_line(clean(rule.text))
    show_next(page.next)
