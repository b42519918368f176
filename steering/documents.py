"""Text -> decoded documents, and the reader that names every fault in them with its path.

Scalars follow the core schema of YAML 1.2 (chapter 10.3): `yes`, `on` and `22:22` are text, as they
would be in JSON. Anchors, aliases and explicit tags are refused: they serve no purpose here and are
how a small text becomes a huge one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, TypeVar

import yaml

from steering.errors import FieldError, WrongInput

MAX_TEXT_BYTES = 4 * 2**20
MAX_DOCUMENTS = 20_000
MAX_DEPTH = 16
MAX_FAULTS = 200
# Close matches are looked for in so many names only: difflib takes about 10 us for each.
MAX_NAMES_TO_COMPARE = 2_000

_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_TEXT_TAG = "tag:yaml.org,2002:str"
# Only what YAML 1.1 takes for a number too: writers of 1.1 leave `08` and `1e5` bare as text.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"([-+]?[0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?")
_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

Choice = TypeVar("Choice", bound=StrEnum)


class Decoded(dict[str, object]):
    """A mapping as it was written; ``duplicates`` are the keys that stood in it more than once."""

    duplicates: tuple[str, ...] = ()


def parse_text(text: str) -> list[object]:
    """The documents of a YAML stream or of one JSON text, empty ones left out.

    Raises WrongInput for the first thing that is not YAML or that is refused in it; its path is the
    place in the text (``line 3, column 5``).
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as fault:
        raise WrongInput([FieldError("(text)", "not Unicode: it has a lone surrogate")]) from fault
    if size > MAX_TEXT_BYTES:
        raise WrongInput(
            [FieldError("(text)", f"{size} bytes; at most {MAX_TEXT_BYTES} are read at once")]
        )
    text = text.removeprefix("\ufeff")
    if text.lstrip()[:1] == "{":
        try:
            document = json.loads(text, object_pairs_hook=build_mapping)
            _check_depth(document)
            return [document]
        except RecursionError as fault:
            raise _refuse_depth("(text)") from fault
        except ValueError:
            pass  # a YAML flow mapping also begins with a brace: YAML's reader has the last word
    try:
        return _build_documents(text)
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        place = "(text)" if mark is None else _find_place(mark)
        problem = getattr(fault, "problem", None) or str(fault).splitlines()[0]
        raise WrongInput([FieldError(place, f"not YAML: {problem}")]) from fault


def build_mapping(pairs: Iterable[tuple[str, object]]) -> Decoded:
    """For `json.loads` (``object_pairs_hook``)."""
    mapping, duplicates = Decoded(), []
    for key, value in pairs:
        if key in mapping:
            duplicates.append(key)
        mapping[key] = value
    mapping.duplicates = tuple(dict.fromkeys(duplicates))
    return mapping


def _find_place(mark: Any) -> str:
    # The two readers have a class of marks each, libyaml's without stubs.
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _refuse_depth(place: str) -> WrongInput:
    return WrongInput([FieldError(place, f"nested deeper than {MAX_DEPTH} levels")])


def _check_depth(value: object) -> None:
    """JSON's reader has no bound of its own, and who walks the document is bounded by the stack."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[object] = []
        for one in level:
            inner += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        if not inner:
            return
        level = inner
    raise _refuse_depth("(text)")


def _build_documents(text: str) -> list[object]:
    # Events, not nodes: composing nodes recurses in C, where deep nesting ends the process.
    documents: list[object] = []
    open_values: list[tuple[list[object], bool, str]] = []
    for event in yaml.parse(text, Loader=_LOADER):
        place = _find_place(event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise WrongInput([FieldError(place, "anchors and aliases are not taken: write it out")])
        value: object
        if isinstance(event, yaml.ScalarEvent):
            value = _build_scalar(event, place)
            if open_values and open_values[-1][1] and len(open_values[-1][0]) % 2 == 0:
                value = event.value  # a key is text, as in JSON
        elif isinstance(event, yaml.CollectionStartEvent):
            if event.tag is not None:
                raise WrongInput([FieldError(place, f"the tag {event.tag[:60]!r} is not taken")])
            if len(open_values) == MAX_DEPTH:
                raise _refuse_depth(place)
            open_values.append(([], isinstance(event, yaml.MappingStartEvent), place))
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            parts, is_mapping, place = open_values.pop()
            value = _pair(parts, place) if is_mapping else parts
        else:
            continue
        if open_values:
            open_values[-1][0].append(value)
        elif value is not None:
            documents.append(value)
            if len(documents) > MAX_DOCUMENTS:
                raise WrongInput([FieldError("(text)", f"more than {MAX_DOCUMENTS} documents")])
    return documents


def _pair(parts: Sequence[object], place: str) -> Decoded:
    pairs: list[tuple[str, object]] = []
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        if not isinstance(key, str):
            raise WrongInput([FieldError(place, "a key of this mapping is not text")])
        pairs.append((key, value))
    return build_mapping(pairs)


def _build_scalar(event: yaml.ScalarEvent, place: str) -> object:
    if event.tag not in (None, "!", _TEXT_TAG):
        raise WrongInput([FieldError(place, f"the tag {event.tag[:60]!r} is not taken")])
    text: str = event.value
    plain = event.tag is None and event.implicit[0]
    if not plain:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def find_nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like ``name``, if one is like it."""
    known = [other for _, other in zip(range(MAX_NAMES_TO_COMPARE), names, strict=False)]
    return next(iter(get_close_matches(name[:64], known, n=1)), None)


def suggest(name: str, names: Iterable[str]) -> str:
    """``; did you mean X?`` to add to a reason, or nothing."""
    nearest = find_nearest(name, names)
    return f"; did you mean {nearest}?" if nearest else ""


def show(value: object) -> str:
    """A value of the input as a reason may show it: short, printable, never a whole structure."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return ascii(value if len(value) <= 60 else value[:60] + "...")
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    # An int of JSON may have thousands of digits: Python refuses to print those.
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a huge number"
    return str(value)[:60]


def _show_key(key: object) -> str:
    text = str(key) if isinstance(key, str) else "?"
    return text if re.fullmatch(r"[A-Za-z0-9_./-]{1,64}", text) else ascii(text[:64])


class Faults:
    """Collects what is wrong, so that all of it is told at once; bounded, the rest is counted."""

    def __init__(self) -> None:
        self._faults: list[tuple[int, FieldError]] = []
        self._more = 0

    def add(self, item: int, path: str, reason: str) -> None:
        """``item`` is the number of the document, by which faults are sorted."""
        if len(self._faults) < MAX_FAULTS:
            self._faults.append((item, FieldError(path, reason)))
        else:
            self._more += 1

    @property
    def is_full(self) -> bool:
        return len(self._faults) >= MAX_FAULTS

    def raise_any(self) -> None:
        """Raise WrongInput if anything was added."""
        if not self._faults:
            return
        faults = [fault for _, fault in sorted(self._faults, key=lambda pair: pair[0])]
        if self._more:
            faults.append(FieldError("(text)", f"and {self._more} more faults"))
        raise WrongInput(faults)


class ItemReader:
    """Reads the values of one document. Every method returns None after naming what is wrong."""

    def __init__(self, faults: Faults, number: int) -> None:
        self._faults = faults
        self.number = number
        self.path = f"items[{number}]"
        self.label = ""

    def fault(self, path: str, reason: str) -> None:
        self._faults.add(self.number, path, f"{reason} ({self.label})" if self.label else reason)

    def suggest(self, name: str, names: Iterable[str]) -> str:
        """As the function of that name, while there is still room to tell a fault."""
        return "" if self._faults.is_full else suggest(name, names)

    def mapping(
        self, value: object, path: str, required: Sequence[str], optional: Sequence[str] = ()
    ) -> Mapping[str, object] | None:
        """A mapping with these keys. One with unknown or missing keys is returned all the same."""
        found = self.any_mapping(value, path)
        if found is None:
            return None
        known = (*required, *optional)
        for key in found:
            if key not in known:
                reason = f"unknown key{self.suggest(str(key), known)}"
                self.fault(f"{path}.{_show_key(key)}", reason)
        for key in required:
            if key not in found:
                self.fault(f"{path}.{key}", "is missing")
        return found

    def spec(
        self, item: Mapping[str, object], required: Sequence[str], optional: Sequence[str] = ()
    ) -> Mapping[str, object] | None:
        """The document's spec; that it is missing has been told by whoever read the document."""
        if "spec" not in item:
            return None
        return self.mapping(item["spec"], f"{self.path}.spec", required, optional)

    def any_mapping(self, value: object, path: str) -> Mapping[str, object] | None:
        if not isinstance(value, Mapping):
            self.fault(path, f"must be a mapping, not {show(value)}")
            return None
        for key in getattr(value, "duplicates", ()):
            self.fault(f"{path}.{_show_key(key)}", "stands here more than once")
        return value

    def sequence(
        self, value: object, path: str, limit: int, *, empty: bool = False
    ) -> Sequence[object] | None:
        if not isinstance(value, list | tuple):
            self.fault(path, f"must be a list, not {show(value)}")
        elif not value and not empty:
            self.fault(path, "must not be empty")
        elif len(value) > limit:
            self.fault(path, f"has {len(value)} entries; at most {limit} are taken")
        else:
            return value
        return None

    def text(self, value: object, path: str, pattern: re.Pattern[str], rule: str) -> str | None:
        """Text that matches ``pattern`` whole; ``rule`` says in words what it must be."""
        if not isinstance(value, str):
            quote = ": put it in quotes" if isinstance(value, bool | int | float) else ""
            self.fault(path, f"must be text, not {show(value)}{quote}")
        elif not pattern.fullmatch(value):
            self.fault(path, f"{show(value)} is not {rule}")
        else:
            return value
        return None

    def integer(self, value: object, path: str, lowest: int, highest: int) -> int | None:
        if not isinstance(value, int) or isinstance(value, bool):
            self.fault(path, f"must be a whole number, not {show(value)}")
        elif not lowest <= value <= highest:
            self.fault(path, f"{show(value)} is not between {lowest} and {highest}")
        else:
            return value
        return None

    def choice(self, value: object, path: str, choices: type[Choice]) -> Choice | None:
        names = [choice.value for choice in choices]
        if isinstance(value, str) and value in names:
            return choices(value)
        near = self.suggest(value, names) if isinstance(value, str) else ""
        self.fault(path, f"must be one of {', '.join(names)}, not {show(value)}{near}")
        return None
