"""`docs/pipeline.md` with its tables and flows filled in from the code.

python -m tests.support.pipeline_doc          rewrites the page
"""

from __future__ import annotations

import re
from pathlib import Path

from steering.compile import compile_program
from steering.decide import resolve_machines
from steering.flows import Flow, Program
from steering.model import (
    Family,
    Inspect,
    MachineRecord,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    Port,
    PortRange,
    Profile,
    Protocol,
    Service,
)
from steering.pipeline import CookieKind, Table, parse_cookie
from tests.support.worlds import CANARY, LANES, ZONES, build_port

APART = (CookieKind.CANARY, CookieKind.GHOST)  # what the page shows by itself, not in each table
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "pipeline.md"
ALL_PORTS = (Table.SENDER, Table.RECEIVER, Table.POLICY, Table.DELIVER)
_BLOCK = re.compile(
    r"<!-- (tables|groups|kind: [A-Z]+|flows: [A-Z ]+)[^>]*-->\n.*?<!-- end -->\n", re.DOTALL
)


def build_example() -> Program:
    """The example of the page: web-1 opens TCP port 80 to app-1, inspected, closed on failure."""
    ports = (build_port(1), build_port(2))
    records = (
        MachineRecord("vm-1", "web-1", {"tier": "web"}),
        MachineRecord("vm-2", "app-1", {"tier": "app"}),
    )
    policy = Policy(
        name="web-to-app",
        priority=100,
        sources=(Peer(zone="web"),),
        destinations=(Peer(zone="app"),),
        services=(Service(Protocol.TCP, (PortRange(80, 80),)),),
        families=(Family.IPV4,),
        action=Inspect(Profile.PREVENT, OnFailure.CLOSED),
    )
    policies = PolicySet(records, ZONES, (policy,))
    machines = resolve_machines(policies, ports)
    gone = Port("", 0, build_port(3).mac, "", "", "")
    return compile_program(policies, machines, LANES[:1], CANARY, (gone,))


def _is_told(flow: Flow) -> bool:
    """One port is enough to show what every port has, and one family of what both have."""
    other = re.search(r"in_port=2\b|00:02\b", flow.match) is not None
    return not ((other and flow.table not in ALL_PORTS) or is_of(flow, *APART))


def is_of(flow: Flow, *kinds: CookieKind) -> bool:
    owner = parse_cookie(flow.cookie)
    return owner is not None and owner[0] in kinds


def _render_block(what: str, program: Program) -> str:
    if what == "tables":
        return "".join(
            f"| {table.number} {table.name} | {table.value.decides} |\n" for table in Table
        )
    if what == "groups":
        return "\n" + "".join(f"    {group}\n" for group in program.groups) + "\n"
    if what.startswith("kind: "):
        kind = CookieKind[what.removeprefix("kind: ")]
        flows = [flow for flow in program.flows if is_of(flow, kind)]
        return "\n" + "".join(f"    {flow}\n" for flow in flows) + "\n"
    names = what.removeprefix("flows: ").split()
    flows = [flow for flow in program.flows if flow.table.name in names and _is_told(flow)]
    return "\n" + "".join(f"    {flow}\n" for flow in flows) + "\n"


def render_page(text: str) -> str:
    """The page with every block between a marker and `<!-- end -->` made anew."""
    program = build_example()

    def replace(found: re.Match[str]) -> str:
        head = found[0].splitlines()[0]
        return f"{head}\n{_render_block(found[1], program)}<!-- end -->\n"

    return _BLOCK.sub(replace, text)


if __name__ == "__main__":
    PAGE.write_text(render_page(PAGE.read_text()))
