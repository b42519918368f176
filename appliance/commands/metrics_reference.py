"""`docs/metrics.md`, made from the declarations: `python -m appliance.commands.metrics_reference`."""

from __future__ import annotations

from appliance.assurance.metrics import SPECS

_HEAD = """\
# Metrics

Made from the program by `python -m appliance.commands.metrics_reference`; a test compares them.

    curl -s -H "Authorization: Bearer $(cat /var/lib/hairpin/token)" http://127.0.0.1:8470/api/v1/metrics

Prometheus sends the token itself (`authorization: {credentials_file: ...}` in its `scrape_configs`). What to be
woken by: `hairpin_status{status="failing"} == 1`, `hairpin_canary_passed == 0`, `hairpin_balance_closes == 0`,
`hairpin_ledger_violations > 0`, `increase(hairpin_lane_uninspected_packets_total[5m]) > 0`, and the page
not answering.

| metric | kind | labels | meaning |
|---|---|---|---|
"""


def render_reference() -> str:
    """The whole page, Markdown."""
    rows = (
        f"| `{name}` | {spec.kind} | {', '.join(spec.labels)} | {spec.text} |\n"
        for name, spec in SPECS.items()
    )
    return f"{_HEAD}{''.join(rows)}"


if __name__ == "__main__":
    print(render_reference(), end="")
