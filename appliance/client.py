"""A client of the management API: finds the service, speaks to it, and types what goes wrong.

Synchronous to its callers (the command line); each call runs its own event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
from pydantic import ValidationError

from appliance.api.auth import read_token
from appliance.api.control import Unavailable
from appliance.api.coverage import CanaryPage, Coverage, CoverageHistory, LaneProofs
from appliance.api.documents import (
    Alert,
    AlertDetail,
    AlertPage,
    ApiDocument,
    EventPage,
    Explanation,
    FlowPage,
    Health,
    PlanReport,
    PolicyDocuments,
    ProblemDocument,
    RulePage,
    RulesStatus,
    UpdateJob,
    VmEdit,
    VmList,
)
from appliance.api.quarantine import QuarantineList, QuarantineOrder, QuarantineReport
from appliance.api.routes import BASE, JSON, YAML
from appliance.api.shortcuts import ShortcutList, ShortcutReport
from appliance.api.shuns import ShunList, ShunReport
from appliance.api.tls import build_client_context, build_pin
from steering.errors import Conflict, FieldError, HairpinError, WrongInput

CLIENT_FILES = (
    Path("/etc/hairpin/client.json"),
    Path("/run/hairpin-config/client.json"),  # on an appliance: written by `hairpin firstboot`
    Path("/run/hairpin-lab/lab/client.json"),
)
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 120.0
_SILENCE_SECONDS = 45.0  # three heartbeats of the live stream
_LONGEST_PAUSE = 10.0
_LARGEST_EVENT = 4 * 2**20

Values = Mapping[str, str | int | None]
Model = TypeVar("Model", bound=ApiDocument)


INTERRUPT = frozenset({signal.SIGINT})


class ServiceNotFound(Unavailable):
    """Nothing says where the service is, or it does not answer there."""


class ServiceRefused(HairpinError):
    """The service refused or failed; ``problem`` is what it said."""

    def __init__(self, problem: ProblemDocument) -> None:
        super().__init__(problem.detail or problem.title, problem.mend)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Place:
    """Where the service is. ``source`` says how that is known; ``ca_file`` None: the system's.

    ``certificate_file``: the service has this certificate and no other; its names are not looked at.
    """

    url: str
    token_file: Path
    source: str
    ca_file: Path | None = None
    certificate_file: Path | None = None


def find_place(
    url: str | None,
    token_file: Path | None,
    env: Mapping[str, str],
    files: tuple[Path, ...] = CLIENT_FILES,
) -> Place:
    """Where the service is: options, then HAIRPIN_URL and HAIRPIN_TOKEN_FILE, then ``files``.

    What its certificate is checked with: HAIRPIN_CA_FILE, then the file that names the same service.

    Raises ServiceNotFound when nothing says it, WrongInput for a wrong URL or file.
    """
    url = url or env.get("HAIRPIN_URL") or None
    named = token_file or (
        Path(env["HAIRPIN_TOKEN_FILE"]) if env.get("HAIRPIN_TOKEN_FILE") else None
    )
    ca_file = Path(env["HAIRPIN_CA_FILE"]) if env.get("HAIRPIN_CA_FILE") else None
    if url is not None and named is not None:
        return Place(check_url(url, "--url"), named, "options or environment", ca_file)
    for path in files:
        known = read_place(path)
        if known is None or (url is not None and known.url != check_url(url, "--url")):
            continue
        token_from = named or known.token_file
        pinned = known.certificate_file if ca_file is None else None
        return Place(known.url, token_from, str(path), ca_file or known.ca_file, pinned)
    if url is not None:
        raise WrongInput(
            [FieldError("--token-file", "missing: the service wants a token")],
            "name it with --token-file or HAIRPIN_TOKEN_FILE",
        )
    raise ServiceNotFound(
        "no management service is known here",
        "start the lab with `hairpin lab up`, or say where it is with --url and --token-file, "
        "HAIRPIN_URL and HAIRPIN_TOKEN_FILE, or /etc/hairpin/client.json",
    )


def find_media_type(text: str) -> str:
    """What documents are sent as. A brace alone does not tell: YAML has flow mappings too."""
    try:
        json.loads(text)
    except ValueError:
        return YAML
    return JSON


def read_place(path: Path) -> Place | None:
    """A client file, `{"url": ..., "tokenFile": ...}`; None where there is none.

    What the service's certificate is checked with, if need be: `caFile`, or `certificateFile`.
    """
    try:
        value = json.loads(path.read_text())
        url, token_file = value["url"], value["tokenFile"]
        checked = {key: value.get(key) for key in ("caFile", "certificateFile")}
    except FileNotFoundError:
        return None
    except OSError as fault:
        raise HairpinError(
            f"{path} can't be read: {fault.strerror}", "run as a user who may read it"
        ) from fault
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise WrongInput(
            [FieldError(str(path), 'not {"url": ..., "tokenFile": ...}')], "mend or remove it"
        ) from fault
    if not isinstance(url, str) or not isinstance(token_file, str):
        raise WrongInput([FieldError(str(path), "url and tokenFile must be text")])
    for key, file in checked.items():
        if file is not None and not isinstance(file, str):
            raise WrongInput([FieldError(str(path), f"{key} must be text")])
    ca_file, certificate_file = (Path(one) if one else None for one in checked.values())
    checked_url = check_url(url, f"{path}: url")
    return Place(checked_url, Path(token_file), str(path), ca_file, certificate_file)


def check_url(url: str, where: str) -> str:
    """The URL without a slash at its end. Raises WrongInput unless it is http(s)://HOST[:PORT]."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fine = False
    if not fine or parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise WrongInput([FieldError(where, f"{url!r} is not http://HOST:PORT")])
    return url.rstrip("/")


@dataclass(frozen=True, slots=True)
class InForce:
    """The documents in force, with their revision and its entity tag (without quotes)."""

    documents: PolicyDocuments
    revision: int
    etag: str


def _build_check(place: Place) -> ssl.SSLContext | aiohttp.Fingerprint:
    if place.certificate_file is not None:
        return build_pin(place.certificate_file)
    return build_client_context(place.ca_file)


class Client:
    """Every method raises ServiceNotFound, ServiceRefused, Conflict (412) or WrongInput (400, 422)."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._token = read_token(place.token_file)
        self._tls = _build_check(place) if place.url.startswith("https:") else None

    def read_health(self) -> Health:
        return self._get("/health", Health)

    def find_vms(self) -> VmList:
        return self._get("/vms", VmList)

    def edit_vm(self, vm_id: str, edit: VmEdit, etag: str) -> PlanReport:
        body = edit.model_dump_json(exclude_none=True)
        return self._put(f"/vms/{vm_id}", body, JSON, etag, dry_run=False)

    def read_policies(self) -> InForce:
        answer, headers = asyncio.run(self._ask("GET", "/policies", PolicyDocuments))
        return InForce(
            answer, int(headers.get("Hairpin-Revision", "0")), headers.get("ETag", "").strip('"')
        )

    def put_policies(self, text: str, etag: str, *, dry_run: bool) -> PlanReport:
        """``text`` is YAML or JSON; ``etag`` `*` stands for whatever is in force."""
        return self._put("/policies", text, find_media_type(text), etag, dry_run=dry_run)

    def read_coverage(self, query: Values) -> Coverage:
        return self._get("/coverage", Coverage, query)

    def read_coverage_history(self, query: Values) -> CoverageHistory:
        return self._get("/coverage/history", CoverageHistory, query)

    def find_canaries(self, query: Values) -> CanaryPage:
        return self._get("/canaries", CanaryPage, query)

    def prove_lanes(self) -> LaneProofs:
        return asyncio.run(self._ask("POST", "/canaries", LaneProofs))[0]

    def explain(self, query: Values) -> Explanation:
        return self._get("/explain", Explanation, query)

    def read_rules(self) -> RulesStatus:
        return self._get("/rules", RulesStatus)

    def find_rules(self, query: Values) -> RulePage:
        return self._get("/rules/signatures", RulePage, query)

    def start_rules_update(self) -> UpdateJob:
        return asyncio.run(self._ask("POST", "/rules/update", UpdateJob))[0]

    def read_rules_update(self) -> UpdateJob:
        return self._get("/rules/update", UpdateJob)

    def find_alerts(self, query: Values) -> AlertPage:
        return self._get("/alerts", AlertPage, query)

    def find_alert(self, alert_id: int) -> AlertDetail:
        return self._get(f"/alerts/{alert_id}", AlertDetail)

    def find_quarantines(self) -> QuarantineList:
        return self._get("/quarantines", QuarantineList)

    def add_quarantine(self, order: QuarantineOrder) -> QuarantineReport:
        body = order.model_dump_json(exclude_none=True)
        headers = {"Content-Type": JSON}
        asked = self._ask(
            "POST", "/quarantines", QuarantineReport, data=body.encode(), headers=headers
        )
        return asyncio.run(asked)[0]

    def remove_quarantine(self, vm: str) -> QuarantineReport:
        return asyncio.run(self._ask("DELETE", f"/quarantines/{quote(vm)}", QuarantineReport))[0]

    def find_shuns(self) -> ShunList:
        return self._get("/shuns", ShunList)

    def remove_shuns(self, shun_id: str | None) -> ShunReport:
        path = "/shuns" if shun_id is None else f"/shuns/{quote(shun_id)}"
        return asyncio.run(self._ask("DELETE", path, ShunReport))[0]

    def find_shortcuts(self, query: Values) -> ShortcutList:
        return self._get("/shortcuts", ShortcutList, query)

    def return_shortcuts(self, query: Values) -> ShortcutReport:
        """Those that the query names; all where it names nothing."""
        return asyncio.run(self._ask("DELETE", "/shortcuts", ShortcutReport, query=query))[0]

    def return_shortcut(self, shortcut_id: str) -> ShortcutReport:
        path = f"/shortcuts/{quote(shortcut_id)}"
        return asyncio.run(self._ask("DELETE", path, ShortcutReport))[0]

    def find_flows(self, query: Values) -> FlowPage:
        return self._get("/flows", FlowPage, query)

    def find_events(self, query: Values) -> EventPage:
        return self._get("/events", EventPage, query)

    def follow_alerts(
        self, query: Values, after: int | None, on_lost: Callable[[str], None]
    ) -> Iterator[Alert]:
        """Alerts as they come, without end; those after ``after`` first, if it is given.

        A lost connection is told to ``on_lost`` and taken up again where it was lost; only the
        first one is an error (ServiceNotFound, ServiceRefused).
        """
        with asyncio.Runner() as runner:
            alerts = self._follow(query, after, on_lost)

            async def find_next() -> Alert | None:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPT)
                try:
                    return await anext(alerts, None)
                finally:
                    signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPT)

            while True:
                # Ctrl-C waits until the loop or plain code can take it: between the two it would
                # leave a task behind that nobody ever runs.
                signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPT)
                try:
                    alert = runner.run(find_next())
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPT)
                if alert is None:
                    return
                yield alert

    # The asynchronous half.

    def _get(self, path: str, model: type[Model], query: Values | None = None) -> Model:
        return asyncio.run(self._ask("GET", path, model, query=query))[0]

    def _put(self, path: str, text: str, kind: str, etag: str, *, dry_run: bool) -> PlanReport:
        headers = {"Content-Type": kind, "If-Match": "*" if etag == "*" else f'"{etag}"'}
        query = {"dry_run": "true" if dry_run else None}
        return asyncio.run(
            self._ask("PUT", path, PlanReport, query=query, data=text.encode(), headers=headers)
        )[0]

    def _open(self, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
        # trust_env stays off: the token must not go through a proxy.
        return aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._token}"},
            timeout=timeout,
            connector=aiohttp.TCPConnector(ssl=True if self._tls is None else self._tls),
        )

    def _not_there(self, fault: Exception) -> ServiceNotFound:
        if isinstance(fault, aiohttp.ServerFingerprintMismatch):
            return ServiceNotFound(
                f"what answers at {self.place.url} does not prove who it is (another certificate than in "
                f"{self.place.certificate_file})",
                "put the service's own certificate there, if it has a new one",
            )
        if isinstance(fault, aiohttp.ClientConnectorCertificateError):
            return ServiceNotFound(
                f"what answers at {self.place.url} does not prove who it is "
                f"({fault.certificate_error})",
                "name the file of its authority's certificate in HAIRPIN_CA_FILE, and the service "
                "as its certificate does",
            )
        why = str(fault) or type(fault).__name__
        return ServiceNotFound(
            f"the management service does not answer at {self.place.url} ({why})",
            f"start it (`hairpin lab up`, or `hairpin serve --config FILE`); "
            f"the address comes from {self.place.source}",
        )

    async def _ask(
        self,
        method: str,
        path: str,
        model: type[Model],
        *,
        query: Values | None = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[Model, Mapping[str, str]]:
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS, sock_connect=_CONNECT_SECONDS)
        try:
            async with (
                self._open(timeout) as session,
                session.request(
                    method,
                    f"{self.place.url}{BASE}{path}",
                    params=_drop_unset(query),
                    data=data,
                    headers=headers,
                    allow_redirects=False,
                ) as answer,
            ):
                text = await answer.text()
                if answer.content_type != JSON:
                    raise build_refusal(answer.status, text)
                try:
                    return model.model_validate_json(text), answer.headers
                except ValidationError as fault:
                    raise HairpinError(
                        f"the answer of {self.place.url} is not what this version expects "
                        f"({fault.error_count()} differences)",
                        "use the `hairpin` of the service's own version",
                    ) from fault
        except (aiohttp.ClientError, TimeoutError, OSError) as fault:
            raise self._not_there(fault) from fault

    async def _follow(
        self, query: Values, after: int | None, on_lost: Callable[[str], None]
    ) -> AsyncIterator[Alert]:
        position, connected, pause = after, False, 1.0
        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS
        )
        while True:
            lost = "the service ended the stream"
            try:
                async for event in self._read_stream(query, position, limits):
                    connected, pause = True, 1.0
                    if event.get("event") == "problem":
                        lost = ProblemDocument.model_validate_json(event["data"]).detail
                        break
                    if "data" in event:
                        yield Alert.model_validate_json(event["data"])
                    position = int(event.get("id", position or 0))
            except (aiohttp.ClientError, TimeoutError, OSError) as fault:
                if not connected:
                    raise self._not_there(fault) from fault
                lost = str(fault) or "the service went silent"
            except ServiceRefused as fault:
                # A service that is just starting or stopping says 503; anything else is final.
                if not connected or fault.problem.status != 503:
                    raise
                lost = fault.reason
            on_lost(lost)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _read_stream(
        self, query: Values, position: int | None, limits: aiohttp.ClientTimeout
    ) -> AsyncIterator[dict[str, str]]:
        headers = {} if position is None else {"Last-Event-ID": str(position)}
        url = f"{self.place.url}{BASE}/alerts/stream"
        async with (
            self._open(limits) as session,
            session.get(
                url,
                params=_drop_unset(query),
                headers=headers,
                allow_redirects=False,
                read_bufsize=_LARGEST_EVENT,
            ) as answer,
        ):
            if answer.status != 200:
                raise build_refusal(answer.status, await answer.text())
            event: dict[str, str] = {}
            async for line in answer.content:
                text = line.decode().rstrip("\r\n")
                if not text:
                    yield event
                    event = {}
                else:
                    name, _, value = text.partition(":")
                    event[name] = value.removeprefix(" ")


def build_refusal(status: int, text: str) -> HairpinError:
    """What the service said as a typed failure; also where something else answered in its place."""
    try:
        problem = ProblemDocument.model_validate_json(text)
    except ValidationError:
        return ServiceNotFound(
            f"what answers there is not the management service (status {status})",
            "check the URL",
        )
    if problem.errors:
        faults = [FieldError(fault.path, fault.reason) for fault in problem.errors]
        return WrongInput(faults, problem.mend)
    if status == 412:
        return Conflict(problem.detail, problem.mend)
    return ServiceRefused(problem)


def _drop_unset(query: Values | None) -> dict[str, str]:
    return {name: str(value) for name, value in (query or {}).items() if value is not None}


def open_client(url: str | None, token_file: Path | None) -> Client:
    """A client of the service that the options, the environment or the files name."""
    return Client(find_place(url, token_file, os.environ))
