"""What is asked of alerts."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from string import ascii_lowercase, ascii_uppercase

from appliance.alerts.model import Verdict
from steering.errors import FieldError, WrongInput

_SMALL = str.maketrans(ascii_uppercase, ascii_lowercase)


@dataclass(frozen=True, slots=True)
class AlertFilter:
    """All that are set must hold. VMs are named by name or vm-id; ``vm``, ``address`` and ``zone``
    fit either end; ``since`` (inclusive) and ``until`` (exclusive) are times of the packet;
    ``text`` is looked for in the signature, the URL and the payload, whatever the case of ASCII
    letters (`fold_text`)."""

    vm: str | None = None
    source_vm: str | None = None
    destination_vm: str | None = None
    address: str | None = None
    zone: str | None = None
    verdict: Verdict | None = None
    signature: int | None = None
    cve: str | None = None
    policy: str | None = None
    lane: str | None = None
    since: float | None = None
    until: float | None = None
    text: str | None = None


def fold_text(text: str) -> str:
    """ASCII letters made small and no others, as SQLite's `lower` and that of `bytes` do."""
    return text.translate(_SMALL)


def read_address(text: str) -> str:
    """As addresses are stored. Raises WrongInput when it is none."""
    try:
        return str(ip_address(text))
    except ValueError as fault:
        raise WrongInput([FieldError("address", str(fault))]) from fault
