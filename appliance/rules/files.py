"""Files of rules: each replaced in one step; and notes, which are JSON files with a digest of their content.

How old rules are, and how many there should be, is told by notes. A damaged one is not read. One without a digest, of
a version before, is taken as it stands.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from appliance.rules.model import RulesError

_BEGIN, _MIDDLE, _END = b'{"sha256":"', b'","content":', b"}\n"
_DIGEST = 64


def read_bounded(path: Path, limit: int) -> bytes:
    """A whole file of at most ``limit`` bytes. Raises OSError, RulesError."""
    with open(path, "rb") as opened:
        data = opened.read(limit + 1)
    if len(data) > limit:
        raise RulesError(f"{path} is larger than {limit} bytes", "remove it")
    return data


def sync_directory(directory: Path) -> None:
    """What was renamed in it outlives a power cut. Raises OSError."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    """Replace a file in one step: a reader, and a crash, sees the old or the new one. Mode 0644."""
    fresh = path.with_name(f".{path.name}.new")
    with open(fresh, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
        os.fchmod(opened.fileno(), 0o644)
    fresh.replace(path)
    sync_directory(path.parent)


def render_note(content: bytes) -> bytes:
    digest = hashlib.sha256(content).hexdigest().encode()
    return _BEGIN + digest + _MIDDLE + content + _END


def parse_note(data: bytes) -> bytes:
    """The content. Raises ValueError when it is not what its digest says."""
    if not data.startswith(_BEGIN):
        return data
    head = len(_BEGIN) + _DIGEST + len(_MIDDLE)
    content = data[head : len(data) - len(_END)]
    if render_note(content) != data:
        raise ValueError("its content is not what its digest says")
    return content


def write_note(path: Path, content: bytes) -> None:
    """As `write_file`."""
    write_file(path, render_note(content))


def read_note(path: Path, limit: int) -> bytes:
    """The content, where the file has at most ``limit`` bytes. Raises OSError, RulesError."""
    data = read_bounded(path, limit)
    try:
        return parse_note(data)
    except ValueError as fault:
        raise RulesError(f"{path} is damaged: {fault}", "update the rules") from fault
