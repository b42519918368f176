"""The OpenAPI 3.1 description, made from the route table and the models. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from appliance.api.documents import Alert, ApiDocument, ProblemDocument
from appliance.api.problems import MEDIA_TYPE as PROBLEM
from appliance.api.queries import ETAGS_PATTERN, EVENT_ID_PATTERN, Query
from appliance.api.routes import EVENT_STREAM, EVERY_PROBLEM, JSON, YAML, Route

_MEANINGS = {
    200: "As asked.",
    202: "Begun.",
    304: "Not changed since.",
    400: "The request or its query is wrong.",
    401: "No token, or a wrong one.",
    404: "There is nothing of that name or id.",
    412: "If-Match does not name the revision in force; nothing was changed.",
    413: "The body is too large.",
    415: "The body is of a type that is not taken here.",
    422: "The body's content is wrong; `errors` tells all faults; nothing was changed.",
    428: "The request needs If-Match.",
    500: "It failed.",
    503: "Not now; try again.",
}
_IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "required": True,
    "description": "The ETag that the change is made against, or `*` for whatever is in force.",
    "schema": {"type": "string", "pattern": ETAGS_PATTERN},
}
_IF_NONE_MATCH = {**_IF_MATCH, "name": "If-None-Match", "required": False}
_IF_NONE_MATCH["description"] = "The ETag that the client has already."
_LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "The id of the last alert that was received.",
    "schema": {"type": "string", "pattern": EVENT_ID_PATTERN},
}


def build_openapi(routes: Sequence[Route], version: str) -> dict[str, Any]:
    """The description of ``routes`` as JSON values."""
    wanted: dict[tuple[type[BaseModel], JsonSchemaMode], None] = {
        (ProblemDocument, "serialization"): None,
        (Alert, "serialization"): None,
    }
    for route in routes:
        wanted[(route.query, "validation")] = None
        if route.body is not None:
            wanted[(route.body, "validation")] = None
        for model in route.responses.values():
            if model is not None:
                wanted[(model, "serialization")] = None
    found, definitions = models_json_schema(
        list(wanted), ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Any] = definitions["$defs"]
    queries = {
        model: schemas.pop(schema["$ref"].rpartition("/")[2])
        for (model, _), schema in found.items()
        if issubclass(model, Query)
    }
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _render_operation(
            route, found, queries[route.query]
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Hairpin management API",
            "version": version,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _render_operation(
    route: Route,
    found: Mapping[Any, Mapping[str, Any]],
    query: Mapping[str, Any],
) -> dict[str, Any]:
    def build_content(model: type[ApiDocument] | None) -> dict[str, Any]:
        if route.media_type == EVENT_STREAM:
            return {EVENT_STREAM: {"schema": _render_event_schema(found)}}
        if model is not None:
            schema = found[(model, "serialization")]
        else:
            schema = {"type": "object" if route.media_type == JSON else "string"}
        return {route.media_type: {"schema": schema}}

    responses: dict[str, Any] = {}
    for status, model in route.responses.items():
        responses[str(status)] = {"description": _MEANINGS[status]}
        if status != 304:
            responses[str(status)]["content"] = build_content(model)
        if route.response_headers:
            responses[str(status)]["headers"] = {
                name: {"description": text, "required": True, "schema": {"type": "string"}}
                for name, text in route.response_headers.items()
            }
    problem = {PROBLEM: {"schema": found[(ProblemDocument, "serialization")]}}
    for status in sorted({*EVERY_PROBLEM, *route.problems, *([] if route.public else [401])}):
        responses.setdefault(str(status), {"description": _MEANINGS[status], "content": {}})
        responses[str(status)]["content"] |= problem
    operation: dict[str, Any] = {
        "operationId": route.operation,
        "summary": route.summary,
        "parameters": _render_parameters(route, query),
        "responses": dict(sorted(responses.items())),
    }
    if route.public:
        operation["security"] = []
    if route.body is not None:
        schema = found[(route.body, "validation")]
        operation["requestBody"] = {
            "required": True,
            "content": {kind: {"schema": schema} for kind in route.body_types},
        }
        if YAML in route.body_types:
            operation["requestBody"]["description"] = "The same document as JSON or as YAML."
    return operation


def _render_event_schema(found: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    """One event of the stream; `data` is the text of a JSON document."""
    documents = [found[(model, "serialization")] for model in (Alert, ProblemDocument)]
    return {
        "type": "object",
        "description": "One event: `alert`, or `problem` as the last one before the end.",
        "properties": {
            "id": {"type": "string", "pattern": EVENT_ID_PATTERN},
            "event": {"type": "string", "enum": ["alert", "problem"]},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"oneOf": documents},
            },
        },
        "required": ["event", "data"],
    }


def _render_parameters(route: Route, query: Mapping[str, Any]) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    if route.path_parameter is not None:
        parameters.append(
            {
                "name": route.path_parameter.name,
                "in": "path",
                "required": True,
                "description": route.path_parameter.description,
                "schema": dict(route.path_parameter.schema),
            }
        )
    for name, schema in query.get("properties", {}).items():
        parameters.append(
            {
                "name": name,
                "in": "query",
                "required": name in query.get("required", ()),
                "schema": _without_null(schema),
            }
        )
    if route.needs_match:
        parameters.append(_IF_MATCH)
    if 304 in route.responses:
        parameters.append(_IF_NONE_MATCH)
    if route.media_type == EVENT_STREAM:
        parameters.append(_LAST_EVENT_ID)
    return parameters


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A query parameter is left out rather than null: what pydantic adds for that is taken off."""
    kept = {key: value for key, value in schema.items() if key not in ("anyOf", "title")}
    if kept.get("default", ...) is None:
        del kept["default"]
    for choice in schema.get("anyOf", ()):
        if choice != {"type": "null"}:
            kept = {**choice, **kept}
    return kept
