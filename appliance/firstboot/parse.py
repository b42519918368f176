"""Decoded text -> seed, or every fault of it with its path, reason and mend. Pure.

What is read is hostile until it got through here; no reason shows what stood at a secret's place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from appliance.firstboot.document import (
    DEFAULT_PORT,
    SECRET,
    TOKEN_LENGTH,
    ApiPort,
    ManagementSeed,
    SeedDocument,
)
from appliance.firstboot.faults import Fault, show_key
from appliance.settings import find_repeated, render_path
from appliance.settings_values import Name
from steering.documents import show, suggest

GUIDE = "docs/first-boot.md"
DEFAULT_NAME = "hairpin"
_NAME: TypeAdapter[str] = TypeAdapter(Name)
_PORT: TypeAdapter[int] = TypeAdapter(ApiPort)


@dataclass(frozen=True, slots=True)
class SeedReading:
    """``document`` None: refused, see ``faults``. ``name``, ``management`` and ``port`` are what could be
    read of a refused one, so that its faults can be shown; ``management`` only where it has no fault."""

    document: SeedDocument | None
    name: str
    management: ManagementSeed | None
    port: int
    faults: tuple[Fault, ...]


def read_seed(mapping: Mapping[str, object]) -> SeedReading:
    """The seed in a decoded mapping."""
    repeated = [
        Fault(".".join(map(show_key, path.split("."))), "stands here more than once", "leave one")
        for path in find_repeated(mapping)
    ]
    document, faults = _validate(SeedDocument, mapping)
    told = {fault.path for fault in faults}
    empty = [
        Fault(path, "stands there without a value", "give it one, or leave the key out")
        for path in _find_empty(mapping)
        if path not in told
    ]
    faults = (*repeated, *faults, *empty)
    if document is not None and not faults:
        return SeedReading(document, document.name, document.management, document.api.port, ())
    wrong = [fault.path for fault in faults]
    management = None
    if not any(path.startswith("management") for path in wrong):
        management, _ = _validate(ManagementSeed, mapping.get("management", {}))
    api = mapping.get("api")
    name = _read_field(_NAME, mapping.get("name"), DEFAULT_NAME)
    port = api.get("port") if isinstance(api, Mapping) else None
    return SeedReading(
        document=None,
        # A token in the place of the name may look like one, and the name is shown to everybody.
        name=name if len(name) < TOKEN_LENGTH else DEFAULT_NAME,
        management=management,
        port=_read_field(_PORT, port, DEFAULT_PORT),
        faults=faults,
    )


def _find_empty(value: object, at: tuple[str | int, ...] = ()) -> Iterator[str]:
    """Paths of what is null: it may be where a seed was cut off, and is no way to say that there is none."""
    inner: Iterable[tuple[str | int, object]] = ()
    if isinstance(value, Mapping):
        inner = ((show_key(str(key)), one) for key, one in value.items())
    elif isinstance(value, list):
        inner = enumerate(value)
    elif value is None and at:
        yield render_path(at)
    for key, one in inner:
        yield from _find_empty(one, (*at, key))


def _read_field(field: TypeAdapter[Any], value: object, otherwise: Any) -> Any:
    """A value of a document that is refused as a whole, by its own declaration."""
    try:
        return field.validate_python(value, strict=True)
    except ValidationError:
        return otherwise


def _validate(model: type[Any], value: object) -> tuple[Any | None, tuple[Fault, ...]]:
    try:
        # As JSON, so that strictness is JSON's: lists for tuples and text for words, nothing else.
        text = json.dumps(value)
        return model.model_validate_json(text, strict=True, by_alias=True, by_name=False), ()
    except ValidationError as fault:
        return None, tuple(_build_fault(error) for error in _find_causes(fault))
    except (ValueError, RecursionError):
        return None, (Fault("(seed)", "has a value that can't be written as JSON", f"see {GUIDE}"),)


def _find_causes(fault: ValidationError) -> list[Any]:
    """Without lists that are too short only since what stands in them is wrong, which is told."""
    errors = fault.errors(include_url=False)
    locs = [error["loc"] for error in errors]
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(
            len(loc) > len(error["loc"]) and loc[: len(error["loc"])] == error["loc"]
            for loc in locs
        )
    ]


def _build_fault(error: Any) -> Fault:
    loc = [show_key(part) if isinstance(part, str) else part for part in error["loc"]]
    path = render_path(loc).replace("(file)", "(seed)")
    return Fault(path, _render_reason(path, error), _find_mend(error["loc"], error["type"]))


def _render_reason(path: str, error: Any) -> str:
    found = "" if SECRET.search(path) else f", not {_show_value(error['input'])}"
    match error["type"]:
        case "extra_forbidden":
            return "unknown key"
        case "missing":
            return "must be given"
        case "json_invalid":
            return "is not Unicode text throughout"
        case "model_type" | "dict_type":
            # Text in a mapping's place is one that lacks a colon, or a key in the wrong one.
            what = "text" if isinstance(error["input"], str) else show(error["input"])
            return f"must be a mapping, not {what}"
        case "tuple_type" | "list_type":
            return f"must be a list{found}"
        case "string_type":
            quote = ": put it in quotes" if isinstance(error["input"], bool | int | float) else ""
            return f"must be text{found}{quote}"
        case "string_pattern_mismatch":
            return f"must be of the form {error['ctx']['pattern']}{found}"
    return str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")


def _show_value(value: object) -> str:
    """Short text only: what is as long as a token may be one, in the wrong place."""
    if isinstance(value, str) and len(value) >= TOKEN_LENGTH:
        return f"text of {len(value)} characters"
    return show(value)


def _find_mend(loc: tuple[str | int, ...], kind: str) -> str:
    path = render_path(loc).replace("(file)", "(seed)")
    *way, last = loc or ("",)
    if kind == "extra_forbidden":
        known = list(find_keys(tuple(way)))
        return f"leave it out{suggest(str(last), known)}; known here: {', '.join(known)}"
    example = find_example(loc)
    return f"as in `{path}: {example}` ({GUIDE})" if example else f"see {GUIDE}"


def _find_model(loc: tuple[str | int, ...]) -> type[BaseModel] | None:
    """The model whose fields stand at ``loc``; places in a list don't count."""
    model: type[BaseModel] = SeedDocument
    for part in loc:
        if isinstance(part, int):
            continue
        field = next(
            (one for name, one in model.model_fields.items() if part == (one.alias or name)),
            None,
        )
        inner = _find_inner(field.annotation) if field else None
        if inner is None:
            return None
        model = inner
    return model


def _find_inner(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := _find_inner(one))), None)


def find_keys(loc: tuple[str | int, ...]) -> tuple[str, ...]:
    """The keys that are known at ``loc``."""
    model = _find_model(loc)
    if model is None:
        return ()
    return tuple(one.alias or name for name, one in model.model_fields.items())


def find_example(loc: tuple[str | int, ...]) -> str:
    """What the seed's declaration shows as a value there; empty for what has parts of its own."""
    names = [part for part in loc if isinstance(part, str)]
    if not names or (model := _find_model(tuple(names[:-1]))) is None:
        return ""
    for name, field in model.model_fields.items():
        if names[-1] == (field.alias or name) and field.examples:
            value = field.examples[0]
            return value if isinstance(value, str) else json.dumps(value)
    return ""
