"""The door to what the console shows: the files of first boot, the addresses, and the API's health."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import structlog
from pyroute2 import IPRoute, NetlinkError

from appliance.api.auth import read_token
from appliance.api.documents import Health, HealthSummary
from appliance.api.tls import build_pin
from appliance.firstboot.console import ConsoleFacts, Trouble, is_news, render_console
from appliance.firstboot.faults import read_report
from appliance.firstboot.places import Places
from appliance.settings import Settings, read_settings
from appliance.version import find_version
from steering.errors import HairpinError

log = structlog.get_logger("console")

LOOK_SECONDS = 5.0
ANSWER_SECONDS = 10.0
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - not listened on here
_BOOT_LIMIT = 2**16
_LINK_SCOPE = 253


async def follow_status(places: Places, show: Callable[[str], None]) -> None:
    """Show the state, and again whenever something changes, until cancelled."""
    shown, at = "", 0.0
    while True:
        text = render_console(await read_facts(places))
        if is_news(shown, text, time.monotonic() - at):
            show(text)
            shown, at = text, time.monotonic()
        await asyncio.sleep(LOOK_SECONDS)


async def read_facts(places: Places) -> ConsoleFacts:
    """What there is to tell now. Never raises: what can't be read is told, too."""
    addresses = await asyncio.to_thread(read_addresses)
    try:
        report = read_report(places.faults)
        if report is not None:
            where = f"http://...:{report.port}/health" if report.reachable else ""
            return ConsoleFacts(
                name=report.name,
                version=report.version,
                addresses=addresses,
                health="failing: not configured, first boot failed",
                service=where,
                troubles=tuple(Trouble(str(one), one.mend) for one in report.faults),
            )
        if not places.settings.exists():
            return _build_starting(addresses)
        settings = read_settings(places.settings)
    except HairpinError as fault:
        troubles = (Trouble(fault.reason, fault.mend),)
        return ConsoleFacts("hairpin", find_version(), addresses, "failing", troubles=troubles)
    boot = read_boot(places.boot_record)
    health = await read_health(settings)
    seed, notes = _describe_seed(boot)
    host = next((one.partition(" ")[2].partition("/")[0] for one in addresses), settings.api.listen)
    facts = ConsoleFacts(
        name=settings.name,
        version=find_version(),
        addresses=addresses,
        health="",
        service=f"https://{f'[{host}]' if ':' in host else host}:{settings.api.port}",
        fingerprint=str(boot.get("fingerprint", "")),
        seed=seed,
    )
    return _add_health(facts, health, notes)


def _build_starting(addresses: tuple[str, ...]) -> ConsoleFacts:
    troubles = (
        Trouble(
            "there are neither settings nor faults: first boot has not ended",
            "wait a minute; then see `journalctl -u hairpin-firstboot`",
        ),
    )
    return ConsoleFacts("hairpin", find_version(), addresses, "starting", troubles=troubles)


def _add_health(
    facts: ConsoleFacts, health: Health | HealthSummary | str, notes: tuple[Trouble, ...]
) -> ConsoleFacts:
    silent = f"not known: the API does not answer ({health})"
    word = silent if isinstance(health, str) else health.status
    rules, troubles = "", notes
    if isinstance(health, Health):
        rules = health.components.rules.detail
        troubles += tuple(Trouble(one.reason, one.mend) for one in health.problems)
    return ConsoleFacts(
        facts.name, facts.version, facts.addresses, word, facts.service, facts.fingerprint,
        facts.seed, rules, troubles,
    )  # fmt: skip


def _describe_seed(boot: dict[str, Any]) -> tuple[str, tuple[Trouble, ...]]:
    at = boot.get("acceptedAt")
    when = (
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)) if isinstance(at, int | float) else "-"
    )
    told = {
        "new": f"taken at this boot, {when}",
        "same": f"as accepted at {when}",
        "kept": f"none is offered now; as accepted at {when}",
    }.get(str(boot.get("origin")), "")
    notes = boot.get("notes", [])
    found = tuple(Trouble(str(one)) for one in notes) if isinstance(notes, list) else ()
    return told, found


def read_boot(path: Path) -> dict[str, Any]:
    """What first boot noted; empty where it can't be read: it is for people only."""
    try:
        value = json.loads(path.read_bytes()[:_BOOT_LIMIT])
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_addresses() -> tuple[str, ...]:
    """As in `ens3 192.0.2.10/24`; without loopback and link-local ones. Empty when they can't be read."""
    try:
        with IPRoute() as netlink:
            names = {link["index"]: str(link.get("IFLA_IFNAME")) for link in netlink.get_links()}
            return tuple(
                f"{names[one['index']]} {one.get('IFA_ADDRESS')}/{one['prefixlen']}"
                for one in netlink.get_addr()
                if one["scope"] < _LINK_SCOPE and names.get(one["index"], "lo") != "lo"
            )
    except (NetlinkError, OSError) as fault:
        log.warning("addresses can't be read", reason=str(fault))
        return ()


async def read_health(settings: Settings) -> Health | HealthSummary | str:
    """By the API on this machine: all of it with the token, in a word without; else why not.

    The certificate is for the management address, so that it is compared with the file, whole, instead.
    """
    api = settings.api
    host = _ANY.get(api.listen, api.listen)
    ends = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    try:
        scheme, pin = "http", None
        if api.cert_file is not None:
            scheme, pin = "https", build_pin(api.cert_file)
        headers, path, model = {}, "/health", HealthSummary
        try:
            headers = {"Authorization": f"Bearer {read_token(settings.token_file)}"}
            path, model = "/api/v1/health", Health  # type: ignore[assignment]
        except HairpinError as fault:
            log.info("health in a word only", reason=fault.reason)
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{api.port}{path}"
        async with (
            aiohttp.ClientSession(timeout=ends, headers=headers) as session,
            session.get(url, ssl=True if pin is None else pin, allow_redirects=False) as got,
        ):
            return model.model_validate_json(await got.text())
    except aiohttp.ClientConnectorError as fault:
        # Its own text names an object of the program, another one at each look: each would be news.
        return str(fault.os_error.strerror or fault.os_error)[:200]
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, HairpinError) as fault:
        return (str(fault).partition("\n")[0] or type(fault).__name__)[:200]
