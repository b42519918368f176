"""What the commands print: tables and JSON on stdout; errors, notes and progress on stderr.

On a terminal tables are drawn and coloured; elsewhere they are plain columns, never cut. Whatever
came from the network is cleaned of control characters first: an alert must not drive a terminal.
"""

from __future__ import annotations

import contextlib
import json
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steering.errors import HairpinError, WrongInput

JSON_WANTED: ContextVar[bool] = ContextVar("json_wanted", default=False)
"""Set by --json before a command runs, so that errors take the same form."""

_STYLES = {
    "blocked": "bold green",
    "inspected": "green",
    "inspect": "green",
    "ok": "green",
    "allowed": "bold red",
    "blind": "bold red",
    "fail": "bold red",
    "failing": "bold red",
    "partial": "yellow",
    "degraded": "yellow",
    "warn": "yellow",
    "unnamed": "yellow",
}
_KEPT_WHOLE = 20
_NO_CONTROL = {"Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"}


class OutputClosed(Exception):
    """Whoever read stdout has gone (as with `| head`)."""


def clean(value: object) -> str:
    """Text without control, format or unassigned characters (each shown as a dot)."""
    return "".join(
        "." if unicodedata.category(letter) in _NO_CONTROL else letter for letter in str(value)
    )


def print_line(text: str = "") -> None:
    """One line on stdout. Raises OutputClosed."""
    try:
        print(text, flush=True)
    except BrokenPipeError as fault:
        raise OutputClosed from fault


def print_note(text: str) -> None:
    """One line on stderr, for people."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def print_json(document: BaseModel | Mapping[str, Any], *, compact: bool = False) -> None:
    """A document as JSON: indented, or as one line."""
    value = (
        document.model_dump(mode="json", by_alias=True)
        if isinstance(document, BaseModel)
        else document
    )
    print_line(json.dumps(value, ensure_ascii=False, indent=None if compact else 2))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """Rows under a header; ``empty`` where there are none."""
    cells = [[clean("-" if cell in (None, "") else cell) for cell in row] for row in rows]
    if not cells:
        print_line(empty)
    elif sys.stdout.isatty():
        _draw_table(columns, cells)
    else:
        lines = [[column.upper() for column in columns], *cells]
        widths = [max(len(line[number]) for line in lines) for number in range(len(columns))]
        for line in lines:
            print_line(
                "  ".join(
                    cell.ljust(width) for cell, width in zip(line, widths, strict=True)
                ).rstrip()
            )


def _draw_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        longest = max(len(column), *(len(line[number]) for line in cells))
        # Times and numbers stay whole; long text is folded to what is left.
        table.add_column(column.upper(), overflow="fold", min_width=min(longest, _KEPT_WHOLE))
    for line in cells:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in line))
    try:
        Console().print(table, crop=False)
    except BrokenPipeError as fault:
        raise OutputClosed from fault


def render_time(moment: datetime | None) -> str:
    """UTC, to the second."""
    return "-" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def render_endpoint(address: str, port: int | None, name: str | None) -> str:
    """As in `web1 10.77.0.1:80`, `app1 [fd00::2]:80`."""
    shown = f"[{address}]" if ":" in address and port is not None else address
    shown += f":{port}" if port is not None else ""
    return f"{name} {shown}" if name else shown


@contextlib.contextmanager
def show_progress(text: str) -> Iterator[None]:
    """Tell that something takes its time: a spinner on a terminal, else one plain line.

    Nothing with --json: stderr then has problem documents and nothing else.
    """
    if JSON_WANTED.get():
        yield
    elif sys.stderr.isatty():
        with Console(stderr=True).status(Text(text)):
            yield
    else:
        print_note(f"{text} ...")
        yield


def print_error(error: HairpinError) -> None:
    """An error on stderr: a line, a line for each fault, and what to do next; or a problem document."""
    if JSON_WANTED.get():
        # Whoever makes no request need not wait for what makes them.
        from appliance.api.problems import build_error_problem
        from appliance.client import ServiceRefused

        problem = (
            error.problem
            if isinstance(error, ServiceRefused)
            else build_error_problem(error, had_body=True)
        )
        print_note(json.dumps(problem.model_dump(mode="json", by_alias=True), ensure_ascii=False))
        return
    if isinstance(error, WrongInput):
        count = len(error.faults)
        print_note(
            f"error: wrong input, {count} fault{'' if count == 1 else 's'}; nothing was changed"
        )
        for fault in error.faults:
            print_note(f"  {clean(fault.path)}: {clean(fault.reason)}")
    else:
        print_note(f"error: {clean(error.reason)}")
    if error.mend:
        print_note(f"  what to do: {clean(error.mend)}")
