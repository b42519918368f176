"""Commands that read: vms, explain, alerts, flows, events, health."""

from __future__ import annotations

from typing import Annotated

import typer

from appliance.api.documents import (
    Alert,
    Endpoint,
    Explanation,
    Treatment,
    Verdict,
)
from appliance.client import Client, Values, open_client
from appliance.commands import options
from appliance.commands.output import (
    clean,
    print_json,
    print_line,
    print_note,
    print_table,
    render_endpoint,
    render_time,
)
from steering.errors import FieldError, WrongInput
from steering.model import Family, Protocol

_FIRST_SHOWN = 10


def show_next(cursor: str | None) -> None:
    if cursor is not None:
        print_note(f"there is more: --cursor {clean(cursor)}")


def show_vms(
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """List the VMs that were found on the switch."""
    found = open_client(url, token_file).find_vms()
    if json:
        return print_json(found)
    rows = [
        (
            vm.name,
            vm.vm_id,
            ",".join(vm.zones),
            ",".join(address.address for address in vm.addresses),
            ",".join(port.mac for port in vm.ports),
            ",".join(f"{port.interface}{'' if port.link_up else ' (down)'}" for port in vm.ports),
            "yes" if vm.in_scope else "no",
        )
        for vm in found.items
    ]
    columns = ("name", "vm-id", "zones", "addresses", "macs", "ports", "in scope")
    print_table(columns, rows, "no VMs were found")


def show_health(
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Show the state of every part of the service; status 1 while it is failing."""
    health = open_client(url, token_file).read_health()
    if json:
        print_json(health)
    else:
        parts = health.components
        print_line(f"{health.name} {health.version}: {health.status}, revision {health.revision}")
        rows: list[tuple[object, ...]] = [
            (name, part.status, part.detail)
            for name, part in (
                ("switch", parts.switch),
                ("store", parts.store),
                ("rules", parts.rules),
            )
        ]
        rows += [
            (
                f"lane {lane.name}",
                "ok" if lane.inspecting else "fail",
                f"engine {lane.engine}, {lane.rules_loaded} rules, BFD {lane.bfd}",
            )
            for lane in parts.lanes
        ]
        rows += [
            (f"export {one.name}", one.status, f"{one.pending} pending, {one.delivered} delivered")
            for one in parts.exporters
        ]
        print_table(("part", "state", "detail"), rows, "")
        for problem in health.problems:
            print_line(f"problem: {clean(problem.reason)} (since {render_time(problem.since)})")
            if problem.mend:
                print_line(f"  what to do: {clean(problem.mend)}")
    if health.status == "failing":
        raise typer.Exit(1)


def show_explanation(
    source: Annotated[str, typer.Argument(metavar="VM1", help="Who opens the connection.")],
    destination: Annotated[str, typer.Argument(metavar="VM2", help="Who answers it.")],
    protocol: Annotated[Protocol, typer.Option("--proto", help="Layer 4 protocol.")] = Protocol.TCP,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Destination port.")
    ] = None,
    family: Annotated[Family, typer.Option("--family", help="IP version.")] = Family.IPV4,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """Would this connection be inspected, by which policy, through which tables, and why."""
    query: Values = {
        "source": source,
        "destination": destination,
        "protocol": protocol,
        "port": port,
        "family": family,
    }
    found = open_client(url, token_file).explain(query)
    if json:
        return print_json(found)
    _print_explanation(found)


def _print_explanation(found: Explanation) -> None:
    port = "" if found.port is None else f" port {found.port}"
    print_line(
        f"{found.source.name} -> {found.destination.name}, {found.protocol}{port}, {found.family}: "
        f"{'inspected' if found.inspected else 'NOT inspected'}"
        f"{f' until {found.inspected_until}' if found.inspected_until else ''} ({found.treatment})"
    )
    print_line(f"why: {clean(found.reason)}")
    if found.policy is not None:
        failure = f", {found.on_failure} on failure" if found.on_failure else ""
        print_line(f"policy: {found.policy}{failure}")
    if found.lane is not None:
        state = "inspecting" if found.lane.inspecting else "NOT inspecting now"
        print_line(f"lane: {found.lane.name}, VLAN {found.lane.vlan}, {state}")
    if found.considered:
        rows = [
            (one.priority, one.name, "yes" if one.matches else "no", one.reason)
            for one in found.considered
        ]
        print_table(("priority", "policy", "matches", "why"), rows, "")
    print_table(("table", "what happens"), [(one.table, one.text) for one in found.tables], "")


def show_alerts(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with those that come; end by Ctrl-C.")
    ] = False,
    alert_id: Annotated[
        int | None, typer.Option("--id", min=0, help="One alert, with the engine's event.")
    ] = None,
    since: options.Since = None,
    until: options.Until = None,
    vm: options.Vm = None,
    address: options.Address = None,
    zone: Annotated[str | None, typer.Option("--zone", help="Only with this zone.")] = None,
    policy: Annotated[str | None, typer.Option("--policy", help="Only of this policy.")] = None,
    lane: options.Lane = None,
    verdict: Annotated[
        Verdict | None, typer.Option("--verdict", help="Only with this verdict.")
    ] = None,
    sid: options.Sid = None,
    cve: options.Cve = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help="Only with this in signature, URL or payload."),
    ] = None,
    limit: options.Limit = 100,
    cursor: options.Cursor = None,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """List alerts, newest first; or follow them as they come, oldest first."""
    query: Values = {
        "since": since,
        "until": until,
        "vm": vm,
        "address": address,
        "zone": zone,
        "policy": policy,
        "lane": lane,
        "verdict": verdict,
        "sid": sid,
        "cve": cve,
        "text": text,
    }
    if follow and (cursor is not None or alert_id is not None):
        raise WrongInput([FieldError("--follow", "takes neither --cursor nor --id")])
    client = open_client(url, token_file)
    if alert_id is not None:
        print_json(client.find_alert(alert_id))
    elif follow:
        follow_alerts(client, query, json=json)
    else:
        page = client.find_alerts({**query, "limit": limit, "cursor": cursor})
        if json:
            return print_json(page)
        columns = ("id", "time", "verdict", "sid", "message", "cves", "source", "destination")
        rows = [_alert_row(alert) for alert in page.items]
        print_table((*columns, "policy", "lane"), rows, "no alerts")
        show_next(page.next)


def follow_alerts(client: Client, query: Values, *, json: bool) -> None:
    """The last few alerts, then each as it comes; resumes by itself. Ends by KeyboardInterrupt."""
    last = client.find_alerts({**query, "limit": _FIRST_SHOWN}).items
    for alert in reversed(last):
        _print_alert(alert, json)
    after = last[0].id if last else 0

    def on_lost(reason: str) -> None:
        print_note(f"connection lost ({clean(reason)}); trying again")

    for alert in client.follow_alerts(query, after, on_lost):
        _print_alert(alert, json)


def _print_alert(alert: Alert, json: bool) -> None:
    if json:
        print_json(alert, compact=True)
    else:
        print_line("  ".join(clean("-" if cell == "" else cell) for cell in _alert_row(alert)))


def _endpoint(end: Endpoint) -> str:
    return render_endpoint(end.address, end.port, end.vm.name if end.vm else None)


def _alert_row(alert: Alert) -> tuple[object, ...]:
    return (
        alert.id,
        render_time(alert.time),
        alert.verdict,
        alert.signature.sid,
        alert.signature.message,
        ",".join(alert.signature.cves),
        _endpoint(alert.source),
        _endpoint(alert.destination),
        alert.policy or "",
        alert.lane,
    )


def show_flows(
    since: options.Since = None,
    until: options.Until = None,
    vm: options.Vm = None,
    address: options.Address = None,
    application: Annotated[
        str | None, typer.Option("--application", help="Only of this application.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Only to this port.")
    ] = None,
    treatment: Annotated[
        Treatment | None, typer.Option("--treatment", help="Only so treated.")
    ] = None,
    limit: options.Limit = 100,
    cursor: options.Cursor = None,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """List flow records, newest first, and tell how many packets they missed."""
    page = open_client(url, token_file).find_flows(
        {
            "since": since,
            "until": until,
            "vm": vm,
            "address": address,
            "application": application,
            "port": port,
            "treatment": treatment,
            "limit": limit,
            "cursor": cursor,
        }
    )
    if json:
        return print_json(page)
    rows = [
        (
            render_time(flow.started_at),
            f"{(flow.ended_at - flow.started_at).total_seconds():.1f}",
            _endpoint(flow.source),
            _endpoint(flow.destination),
            flow.protocol,
            flow.application,
            flow.bytes_sent,
            flow.bytes_received,
            flow.treatment or "",
            flow.policy or "",
        )
        for flow in page.items
    ]
    columns = ("started", "seconds", "source", "destination", "protocol", "application")
    print_table((*columns, "sent", "received", "treatment", "policy"), rows, "no flow records")
    if page.accounting is not None:
        told = page.accounting
        print_line(
            f"since {render_time(told.since)} the records tell of {told.recorded_packets} of "
            f"{told.switch_packets} packets ({told.missed_percent:.1f} % missed)"
        )
    show_next(page.next)


def show_events(
    since: options.Since = None,
    until: options.Until = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only of this kind, as drift.mended.")
    ] = None,
    limit: options.Limit = 100,
    cursor: options.Cursor = None,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """List what the appliance itself did and met, newest first."""
    page = open_client(url, token_file).find_events(
        {"since": since, "until": until, "kind": kind, "limit": limit, "cursor": cursor}
    )
    if json:
        return print_json(page)
    rows = [
        (
            event.id,
            render_time(event.time),
            "" if event.ended is None else render_time(event.ended),
            event.level,
            event.kind,
            event.subject,
            event.text,
        )
        for event in page.items
    ]
    print_table(("id", "time", "ended", "level", "kind", "subject", "text"), rows, "no events")
    show_next(page.next)
