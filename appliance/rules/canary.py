"""The canary's rule, the last of every ruleset. Pure.

Its content carries a token made from all other rules, so an engine that drops a canary with this
token runs exactly this ruleset, not an older one nor a part of it.
"""

from __future__ import annotations

import hashlib
import re

from steering.canary import HOSTILE, SID, build_rule

CANARY_KEY = f"1:{SID}"
_TOKEN = re.compile(rf'content:"{HOSTILE} ([0-9a-f]{{16}}) "')


def seal_rules(text: str) -> str:
    """The ruleset with its canary's rule behind it; ``text`` ends with a newline, or is empty."""
    token = hashlib.blake2s(text.encode(), digest_size=8).hexdigest()
    return f"{text}{build_rule(token)}\n"


def find_token(text: str) -> str | None:
    """The token of a ruleset as `seal_rules` made it; None when its last rule is no canary's."""
    last = text.rstrip("\n").rpartition("\n")[2]
    found = _TOKEN.search(last)
    return found[1] if found and last == build_rule(found[1]) else None
