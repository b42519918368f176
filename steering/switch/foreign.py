"""The door to flows that are not Hairpin's: `ovs-ofctl dump-flows` of the whole bridge, ours left out."""

from __future__ import annotations

import re

from steering.errors import CommandFailed, SwitchError
from steering.flows import FlowKey
from steering.pipeline import COOKIE_PREFIX
from steering.run import run
from steering.switch.openflow import VERSION, parse_flow_counter
from steering.tls import TlsFiles, find_options

MOST = 10_000  # foreign flows that are looked at
_COOKIE = re.compile(r"\bcookie=0x([0-9a-f]+),")
_IN_PORT = re.compile(r"(?:^|,)in_port=(\d+)(?:,|$)")


def read_foreign(target: str, tls: TlsFiles | None = None) -> list[tuple[FlowKey, str, str]]:
    """(key, ``in_port`` or "", text) of each flow that is not ours. Blocks. Raises SwitchError."""
    try:
        options = (*VERSION, *find_options(target, tls))
        done = run(["ovs-ofctl", *options, "dump-flows", "--no-stats", target], timeout=20)
    except CommandFailed as fault:
        raise SwitchError(f"the flows of {target} could not be read: {fault.reason}") from fault
    found: list[tuple[FlowKey, str, str]] = []
    for line in done.stdout.splitlines():
        if " actions=" not in line or _is_ours(line):
            continue
        if len(found) >= MOST:
            break
        found.append(parse_foreign(line))
    return found


def parse_foreign(line: str) -> tuple[FlowKey, str, str]:
    """One line of dump-flows. One that can't be read is taken for the worst: first in table 0."""
    text = line.strip()
    try:
        key = parse_flow_counter(line).flow.key
    except SwitchError:
        return FlowKey(0, 0xFFFF, ""), "", text
    port = _IN_PORT.search(key.match)
    return key, port[1] if port else "", text


def _is_ours(line: str) -> bool:
    found = _COOKIE.search(line)
    return found is not None and int(found[1], 16) >> 48 == COOKIE_PREFIX
