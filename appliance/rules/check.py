"""What a rule from a source may do: alert or drop, and nothing else.

Pure. A rule feed is somebody else's text that ends up in a privileged process in the path of all
traffic; what would switch inspection off, run a program, or read or write files is left out and named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from appliance.rules.model import STARTER_SIDS, LeftOut, Rule, Unparsed
from appliance.rules.parse import parse_lines, parse_rule
from appliance.rules.shortcut import FLOWBITS, has_bypass, rewrite_bypass
from steering.model import Profile

RULE_LIMIT = 200_000
_ACTIONS = frozenset({"alert", "drop", "reject", "rejectsrc", "rejectdst", "rejectboth"})
_FORBIDDEN: Mapping[str, str] = {
    "nfq_set_mark": "sets packet marks, which steer traffic",
    "lua": "runs a script",
    "luajit": "runs a script",
    "luaxform": "runs a script",
    "filestore": "writes files",
    "replace": "rewrites traffic",
    "datarep": "reads files",
    "filemd5": "reads files",
    "filesha1": "reads files",
    "filesha256": "reads files",
}
_DATASET_FORBIDDEN = frozenset({"load", "save", "state", "memcap", "hashsize"})
_ACTION = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True, slots=True)
class SourceRules:
    """The rules of one source that passed the checks, each as ``alert``: the profile decides on drops.

    ``enabled`` and ``disabled`` (commented out by the source; suricata-update enables those whose
    flowbits others need) are lines; ``names`` is key -> message of the enabled ones.
    """

    name: str
    enabled: tuple[str, ...]
    disabled: tuple[str, ...]
    names: Mapping[str, str]
    left_out: tuple[LeftOut, ...]


def check_rule_line(line: str, starter: bool = False) -> Rule | Unparsed:
    """The rule in ``line``, or why it may not be loaded. ``starter``: it is one of our own.

    Own rules keep to the sids of STARTER_SIDS and all others keep out of them, so that no source can
    replace an own rule by one with a higher revision.
    """
    rule = parse_rule(line)
    if isinstance(rule, Unparsed):
        return rule
    if rule.action not in _ACTIONS:
        return Unparsed(f"action {rule.action} would let traffic pass or change logging", rule.sid)
    for name, value in rule.options:
        if reason := _FORBIDDEN.get(name):
            return Unparsed(f"option {name} {reason}", rule.sid)
        if name == "flowbits" and FLOWBITS in value.lower():
            return Unparsed(f"flowbits that begin with {FLOWBITS} let connections go", rule.sid)
        if name == "dataset":
            words = {item.split()[0].lower() for item in value.split(",") if item.strip()}
            if bad := sorted(words & _DATASET_FORBIDDEN):
                return Unparsed(f"option dataset with {', '.join(bad)}", rule.sid)
    if (rule.sid in STARTER_SIDS) is not starter:
        span = f"{STARTER_SIDS.start} to {STARTER_SIDS.stop - 1}"
        return Unparsed(
            f"starter rules have sids {span}" if starter else f"sids {span} are the starter rules'",
            rule.sid,
        )
    return rule


def build_with_action(rule: Rule, action: str) -> str:
    """The rule's text with another action."""
    return _ACTION.sub(action, rule.text, count=1)


def shorten(text: str, limit: int = 200) -> str:
    clean = "".join(char if char.isprintable() else "?" for char in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def build_source(
    name: str, files: Iterable[tuple[str, bytes]], starter: bool = False
) -> SourceRules:
    """Check every rule of a source's files. Rules past RULE_LIMIT are left out."""
    enabled: list[str] = []
    disabled: list[str] = []
    names: dict[str, str] = {}
    left_out: list[LeftOut] = []
    for _, data in files:
        for line, wanted in parse_lines(data):
            if len(enabled) + len(disabled) >= RULE_LIMIT:
                verdict: Rule | Unparsed = Unparsed(f"the source has more than {RULE_LIMIT} rules")
            else:
                verdict = check_rule_line(line, starter)
            if isinstance(verdict, Rule):
                (enabled if wanted else disabled).append(build_with_action(verdict, "alert"))
                if wanted:
                    names.setdefault(verdict.key, verdict.msg)
            elif wanted:
                left_out.append(LeftOut(verdict.sid, shorten(line), name, verdict.reason))
    return SourceRules(name, tuple(enabled), tuple(disabled), names, tuple(left_out))


def finish_rules(
    lines: Iterable[str], profile: Profile, *, shortcut: bool = False
) -> tuple[tuple[Rule, ...], list[LeftOut], list[LeftOut]]:
    """The merged ruleset in its final form, in order of gid and sid, what can't stay in it, and what was rewritten.

    suricata-update makes a rule silent when only its flowbits are needed, after it may have made a
    drop of it: a silent drop would kill traffic without a word, so it alerts (silently) instead.
    ``shortcut``: the lane has a third leg, so a rule with `bypass` says that a connection may go.
    """
    kept: dict[tuple[int, int], Rule] = {}
    left_out = []
    for line in lines:
        verdict = check_rule_line(line, parse_rule(line).sid in STARTER_SIDS)
        if isinstance(verdict, Unparsed):
            left_out.append(LeftOut(verdict.sid, shorten(line), "modify.conf", verdict.reason))
            continue
        action = "drop" if verdict.action != "alert" else "alert"
        if verdict.silent or profile is Profile.DETECT:
            action = "alert"
        if action != verdict.action:
            verdict = replace(verdict, action=action, text=build_with_action(verdict, action))
        kept[verdict.gid, verdict.sid] = verdict
    rewritten = []
    for key, rule in kept.items():
        if has_bypass(rule):
            kept[key] = rewrite_bypass(rule, shortcut=shortcut)
            marks = "nfq_set_mark:" in kept[key].text
            what = "sets the shortcut's mark instead" if marks else "was taken out"
            reason = f"its `bypass` {what}: the engine goes on inspecting"
            rewritten.append(LeftOut(rule.sid, rule.msg, "", reason))
    return tuple(kept[key] for key in sorted(kept)), left_out, rewritten
