"""The shortcut in the service host: what the packet mark says, and what an engine's library tells of it. Pure.

A packet's mark (32 bits): 8 to 15 the lane, 16 to 18 its *class* (the PCP of the tag that it came with,
`steering.shortcut`), 25 to 29 the *triggers* that the engine's rules set (24 + class), 31 the *final* bit.
Only the preloaded library sets that one, and the redirection on the legs looks at nothing else.

The library and `hairpin inspect` share a file of 64 bit words in the lane's directory. By it the
library is told until when it may let connections go, and tells what it did (native/hairpin_shortcut.c).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from appliance.inspection.publish import Shortcut, ShortcutState
from steering.model import Trigger
from steering.shortcut import PRIORITY_CODES

CLASS_SHIFT = 16
CLASS_MASK = 0x70000
TRIGGER_SHIFT = 24
FINAL = 0x8000_0000

STATE_SIZE = 4096
MAGIC = b"HAIRPIN1"
ALLOWED_SECONDS = 6.0
"""So long the library lets connections go after it was last allowed to; `inspect` says so every 2 s."""

_WORDS = struct.Struct("=8s13Q")
_UNTIL = struct.Struct("=Q")
UNTIL_AT = 8
"""Where in the file the time stands until which connections may be let go (CLOCK_MONOTONIC, ns)."""


def find_class_mark(trigger: Trigger) -> int:
    """The class bits of a packet whose policy has this trigger."""
    return PRIORITY_CODES[trigger] << CLASS_SHIFT


def find_trigger_mark(trigger: Trigger) -> int:
    """The bit that the engine sets once a connection may go for this reason."""
    return 1 << (TRIGGER_SHIFT + PRIORITY_CODES[trigger])


@dataclass(frozen=True, slots=True)
class LibraryFigures:
    """What the library of one engine counted since it was loaded; ``present``: connections it knows now."""

    until: int
    idle: int
    pid: int
    present: int
    entered: int
    returned: int
    renewed: int
    turned: int
    refused_full: int
    refused_mixed: int
    too_long: int
    wrapped: int
    repeated: int


def build_state_file(idle_seconds: int) -> bytes:
    """The whole file as it is before an engine starts: nothing may go yet."""
    return _WORDS.pack(MAGIC, 0, idle_seconds, *(0,) * 11).ljust(STATE_SIZE, b"\0")


def build_until(until: float) -> bytes:
    """``until``: seconds of CLOCK_MONOTONIC; 0: from now on nothing may go."""
    return _UNTIL.pack(int(until * 1e9))


def parse_state_file(content: bytes) -> LibraryFigures | None:
    """None for what is not such a file."""
    if len(content) < _WORDS.size or not content.startswith(MAGIC):
        return None
    return LibraryFigures(*_WORDS.unpack_from(content)[1:])


def find_shortcut(
    *,
    wanted: bool,
    built: bool,
    pid: int | None,
    figures: LibraryFigures | None,
    rules: bool,
    redirection: str,
) -> Shortcut:
    """``wanted``: the lane has a third leg; ``built``: the library is there; ``pid``: the engine's;
    ``rules``: its ruleset sets the marks; ``redirection``: why frames can't leave by leg C, else empty."""
    mine = figures if figures is not None and pid is not None and figures.pid == pid else None

    def tell(state: ShortcutState, reason: str = "") -> Shortcut:
        if mine is None:
            return Shortcut(state=state, reason=reason)
        return Shortcut(
            state=state,
            reason=reason,
            present=mine.present,
            entered=mine.entered,
            returned=mine.returned,
            renewed=mine.renewed,
            refused_full=mine.refused_full,
            refused_mixed=mine.refused_mixed,
            too_long=mine.too_long,
        )

    off = ShortcutState.OFF
    if not wanted:
        return tell(off, "the lane has no legC in the settings")
    if not built:
        return tell(off, "library: it was not built: run `make setup`")
    if redirection:
        return tell(off, redirection)
    if pid is None:
        return tell(off, "library: no engine runs")
    if mine is None:
        return tell(
            off, "library: the engine was started without it, or could not map its state file"
        )
    if not rules:
        return tell(off, "rules: the ruleset in force sets no marks: run `hairpin rules update`")
    if mine.entered == 0:
        return tell(ShortcutState.READY, "no connection was let go yet")
    return tell(ShortcutState.ON)
