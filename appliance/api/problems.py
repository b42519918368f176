"""Failures as problem documents (RFC 9457): the one place that turns an error into a status."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from http import HTTPStatus

from pydantic import ValidationError

from appliance.api.control import NotFound, Unavailable
from appliance.api.documents import ProblemDocument, ProblemFault
from steering.errors import Conflict, FieldError, HairpinError, SwitchError, WrongInput

MEDIA_TYPE = "application/problem+json"

_TYPES = {
    400: "bad-request",
    401: "unauthorized",
    404: "not-found",
    405: "method-not-allowed",
    412: "stale-revision",
    413: "body-too-large",
    415: "unsupported-media-type",
    417: "expectation-failed",
    422: "wrong-input",
    428: "precondition-required",
    500: "failed",
    503: "unavailable",
}
_LONGEST_REASON = 2000


class Refused(HairpinError):
    """A request that the server itself refuses, with the status it gets."""

    def __init__(
        self,
        status: int,
        reason: str,
        mend: str = "",
        *,
        faults: Sequence[FieldError] = (),
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        super().__init__(reason, mend)
        self.status = status
        self.faults = tuple(faults)
        self.headers = tuple(headers)


def render_path(location: Iterable[int | str]) -> str:
    """A place in a document: ``("items", 2, "spec")`` as ``items[2].spec``; all: ``(body)``."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "(body)"


def find_faults(error: ValidationError) -> tuple[FieldError, ...]:
    """Each fault that pydantic found, with its path and a reason without pydantic's own words."""
    return tuple(
        FieldError(render_path(fault["loc"]), fault["msg"].removeprefix("Value error, "))
        for fault in error.errors(include_url=False, include_input=False, include_context=False)
    )


def build_problem(
    status: int,
    detail: str,
    *,
    mend: str = "",
    faults: Sequence[FieldError] = (),
    request_id: str = "",
) -> ProblemDocument:
    return ProblemDocument(
        type=f"urn:hairpin:problem:{_TYPES[status]}" if status in _TYPES else "about:blank",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail[:_LONGEST_REASON],
        instance=f"urn:hairpin:request:{request_id}" if request_id else "",
        mend=mend[:_LONGEST_REASON],
        errors=tuple(ProblemFault(path=fault.path, reason=fault.reason) for fault in faults),
    )


def find_status(error: HairpinError, *, had_body: bool) -> int:
    """The status that a failure raised by `Control` or by the server gets."""
    match error:
        case Refused():
            return error.status
        case WrongInput():
            return 422 if had_body else 400
        case NotFound():
            return 404
        case Conflict():
            return 412
        case SwitchError() | Unavailable():
            return 503
        case _:
            return 500


def build_error_problem(
    error: HairpinError, *, had_body: bool, request_id: str = ""
) -> ProblemDocument:
    """The problem document of a failure that was raised on purpose."""
    faults = error.faults if isinstance(error, WrongInput | Refused) else ()
    detail = error.reason
    if isinstance(error, WrongInput):
        detail = f"{len(faults)} fault{'' if len(faults) == 1 else 's'}; nothing was changed"
    return build_problem(
        find_status(error, had_body=had_body),
        detail,
        mend=error.mend,
        faults=faults,
        request_id=request_id,
    )
