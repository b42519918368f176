"""What cuts across all endpoints: the token, bounds, problem documents, and odd requests."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from appliance.api.auth import check_token, ensure_token, read_token
from appliance.api.control import NotFound, Unavailable
from appliance.api.documents import Live, VmList
from appliance.api.routes import ROUTES, Reply
from appliance.api.server import build_response, open_server
from steering.errors import HairpinError, SwitchError
from tests.support.api_server import ANY_PORT, TOKEN
from tests.support.fake_control import FakeControl

EMPTY = {"apiVersion": "hairpin/v1", "kind": "List", "items": []}


@dataclass
class Answer:
    status: int
    headers: Any
    document: Any
    kind: str


class Api:
    def __init__(self, url: str, session: aiohttp.ClientSession, control: FakeControl) -> None:
        self.url, self.session, self.control = url, session, control

    async def ask(self, method: str, path: str, **more: Any) -> Answer:
        headers = {"Authorization": f"Bearer {TOKEN}", **more.pop("headers", {})}
        async with self.session.request(
            method, self.url + "/api/v1" + path, headers=headers, **more
        ) as got:
            text = await got.text()
            return Answer(
                got.status, got.headers, json.loads(text) if text else None, got.content_type
            )

    async def raw(self, data: bytes) -> bytes:
        host, _, port = self.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        try:
            return await asyncio.wait_for(reader.read(65536), 5)
        finally:
            writer.close()


@asynccontextmanager
async def open_api() -> AsyncIterator[Api]:
    control = FakeControl()
    async with (
        open_server(control, ANY_PORT, TOKEN) as url,
        aiohttp.ClientSession() as session,
    ):
        yield Api(url, session, control)


def check_problem(answer: Answer, status: int) -> Any:
    assert (answer.status, answer.kind) == (status, "application/problem+json")
    assert answer.document["status"] == status
    assert answer.document["instance"].endswith(answer.headers["X-Request-Id"])
    return answer.document


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xff"],
)
async def test_without_the_token_nothing_is_told(header: str | None) -> None:
    async with open_api() as api:
        headers = {} if header is None else {"Authorization": header}
        for path in ("/health", "/policies", "/nothing", "/alerts/stream"):
            async with api.session.get(api.url + "/api/v1" + path, headers=headers) as got:
                assert got.status == 401
                assert got.headers["WWW-Authenticate"] == 'Bearer realm="hairpin"'
                assert (await got.json(content_type=None))["title"] == "Unauthorized"


async def test_live_and_the_description_need_no_token() -> None:
    async with open_api() as api, api.session.get(api.url + "/api/v1/live") as live:
        assert await live.json() == {"live": True}
        async with api.session.get(api.url + "/api/v1/openapi.json") as got:
            paths = (await got.json())["paths"]
        assert sorted(paths) == sorted({route.path for route in ROUTES})


async def test_a_change_needs_the_revision_in_force() -> None:
    async with open_api() as api:
        before = await api.ask("GET", "/policies")
        etag = before.headers["ETag"]
        check_problem(await api.ask("PUT", "/policies", json=EMPTY), 428)
        done = await api.ask("PUT", "/policies", json=EMPTY, headers={"If-Match": etag})
        assert done.status == 200
        assert done.document["applied"] is True
        assert done.headers["ETag"] == f'"{done.document["etag"]}"' != etag
        stale = await api.ask("PUT", "/policies", json=EMPTY, headers={"If-Match": etag})
        assert "read them again" in check_problem(stale, 412)["mend"]
        assert api.control.revision == 2


@pytest.mark.parametrize("tag", ['"1-fake"', '"x", "1-fake"', "*"])
async def test_if_match_takes_tags_and_any(tag: str) -> None:
    async with open_api() as api:
        done = await api.ask("PUT", "/policies", json=EMPTY, headers={"If-Match": tag})
        assert done.status == 200


@pytest.mark.parametrize(
    ("tag", "status"), [("1-fake", 400), ('W/"1-fake"', 412), ('"*"', 412), ("", 400), ('"', 400)]
)
async def test_if_match_refuses_weak_and_malformed_tags(tag: str, status: int) -> None:
    async with open_api() as api:
        done = await api.ask("PUT", "/policies", json=EMPTY, headers={"If-Match": tag})
        check_problem(done, status)


async def test_what_did_not_change_is_not_sent_again() -> None:
    async with open_api() as api:
        etag = (await api.ask("GET", "/policies")).headers["ETag"]
        again = await api.ask("GET", "/policies", headers={"If-None-Match": etag})
        assert (again.status, again.document) == (304, None)


async def test_a_dry_run_plans_and_changes_nothing() -> None:
    async with open_api() as api:
        planned = await api.ask(
            "PUT", "/policies?dry_run=true", json=EMPTY, headers={"If-Match": "*"}
        )
        assert planned.document["applied"] is False
        assert planned.document["pairs"][0]["after"] == "inspected"
        assert api.control.revision == 1


async def test_all_faults_of_a_body_are_told_at_once() -> None:
    body = {"apiVersion": "v9", "kind": "List", "items": [{"kind": "Zone", "colour": 1}]}
    async with open_api() as api:
        refused = await api.ask("PUT", "/policies", json=body, headers={"If-Match": "*"})
        paths = [fault["path"] for fault in check_problem(refused, 422)["errors"]]
        assert {"apiVersion", "items[0].metadata", "items[0].colour"} <= set(paths)
        edit = await api.ask(
            "PUT", "/vms/vm-1", json={"name": 7, "colour": 1}, headers={"If-Match": "*"}
        )
        assert {fault["path"] for fault in check_problem(edit, 422)["errors"]} == {"name", "colour"}


async def test_policies_are_taken_as_yaml() -> None:
    async with open_api() as api:
        done = await api.ask(
            "PUT",
            "/policies",
            data="apiVersion: hairpin/v1\nkind: List\nitems: []\n",
            headers={"If-Match": "*", "Content-Type": "application/yaml"},
        )
        assert done.status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b"\xff\xfe",
        b'{"a": "\\ud800"}',
        b"[" * 50_000,
        b"1" * 5_000,
    ],
)
async def test_what_is_not_json_is_refused(body: bytes) -> None:
    async with open_api() as api:
        headers = {"If-Match": "*", "Content-Type": "application/json"}
        for path in ("/policies", "/vms/vm-1"):
            check_problem(await api.ask("PUT", path, data=body, headers=headers), 400)


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/json; charset=utf-16", "application/x-www-form-urlencoded", "x"],
)
async def test_other_media_types_are_refused(kind: str) -> None:
    async with open_api() as api:
        headers = {"If-Match": "*", "Content-Type": kind}
        check_problem(await api.ask("PUT", "/policies", data=b"{}", headers=headers), 415)


async def test_a_compressed_body_is_refused() -> None:
    async with open_api() as api:
        headers = {
            "If-Match": "*",
            "Content-Type": "application/json",
            "Content-Encoding": "deflate",
        }
        got = await api.ask("PUT", "/policies", data=b"not deflate", headers=headers)
        check_problem(got, 415)


async def test_bodies_are_bounded_whether_or_not_they_tell_their_length() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 8192

    async with open_api() as api:
        headers = {"If-Match": "*", "Content-Type": "application/json"}
        told = await api.ask("PUT", "/policies", data=b" " * (64 * 1024 + 1), headers=headers)
        assert "65536 bytes" in check_problem(told, 413)["detail"]
        check_problem(await api.ask("PUT", "/policies", data=chunks(), headers=headers), 413)
        assert (await api.ask("GET", "/live")).status == 200


@pytest.mark.parametrize(
    "query",
    [
        "?colour=red",
        "?limit=0",
        "?limit=1001",
        "?limit=1_0",
        "?limit=%31%30&limit=10",
        "?since=yesterday",
        "?cve=2014-6271",
        "?address=10.0.0.999",
        "?verdict=maybe",
        "?cursor=%00",
        "?vm=%ff",
    ],
)
async def test_wrong_queries_are_refused(query: str) -> None:
    async with open_api() as api:
        refused = check_problem(await api.ask("GET", "/alerts" + query), 400)
        assert refused["errors"][0]["path"] in query
        assert ("limit" in refused["mend"]) == ("colour" in query or query.count("limit") > 1)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/alerts/0x1", 404),
        ("GET", "/alerts/99999999999999999999", 404),
        ("GET", "/alerts/404", 404),
        ("GET", "/alerts/%2e%2e%2fpolicies", 404),
        ("GET", "/%00", 404),
        ("GET", "/%ff%fe", 404),
        ("DELETE", "/policies", 405),
        ("HEAD", "/nothing", 404),
    ],
)
async def test_what_is_not_there_is_a_problem_document(method: str, path: str, status: int) -> None:
    async with open_api() as api:
        url = URL(f"{api.url}/api/v1{path}", encoded=True)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with api.session.request(method, url, headers=headers) as got:
            assert (got.status, got.content_type) == (status, "application/problem+json")
            if status == 405:
                assert "PUT" in got.headers["Allow"]


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (NotFound("no such thing"), 404),
        (SwitchError("the switch does not answer", "start it"), 503),
        (Unavailable("busy"), 503),
        (HairpinError("it failed", "mend it"), 500),
        (RuntimeError("the password is sesame"), 500),
    ],
)
async def test_failures_become_problems_and_tell_no_secrets(fault: Exception, status: int) -> None:
    async with open_api() as api:
        api.control.fault = fault
        got = await api.ask("GET", "/rules")
        problem = check_problem(got, status) if status != 404 else got.document
        assert problem["status"] == status
        assert "sesame" not in str(problem)
        assert ("Retry-After" in got.headers) == (status == 503)


async def test_health_is_503_while_failing_with_the_same_document() -> None:
    async with open_api() as api:
        for state, status in (("ok", 200), ("degraded", 200), ("failing", 503)):
            api.control.status = state  # type: ignore[assignment]
            got = await api.ask("GET", "/health")
            assert (got.status, got.document["status"]) == (status, state)
            assert got.kind == "application/json"


async def test_a_request_id_is_taken_over_or_made() -> None:
    async with open_api() as api:
        given = await api.ask("GET", "/live", headers={"X-Request-Id": "abc-1"})
        assert given.headers["X-Request-Id"] == "abc-1"
        made = await api.ask("GET", "/live", headers={"X-Request-Id": "a b<script>"})
        assert len(made.headers["X-Request-Id"]) == 16


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /api/v1/live HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /api/v1/live HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 32 + b"\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_refused_and_the_server_lives_on(request_bytes: bytes) -> None:
    async with open_api() as api:
        answer = await api.raw(request_bytes)
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400")), answer[:100]
        assert b"Traceback" not in answer
        assert (await api.ask("GET", "/live")).status == 200


async def test_an_unknown_expectation_does_not_matter() -> None:
    async with open_api() as api:
        answer = await api.raw(
            b"GET /api/v1/live HTTP/1.1\r\nHost: x\r\nExpect: rain\r\nConnection: close\r\n\r\n"
        )
        assert answer.startswith(b"HTTP/1.1 200")


async def test_a_taken_port_is_told_with_its_mend() -> None:
    async with open_api() as api:
        taken = ANY_PORT.model_copy(update={"port": int(api.url.rpartition(":")[2])})
        with pytest.raises(HairpinError, match=r"can't listen.*set `api.listen`"):
            async with open_server(FakeControl(), taken, TOKEN):
                pass


def test_a_handler_can_answer_only_what_its_route_declares() -> None:
    live = ROUTES[0]
    with pytest.raises(TypeError, match="does not declare status 201"):
        build_response(live, Reply(201, Live()))
    with pytest.raises(TypeError, match="Live only"):
        build_response(live, Reply(200, VmList()))


def test_the_token_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = ensure_token(path)
    assert ensure_token(path) == token == read_token(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert check_token(f"bearer {token}", token)
    assert not check_token(token, token)


def test_a_start_that_was_killed_leaves_no_token_without_its_text(tmp_path: Path) -> None:
    path = tmp_path / "token"
    (tmp_path / f".token.{os.getpid()}").touch()
    assert len(ensure_token(path)) > 40
    assert [entry.name for entry in tmp_path.iterdir()] == ["token"]


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o644])
def test_the_service_refuses_a_token_that_others_may_use(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "token"
    ensure_token(path)
    path.chmod(mode)
    with pytest.raises(HairpinError, match="chmod 600"):
        ensure_token(path)


def test_a_token_file_that_holds_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(HairpinError, match="--token-file"):
        read_token(path)
    path.write_text("short\n")
    with pytest.raises(HairpinError, match="holds no token"):
        read_token(path)
