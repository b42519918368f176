"""Query strings as frozen models: what each reading endpoint can be asked.

Text is read strictly (no `yes` for a boolean, no `1_0` for a number), so that what OpenAPI says and
what is accepted are the same. Unknown and repeated parameters are refused by the server.
"""

from __future__ import annotations

import re
from datetime import datetime
from ipaddress import ip_address
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from appliance.api.documents import PairStatus, PortNumber, Treatment, Verdict
from steering.model import Family, Profile, Protocol

_INTEGER = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})",
    re.ASCII,
)
_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,252}$"


def _read_integer(value: Any) -> Any:
    if isinstance(value, str) and not _INTEGER.fullmatch(value):
        raise ValueError("not a whole number")
    return value


def _read_flag(value: Any) -> Any:
    if isinstance(value, str) and value not in ("true", "false"):
        raise ValueError("neither true nor false")
    return value


def _read_time(value: Any) -> Any:
    if isinstance(value, str) and not _TIME.fullmatch(value):
        raise ValueError("not an RFC 3339 time such as 2025-01-31T12:00:00Z")
    return value


def _check_address(value: str) -> str:
    ip_address(value)  # raises ValueError, which pydantic reports
    return value


ETAG_PATTERN = r'(W/)?"([!#-~]{0,256})"'
ETAGS_PATTERN = rf"^(\*|{ETAG_PATTERN}( *, *{ETAG_PATTERN}){{0,15}})$"
"""If-Match and If-None-Match (RFC 9110, 13.1): `*`, or one or more entity tags."""

EVENT_ID_PATTERN = "^(0|[1-9][0-9]{0,17})$"

_MAX_ID = 2**63 - 1

QueryId = Annotated[int, Field(ge=0, le=_MAX_ID), BeforeValidator(_read_integer)]
QueryFlag = Annotated[bool, BeforeValidator(_read_flag)]
QueryTime = Annotated[datetime, BeforeValidator(_read_time)]
QueryPort = Annotated[PortNumber, BeforeValidator(_read_integer)]
Sid = Annotated[int, Field(ge=1, le=2**32 - 1), BeforeValidator(_read_integer)]
Cve = Annotated[str, Field(pattern=r"^CVE-[0-9]{4}-[0-9]{4,19}$")]
Name = Annotated[str, Field(pattern=_NAME_PATTERN)]
QueryAddress = Annotated[str, Field(max_length=45), AfterValidator(_check_address)]
VmRef = Annotated[str, Field(pattern=_NAME_PATTERN, description="A VM by its name or vm-id.")]
Cursor = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_.~=-]{1,512}$", description="`next` of the page before.")
]
Limit = Annotated[int, Field(ge=1, le=1000), BeforeValidator(_read_integer)]


class Query(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NoQuery(Query):
    """For endpoints that take no parameters."""


class Page(Query):
    limit: Limit = 100
    cursor: Cursor | None = None


class DryRun(Query):
    dry_run: QueryFlag = Field(default=False, description="Plan only; change nothing.")


class CoverageQuery(Page):
    vm: VmRef | None = Field(default=None, description="Only pairs in which this VM is either end.")
    status: PairStatus | None = None


class HistoryQuery(Page):
    since: QueryTime | None = None
    until: QueryTime | None = None


class CanaryQuery(Page):
    lane: Profile | None = None


class ExplainQuery(Query):
    source: VmRef
    destination: VmRef
    protocol: Protocol = Protocol.TCP
    port: QueryPort | None = Field(
        default=None, description="Destination port; for tcp, udp and sctp."
    )
    family: Family = Family.IPV4


class RuleQuery(Page):
    sid: Sid | None = None
    cve: Cve | None = None
    lane: Profile | None = None


class AlertFilter(Query):
    """All that are set must hold."""

    since: QueryTime | None = None
    until: QueryTime | None = None
    vm: VmRef | None = Field(default=None, description="Either end.")
    address: QueryAddress | None = Field(default=None, description="Either end.")
    zone: Name | None = Field(default=None, description="Either end.")
    policy: Name | None = None
    lane: Profile | None = None
    verdict: Verdict | None = None
    sid: Sid | None = None
    cve: Cve | None = None
    text: Annotated[str, Field(min_length=4, max_length=200)] | None = Field(
        default=None,
        description="A part of the signature, the URL or the payload; small and capital letters of"
        " ASCII are the same.",
    )


class SignatureQuery(Query):
    since: QueryTime | None = Field(
        default=None, description="The hour that this is in is counted whole; a day ago if not set."
    )
    until: QueryTime | None = Field(
        default=None, description="The hour that this is in is counted whole; now if not set."
    )
    limit: Limit = 100


class AlertQuery(AlertFilter, Page):
    pass


class AlertStreamQuery(AlertFilter):
    after: QueryId | None = Field(
        None,
        description="Send what came after this alert; the header Last-Event-ID goes before it.",
    )


class FlowQuery(Page):
    since: QueryTime | None = None
    until: QueryTime | None = None
    vm: VmRef | None = Field(default=None, description="Either end.")
    address: QueryAddress | None = Field(default=None, description="Either end.")
    application: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    port: QueryPort | None = Field(default=None, description="Destination port.")
    treatment: Treatment | None = None


class ShortcutFilter(Query):
    """All that are set must hold."""

    policy: Name | None = None
    vm: VmRef | None = Field(default=None, description="Either end.")


class ShortcutQuery(ShortcutFilter, Page):
    pass


class EventQuery(Page):
    since: QueryTime | None = None
    until: QueryTime | None = None
    kind: Name | None = None
