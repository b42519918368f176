"""What the appliance's console shows. Pure: facts -> text, and whether it is worth showing again."""

from __future__ import annotations

import re
from dataclasses import dataclass

AGAIN_SECONDS = 600.0
"""After which a text that differs in its numbers only is shown again: counters move all the time."""
PROBLEMS_LIMIT = 20
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Trouble:
    reason: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class ConsoleFacts:
    """``addresses`` as in `ens3 192.0.2.10/24`; texts are empty where there is nothing to tell."""

    name: str
    version: str
    addresses: tuple[str, ...]
    health: str
    service: str = ""
    fingerprint: str = ""
    seed: str = ""
    rules: str = ""
    troubles: tuple[Trouble, ...] = ()


def render_console(facts: ConsoleFacts) -> str:
    """Lines for a terminal of 80 columns or more; the last one ends, too."""
    rows = [
        ("addresses", ", ".join(facts.addresses) or "none"),
        ("API", facts.service),
        ("", f"SHA-256 {facts.fingerprint}" if facts.fingerprint else ""),
        ("seed", facts.seed),
        ("rules", facts.rules),
        ("health", facts.health),
    ]
    lines = ["", f"=== Hairpin {facts.name}, version {facts.version} ==="]
    lines += [f"{key:<10} {value}" for key, value in rows if value]
    for trouble in facts.troubles[:PROBLEMS_LIMIT]:
        lines.append(f"  ! {trouble.reason}")
        if trouble.mend:
            lines.append(f"      to mend: {trouble.mend}")
    if (more := len(facts.troubles) - PROBLEMS_LIMIT) > 0:
        lines.append(f"  ! and {more} more")
    return "\n".join(lines) + "\n"


def is_news(shown: str, text: str, seconds: float) -> bool:
    """Whether ``text`` is to be shown, ``seconds`` after ``shown`` was."""
    if text == shown:
        return False
    same = _DIGITS.sub("0", text) == _DIGITS.sub("0", shown)
    return not same or seconds >= AGAIN_SECONDS
