"""What the demonstration found, as values, and the words for it. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLUMNS = ("", "what", "expected", "seen", "ok")


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table: what was tried in which step, what should be seen, and what was."""

    step: str
    what: str
    expected: str
    seen: str
    ok: bool


def build_rows(checks: Sequence[Check]) -> list[list[str]]:
    """The cells of the table, in the order of `COLUMNS`."""
    return [
        [check.step, check.what, check.expected, check.seen, "ok" if check.ok else "fail"]
        for check in checks
    ]


def is_passed(checks: Sequence[Check]) -> bool:
    """Whether everything was as expected; nothing checked is nothing shown."""
    return bool(checks) and all(check.ok for check in checks)


def render_summary(checks: Sequence[Check], name: str = "demo") -> str:
    """The last line: `demo: PASS n/n` or `demo: FAIL n/m`, n of m checks being right."""
    word = "PASS" if is_passed(checks) else "FAIL"
    return f"{name}: {word} {sum(check.ok for check in checks)}/{len(checks)}"


def render_seconds(seconds: float | None) -> str:
    """As in `0.14 s`; `never` for None."""
    return "never" if seconds is None else f"{seconds:.2f} s"
