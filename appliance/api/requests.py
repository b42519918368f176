"""From an HTTP request to a checked `Call`, or a refusal that says all that is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

from aiohttp import web
from multidict import MultiMapping
from pydantic import ValidationError

from appliance.api.control import ANY, IfMatch
from appliance.api.problems import Refused, find_faults
from appliance.api.queries import ETAG_PATTERN, ETAGS_PATTERN, Query
from appliance.api.routes import YAML, Call, Route
from steering.errors import FieldError, WrongInput
from steering.pieces import split_list

_REMEMBERED_BYTES = 1024
"""Of a document, to be known again once it was seen to be JSON: so at most 16 MiB are remembered."""
_ETAG = re.compile(ETAG_PATTERN, re.ASCII)
_ETAGS = re.compile(ETAGS_PATTERN, re.ASCII)


async def read_call(request: web.Request, route: Route) -> Call:
    """Check everything that can be checked without Control. Raises Refused or WrongInput."""
    path = check_path(request.match_info, route)
    if_match = ANY
    if route.body is not None:
        check_media_type(request, route)
    if route.needs_match:
        header = request.headers.get("If-Match")
        if header is None:
            raise Refused(
                428,
                "a change needs If-Match",
                "send the ETag of GET /api/v1/policies, or `*` to replace whatever is in force",
            )
        if_match = parse_etags(header, weak=False)
    query = parse_query(route.query, request.rel_url.query)
    body = await _read_body(request, route) if route.body is not None else None
    none_match = request.headers.get("If-None-Match")
    return Call(
        query=query,
        path=path,
        body=body,
        if_match=if_match,
        if_none_match=parse_etags(none_match, weak=True) if none_match is not None else frozenset(),
    )


def check_path(given: Mapping[str, str], route: Route) -> Mapping[str, str]:
    parameter = route.path_parameter
    if parameter is not None and not re.fullmatch(
        parameter.pattern, given[parameter.name], re.ASCII
    ):
        raise Refused(404, f"there is no such {parameter.name}")
    return dict(given)


def parse_query(model: type[Query], given: MultiMapping[str]) -> Query:
    """The query string as its model. Raises WrongInput: unknown, repeated or wrong parameters."""
    repeated = sorted({name for name in given if len(given.getall(name)) > 1})
    known = f"the parameters of this endpoint are: {', '.join(model.model_fields) or 'none'}"
    if repeated:
        raise WrongInput([FieldError(name, "given more than once") for name in repeated], known)
    try:
        return model.model_validate_strings(dict(given))
    except ValidationError as fault:
        unknown = any(one["type"] == "extra_forbidden" for one in fault.errors())
        raise WrongInput(find_faults(fault), known if unknown else "") from None


def parse_etags(header: str, *, weak: bool) -> IfMatch:
    """The tags of If-Match or If-None-Match (RFC 9110, 13.1); weak ones never match If-Match."""
    if header == "*":
        return ANY
    if not _ETAGS.fullmatch(header):
        raise Refused(
            400, "If-Match or If-None-Match holds no entity tag", 'write it in quotes: "7-1c0ffee"'
        )
    return frozenset(tag for mark, tag in _ETAG.findall(header) if weak or not mark) - ANY


def check_media_type(request: web.Request, route: Route) -> None:
    taken = " or ".join(route.body_types)
    if "Content-Type" not in request.headers or request.content_type not in route.body_types:
        raise Refused(415, "the body's type is not taken here", f"send {taken}")
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
        raise Refused(415, f"the charset {request.charset} is not taken", "send UTF-8")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refused(415, "a compressed body is not taken", "send it as it is")


async def _read_body(request: web.Request, route: Route) -> Any:
    assert route.body is not None  # noqa: S101 - the caller's branch, for the type checker
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        _refuse_size(limit)
    try:
        data = await request.read()
    except web.HTTPRequestEntityTooLarge:
        _refuse_size(limit)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8") from None
    if request.content_type == YAML:
        return text
    if route.raw_body:
        return check_documents(text)
    try:
        return route.body.model_validate(parse_json(text))
    except ValidationError as fault:
        raise WrongInput(find_faults(fault)) from None


def _refuse_size(limit: int) -> NoReturn:
    raise Refused(
        413,
        f"the body is larger than {limit} bytes",
        "send less, or raise `api.bodyLimitBytes` in the settings",
        headers=[("Connection", "close")],
    )


def check_documents(text: str) -> str:
    """The text of JSON documents, if it is such as `parse_json` takes; to be read elsewhere.

    Of a List, only items that were not among those of late are looked into. Raises Refused.
    """
    parts = split_list(text)
    try:
        if parts is not None:
            for item in parts.items:
                (_check_item if len(item) <= _REMEMBERED_BYTES else parse_json_bytes)(item)
            parse_json(parts.rest)
            return text
    except (Refused, UnicodeDecodeError):
        pass  # the whole is read, to tell where in it the fault is
    # As one line: YAML, which the policies are read as, takes JSON but no tabs between tokens.
    return json.dumps(parse_json(text), ensure_ascii=False)


def parse_json_bytes(data: bytes) -> Any:
    """`parse_json` of UTF-8."""
    return parse_json(data.decode())


@lru_cache(maxsize=16_384)
def _check_item(data: bytes) -> None:
    parse_json_bytes(data)


def parse_json(text: str) -> Any:
    """JSON (RFC 8259), strictly: no NaN, no repeated keys, no depth that breaks a parser."""

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"the same key twice: {', '.join(twice)[:200]}")
        return value

    try:
        value = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=build_object)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused(400, "the body is not JSON: half of a surrogate pair") from None
    except (ValueError, RecursionError) as fault:
        why = "nested too deep" if isinstance(fault, RecursionError) else str(fault)
        raise Refused(400, f"the body is not JSON: {why}") from None
    return value
