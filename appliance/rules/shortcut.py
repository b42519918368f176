"""The engine's own rules of the shortcut: they say of a connection that it may go, and never that it must. Pure.

Each only sets a bit in the packet's mark, on every packet from then on; none alerts or drops. What
becomes of it is decided behind the engine, and only for a policy that asked for just this trigger.
A rule of anybody's with `bypass` would make the engine itself stop looking, for every policy: it is rewritten.
"""

from __future__ import annotations

import re
from dataclasses import replace

from appliance.inspection.shortcut import find_trigger_mark
from appliance.rules.model import Rule
from steering.model import Trigger

FLOWBITS = "hairpin."
"""Flowbits of ours begin so; no source may use one."""
RULE_BIT, TLS_BIT = f"{FLOWBITS}rule", f"{FLOWBITS}tls"
_OPTION = re.compile(r".*?(?<!\\);")
"""One option with its end, as `parse` cuts them."""
FIRST_SID = 4_850_990  # below the canary's, among the starter rules', which no feed may use
SIZES = {
    Trigger.ONE_MEGABYTE: 10**6,
    Trigger.TEN_MEGABYTES: 10**7,
    Trigger.HUNDRED_MEGABYTES: 10**8,
}


def _mark(trigger: Trigger) -> str:
    mark = find_trigger_mark(trigger)
    return f"nfq_set_mark:0x{mark:x}/0x{mark:x}; noalert;"


def build_shortcut_rules(*, by_rule: bool = True) -> tuple[str, ...]:
    """Their lines; ``by_rule``: the ruleset has rules that had `bypass`.

    TLS: the server's first record of application data, which both versions send only when what can be
    read of the handshake is over (RFC 5246, RFC 8446 section 5.2).
    """
    bodies = [
        f'alert tcp any any -> any any (msg:"HAIRPIN shortcut after {trigger}"; flow:established; '
        f"stream_size:either,>,{size}; {_mark(trigger)}"
        for trigger, size in SIZES.items()
    ]
    bodies += [
        'alert tls any any -> any any (msg:"HAIRPIN TLS handshake over"; flow:established,to_client; '
        'frame:tls.hdr; content:"|17 03|"; startswith; '
        f"flowbits:set,{TLS_BIT}; noalert;",
        'alert tcp any any -> any any (msg:"HAIRPIN shortcut after the TLS handshake"; flow:established; '
        f"flowbits:isset,{TLS_BIT}; {_mark(Trigger.TLS_HANDSHAKE)}",
    ]
    if by_rule:
        bodies.append(
            'alert tcp any any -> any any (msg:"HAIRPIN shortcut by rule"; flow:established; '
            f"flowbits:isset,{RULE_BIT}; {_mark(Trigger.RULE)}"
        )
    return tuple(
        f"{body} classtype:not-suspicious; sid:{sid}; rev:1;)"
        for sid, body in enumerate(bodies, start=FIRST_SID)
    )


SHORTCUT_KEYS = frozenset(
    f"1:{sid}" for sid in range(FIRST_SID, FIRST_SID + len(build_shortcut_rules()))
)


def has_marks(text: str) -> bool:
    """Whether a ruleset, or its end, has the rules that every shortcut needs."""
    lines = set(text.splitlines())
    return all(line in lines for line in build_shortcut_rules(by_rule=False))


def rewrite_bypass(rule: Rule, *, shortcut: bool) -> Rule:
    """A rule without its `bypass`: with ``shortcut``, and unless it drops, it sets the mark of such rules instead.

    Suricata would stop inspecting the connection for every policy; so it goes on, and only where
    a policy's trigger is `rule` the connection may take the shortcut.
    """
    if not has_bypass(rule):
        return rule
    head, _, body = rule.text.partition("(")
    parts = _OPTION.findall(body.rpartition(")")[0])
    kept = "".join(part for part in parts if find_option_name(part) != "bypass")
    if shortcut and rule.action == "alert":
        mark = find_trigger_mark(Trigger.RULE)
        kept += f" nfq_set_mark:0x{mark:x}/0x{mark:x}; flowbits:set,{RULE_BIT};"
    options = tuple(option for option in rule.options if option[0] != "bypass")
    return replace(rule, text=f"{head}({kept.strip()})", options=options)


def find_option_name(part: str) -> str:
    """Of an option as it is written, e.g. ``Bypass : ;``: Suricata takes the name before a colon as well."""
    return part.rstrip(" \t;").partition(":")[0].strip(" \t").lower()


def has_bypass(rule: Rule) -> bool:
    return any(name == "bypass" for name, _ in rule.options)
