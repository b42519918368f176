"""Write the table of starter rules into docs/rules.md: `python -m tests.support.rule_table`."""

from __future__ import annotations

from pathlib import Path

from appliance.rules.docs import render_document, render_table
from appliance.rules.model import Rule
from appliance.rules.parse import build_info, parse_rule
from appliance.rules.sources import read_starter

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    source, _ = read_starter(ROOT / "suricata")
    rules = [rule for line in source.enabled if isinstance(rule := parse_rule(line), Rule)]
    page = ROOT / "docs/rules.md"
    table = render_table([build_info(rule, source.name) for rule in rules])
    page.write_text(render_document(page.read_text(), table))
