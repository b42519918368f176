"""The table of the starter rules in docs/rules.md, from the rules themselves. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.rules.model import RuleInfo

BEGIN = "<!-- starter rules: begin -->"
END = "<!-- starter rules: end -->"


def render_table(rules: Sequence[RuleInfo]) -> str:
    """A Markdown table of the rules, in order of sid."""
    lines = ["| sid | rule | CVE | product |", "|---|---|---|---|"]
    for rule in sorted(rules, key=lambda one: one.sid):
        message = rule.msg.removeprefix("HAIRPIN ")
        cells = (str(rule.sid), message, ", ".join(rule.cves), ", ".join(rule.products))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render_document(text: str, table: str) -> str:
    """``text`` with the table between its two markers. Raises ValueError when they are not there."""
    head, _, rest = text.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        raise ValueError(f"no {BEGIN} ... {END} in the document")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"
