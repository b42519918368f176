"""Is the other end of a TLS connection to a switch who it should be, and are we; for who only asks."""

from __future__ import annotations

from typing import Literal

from steering.errors import SwitchError
from steering.switch.secure import check_openflow, check_ovsdb
from steering.tls import TlsFiles


def find_peer_fault(
    kind: Literal["ovsdb", "openflow"], target: str, tls: TlsFiles | None
) -> SwitchError | None:
    """What is wrong with the connection; None where nothing is, or it is not by TLS. Blocks for seconds."""
    if tls is None or not target.startswith("ssl:"):
        return None
    try:
        (check_ovsdb if kind == "ovsdb" else check_openflow)(target, tls)
    except SwitchError as fault:
        return fault
    return None
