"""The benchmark's table: printed, and written into `docs/performance.md` with a plot beside it.

`python -m tests.bench.report [FILE]` takes `build/bench.json` and this machine's description.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from tests.bench.rows import Row
from tests.chaos.report import find_machine

__all__ = ["find_machine", "render_markdown", "render_plot", "render_table"]

ROOT = Path(__file__).resolve().parents[2]
PAGE, PLOT = ROOT / "docs/performance.md", ROOT / "docs/performance.svg"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"

_PLOT = """\
<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{{ height }}" font-family="sans-serif" font-size="12">
<rect width="720" height="{{ height }}" fill="#ffffff"/>
{%- for row in rows %}
<text x="10" y="{{ row.top }}" font-weight="bold">{{ row.name|e }} ({{ row.unit|e }})</text>
{%- for bar in row.bars %}
<text x="150" y="{{ bar.top + 11 }}" text-anchor="end">{{ bar.name|e }}</text>
<rect x="156" y="{{ bar.top }}" width="{{ bar.width }}" height="14" fill="{{ bar.fill }}"/>
<text x="{{ bar.width + 162 }}" y="{{ bar.top + 11 }}">{{ bar.value }}</text>
{%- endfor %}
{%- endfor %}
</svg>
"""


def format_value(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def render_table(rows: Sequence[Row]) -> str:
    """The rows as a person reads them on a terminal."""
    lines = []
    for row in rows:
        lines.append(f"{'met   ' if row.met else 'MISSED'} {row.name}")
        lines.append(f"       {format_value(row.value)} {row.unit}; goal: {row.goal}")
        told = [f"{name} {format_value(value)}" for name, value in row.peers.items()]
        told += [f"{name} {value:.2f}" for name, value in row.ratio.items()]
        lines.append(f"       {', '.join(told)}")
        lines += [f"       missed: {one}" for one in row.missed]
    met = sum(row.met for row in rows)
    return "\n".join([*lines, f"{met} of {len(rows)} rows meet their goal"])


def render_markdown(documents: Sequence[Mapping[str, Any]], machine: str) -> str:
    """The same for the documentation; every ratio is a median of the rounds' own ratios."""
    met = sum(bool(row["met"]) for row in documents)
    lines = [f"{met} of {len(documents)} rows meet their goal. {machine}", ""]
    lines += ["| row | Hairpin | others | ratios | goal | met |", "|---|---|---|---|---|---|"]
    for row in documents:
        peers = ", ".join(f"{name} {format_value(v)}" for name, v in row["peers"].items())
        ratio = ", ".join(f"{name} {value:.2f}" for name, value in row["ratio"].items())
        verdict = "yes" if row["met"] else f"**no**: {'; '.join(row['missed'])}"
        value = f"{format_value(row['value'])} {row['unit']}"
        cells = (row["name"], value, peers, ratio, row["goal"], verdict)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def render_plot(documents: Sequence[Mapping[str, Any]]) -> str:
    """Bars of the medians, one block a row (SVG 1.1)."""
    top, rows = 24, []
    for row in documents:
        figures = {"hairpin": row["value"], **row["peers"]}
        largest = max(figures.values(), default=0) or 1
        bars = [
            {
                "name": name,
                "top": top + 8 + 18 * number,
                "width": round(440 * max(value, 0) / largest),
                "value": format_value(value),
                "fill": "#2c6fbb" if name == "hairpin" else "#b8bec6",
            }
            for number, (name, value) in enumerate(figures.items())
        ]
        rows.append({"name": row["name"], "unit": row["unit"], "top": top, "bars": bars})
        top += 34 + 18 * len(bars)
    # XML made of our own names and numbers; what is text is escaped in the template.
    template = jinja2.Environment(autoescape=False).from_string(_PLOT)  # noqa: S701
    return template.render(rows=rows, height=top)


def main() -> int:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/bench.json"
    documents = json.loads(source.read_text())
    text = PAGE.read_text()
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"{PAGE} lacks the markers {BEGIN} and {END}")
    table = render_markdown(documents, find_machine(source.stat().st_mtime))
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")
    PLOT.write_text(render_plot(documents))
    return 0


if __name__ == "__main__":
    sys.exit(main())
