"""The description is true: what schemathesis makes of it finds nothing that it does not say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from appliance.api.openapi import build_openapi
from appliance.api.routes import BASE, ROUTES
from appliance.api.stream import StreamLimits
from tests.support.api_server import TOKEN, run_api
from tests.support.fake_control import FakeControl

schema = schemathesis.openapi.from_dict(build_openapi(ROUTES, "0.0.0"))

# What is wrong and stale at once may be refused as stale.
schema.config.checks.negative_data_rejection.expected_statuses = [
    str(status) for status in (400, 401, 404, 405, 412, 415, 422, 428)
]

CHECKS = (
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
    openapi_checks.ignored_auth,
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # Streams end by themselves, so that the client sees whole answers.
    with run_api(FakeControl(), StreamLimits(longest_seconds=0.05)) as address:
        yield address


@schema.parametrize()
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_nothing_undocumented_is_answered(case: schemathesis.Case, url: str) -> None:
    case.call_and_validate(
        base_url=url,
        headers={"Authorization": f"Bearer {TOKEN}"},
        checks=list(CHECKS),
        timeout=10,
    )


def test_every_operation_is_named_once_and_every_schema_is_valid() -> None:
    document = build_openapi(ROUTES, "0.0.0")
    names = [route.operation for route in ROUTES]
    assert len(set(names)) == len(names)
    assert document["openapi"] == "3.1.0"
    for model in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(model)


def test_a_query_parameter_is_never_null() -> None:
    for path in build_openapi(ROUTES, "0.0.0")["paths"].values():
        for operation in path.values():
            for parameter in operation["parameters"]:
                assert "null" not in str(parameter["schema"]), parameter


def test_the_guide_names_every_endpoint() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    told = set(re.findall(r"^\| `(GET|PUT|POST|DELETE) (\S+)` \|", guide, re.MULTILINE))
    assert told == {(route.method, route.path.removeprefix(BASE)) for route in ROUTES}
