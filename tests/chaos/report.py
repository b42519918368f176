"""The campaign's table: printed, and written into `docs/reliability.md` between its markers.

`python -m tests.chaos.report [FILE]` takes `build/chaos.json` and this machine's description.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steering.run import run

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"


def render_figures(figures: Mapping[str, Any]) -> str:
    """`sent 4000, lost 3 ...`; what was missed is told elsewhere."""
    return ", ".join(
        f"{key} {json.dumps(value) if isinstance(value, (dict, list)) else value}"
        for key, value in figures.items()
        if key != "missed"
    )


def render_table(documents: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a person reads them on a terminal."""
    lines = []
    for row in documents:
        met = "met   " if row["met"] else "MISSED"
        lines.append(f"{met} {row['name']} ({row['mode']})")
        lines.append(f"       goal: {row['goal']}")
        lines.append(f"       {render_figures(row['figures'])}")
        lines += [f"       missed: {one}" for one in row["figures"].get("missed", ())]
    count = sum(bool(row["met"]) for row in documents)
    return "\n".join([*lines, f"{count} of {len(documents)} rows meet their goal"])


def render_markdown(documents: Sequence[Mapping[str, Any]], machine: str) -> str:
    """The same for the documentation."""
    met = sum(bool(row["met"]) for row in documents)
    lines = [f"{met} of {len(documents)} rows meet their goal. {machine}", ""]
    lines += ["| row | mode | goal | met | figures |", "|---|---|---|---|---|"]
    for row in documents:
        told = render_figures(row["figures"])
        if row["figures"].get("missed"):
            told += f"; **missed:** {'; '.join(row['figures']['missed'])}"
        cells = (row["name"], row["mode"], row["goal"], "yes" if row["met"] else "**no**", told)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def find_machine(now: float) -> str:
    """Date, processor, kernel and the versions of switch and engine, in one sentence."""
    text = Path("/proc/cpuinfo").read_text()
    model = next(iter(re.findall(r"model name\s*:\s*(.+)", text)), platform.machine())
    switch = run(["ovs-vswitchd", "--version"]).stdout.split()
    engine = re.search(r"(\d+\.\d+\.\d+)", run(["suricata", "-V"]).stdout)
    day = time.strftime("%Y-%m-%d", time.gmtime(now))
    return (
        f"Measured on {day}: {model.strip()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Open vSwitch {switch[3]} (userspace datapath), Suricata {engine[1] if engine else '?'}."
    )


def replace_between(text: str, new: str) -> str:
    """The page with ``new`` between its markers. Raises ValueError without them."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"{PAGE.name} lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def main() -> int:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/chaos.json"
    documents = json.loads(source.read_text())
    table = render_markdown(documents, find_machine(source.stat().st_mtime))
    PAGE.write_text(replace_between(PAGE.read_text(), table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
