"""Commands about the coverage and its proofs: coverage, canary."""

from __future__ import annotations

from typing import Annotated

import typer

from appliance.api.coverage import (
    Balance,
    CanaryProof,
    Coverage,
    CoverageHistory,
    LaneProof,
    LedgerSummary,
)
from appliance.api.documents import PairStatus
from appliance.client import Values, open_client
from appliance.commands import options
from appliance.commands.output import (
    clean,
    print_json,
    print_line,
    print_note,
    print_table,
    render_time,
)
from appliance.commands.reading import show_next
from appliance.commands.shortcut import describe_account
from steering.errors import FieldError, WrongInput

VIOLATIONS_SHOWN = 10


def show_coverage(
    vm: options.Vm = None,
    status: Annotated[
        PairStatus | None, typer.Option("--status", help="Only pairs of this status.")
    ] = None,
    history: Annotated[
        bool, typer.Option("--history", help="The coverage over time, newest first.")
    ] = False,
    limit: options.Limit = 100,
    cursor: options.Cursor = None,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Show which pairs of VMs are inspected, direct, denied or blind, and the proof that it is so."""
    if history and (vm is not None or status is not None):
        raise WrongInput([FieldError("--history", "takes neither --vm nor --status")])
    client = open_client(url, token_file)
    if history:
        past = client.read_coverage_history({"limit": limit, "cursor": cursor})
        return print_json(past) if json else _print_history(past)
    query: Values = {"vm": vm, "status": status, "limit": limit, "cursor": cursor}
    coverage = client.read_coverage(query)
    if json:
        return print_json(coverage)
    _print_coverage(coverage)


def send_canaries(
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Prove every lane now: a packet that must be dropped, and recorded. Fails if one was lost."""
    print_note("sending a canary through every lane")
    proofs = open_client(url, token_file).prove_lanes()
    if json:
        print_json(proofs)
    else:
        _print_lanes(proofs.lanes)
    if any(lane.canary is None or lane.canary.passed is not True for lane in proofs.lanes):
        raise typer.Exit(1)


def _print_lanes(lanes: tuple[LaneProof, ...]) -> None:
    for lane in lanes:
        print_line(f"lane {clean(lane.lane)}: {_describe_canary(lane.canary)}")
        if lane.balance is not None:
            print_line(f"  {_describe_balance(lane.balance)}")


def _describe_canary(canary: CanaryProof | None) -> str:
    if canary is None:
        return "not proved: no canary port is configured"
    if canary.passed is None or canary.at is None:
        return "not proved yet"
    if canary.passed:
        took = "" if canary.arrival_seconds is None else f" within {canary.arrival_seconds:.1f} s"
        return f"proved at {render_time(canary.at)}: dropped and stored{took}"
    since = "" if canary.failed_since is None else f" since {render_time(canary.failed_since)}"
    return f"NOT PROVED{since}: lost at {clean(canary.stage)}: {clean(canary.detail)}"


def _describe_balance(balance: Balance) -> str:
    parts = [f"{balance.into} packets in = {balance.inspected} inspected"]
    for count, what in (
        (balance.dropped, "dropped by the engine"),
        (balance.lost, "lost in the queue"),
        (balance.refused, "refused by the service host"),
        (balance.lost_with_engine, "lost with an engine"),
        (balance.vanished, "lost by a fault that is over"),
    ):
        if count:
            parts.append(f"{count} {what}")
    text = " + ".join(parts)
    if balance.bypassed or balance.blocked:
        text += f"; not let in: {balance.bypassed} passed uninspected, {balance.blocked} held back"
    return text if balance.closes else f"{text}; DOES NOT CLOSE: {clean(balance.reason)}"


def _describe_ledger(ledger: LedgerSummary) -> str:
    if ledger.at is None:
        return f"ledger: none: {clean(ledger.fault)}"
    parts = [f"{ledger.inspected} inspected, {ledger.direct} direct, {ledger.denied} denied"]
    if ledger.bypassed or ledger.blocked:
        parts.append(f"{ledger.bypassed} let through and {ledger.blocked} held back by failure")
    if ledger.shortcut_policies or ledger.shortcut_connections:
        parts.append(
            f"not traced: {ledger.shortcut_connections} connections that took a shortcut "
            f"({ledger.shortcut_packets} packets, {ledger.shortcut_bytes} bytes uninspected)"
        )
    verdict = f"{ledger.violation_count} VIOLATIONS" if ledger.violation_count else "no violation"
    place = " in a copy of the switch" if ledger.by_copy else ""
    return (
        f"ledger at {render_time(ledger.at)}: {ledger.traced} traces{place} of {ledger.classes_traced} of "
        f"{ledger.classes} classes, {ledger.pairs_traced} of {ledger.pairs} pairs: "
        f"{'; '.join(parts)}; {verdict}"
    )


def _print_ledger(ledger: LedgerSummary) -> None:
    print_line(_describe_ledger(ledger))
    for one in ledger.violations[:VIOLATIONS_SHOWN]:
        what = f"{one.family} {one.service} {one.source} -> {one.destination}"
        print_line(
            f"  {clean(what)} ({clean(one.direction)}, {clean(one.state)}): {clean(one.reason)}"
        )
        print_line(f"    ovs-appctl ofproto/trace {clean(one.flow)}")
    for finding in ledger.findings[:VIOLATIONS_SHOWN]:
        print_line(f"  foreign flow: {clean(finding)}")


def _print_coverage(coverage: Coverage) -> None:
    total = coverage.summary
    print_line(
        f"{total.machines} VMs, {total.pairs} pairs: {total.inspected} inspected "
        f"({total.inspected_percent:.1f} %), {total.partial} partial, {total.direct} direct, "
        f"{total.denied} denied, {total.blind} blind ({total.blind_percent:.1f} %)"
    )
    _print_lanes(coverage.lanes)
    if coverage.ledger is not None:
        _print_ledger(coverage.ledger)
    for account in coverage.shortcuts:
        print_line(f"shortcuts of {describe_account(account)}")
    for gap in coverage.gaps:
        print_line(f"gap: {clean(gap.reason)}")
        if gap.mend:
            print_line(f"  what to do: {clean(gap.mend)}")
    rows = [
        (
            pair.source.name,
            pair.destination.name,
            pair.status,
            "; ".join(
                f"{part.what} {part.treatment}"
                + (f" {part.profile}/{part.on_failure}" if part.profile else "")
                + (f" until {part.inspected_until}" if part.inspected_until else "")
                + (f" by {part.policy}" if part.policy else "")
                for part in pair.parts
            ),
            pair.reason,
        )
        for pair in coverage.items
    ]
    print_table(("source", "destination", "status", "what", "why"), rows, "no such pairs")
    show_next(coverage.next)


def _print_history(past: CoverageHistory) -> None:
    rows = [
        (
            render_time(one.at),
            str(one.revision),
            f"{one.inspected_percent:.1f}",
            f"{one.partial_percent:.1f}",
            f"{one.direct_percent:.1f}",
            f"{one.denied_percent:.1f}",
            f"{one.blind_percent:.1f}",
            f"{one.lanes_proved}/{one.lanes}",
            f"{one.violations}/{one.traced}",
            one.cause,
        )
        for one in past.items
    ]
    head = ("at", "revision", "inspected %", "partial %", "direct %", "denied %", "blind %")
    print_table((*head, "lanes proved", "violations", "cause"), rows, "nothing was kept yet")
    show_next(past.next)
