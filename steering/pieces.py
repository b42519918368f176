"""A List document as the texts of its items: of one that was changed a little, most were read before. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

_SCALAR = r'"(?:apiVersion|kind)"\s*:\s*"[^"\\]*"'
_HEAD = re.compile(rf'\s*\{{\s*(?:{_SCALAR}\s*,\s*){{0,4}}"items"\s*:\s*(?=\[)')
_TAIL = re.compile(rf"(?:\s*,\s*{_SCALAR}){{0,4}}\s*\}}\s*")
_TAIL_CHARACTERS = 200
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True, slots=True)
class ListText:
    """``items``: each one's JSON; not looked into, so it may be wrong. ``rest``: the text with none of them."""

    items: tuple[bytes, ...]
    rest: str


def split_list(text: str) -> ListText | None:
    """The parts of JSON text that is an object of ``items`` and scalars beside; None for any other.

    Once each item and the rest are JSON, the whole is, with the same value.
    """
    head = _HEAD.match(text)
    end = text.rfind("]")
    if head is None or end < head.end() or len(text) - end > _TAIL_CHARACTERS:
        return None
    if _TAIL.fullmatch(text, end + 1) is None:
        return None
    try:
        # It is a whole array, or this fails: then nothing but an array stands between head and tail.
        found = _ITEMS.decode(text[head.end() : end + 1])
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        return None
    return ListText(tuple(map(bytes, found)), f"{head.group()}[]{text[end + 1 :]}")
