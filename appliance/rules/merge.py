"""What a merge made of its sources: who owns which rule, what is missing, what changed. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from appliance.rules.check import SourceRules
from appliance.rules.model import Changed, LeftOut, Rule


def build_changed(before: Mapping[str, str], after: Mapping[str, str]) -> Changed:
    """Compare two rulesets given as key -> text."""
    both = before.keys() & after.keys()
    return Changed(
        added=len(after.keys() - before.keys()),
        removed=len(before.keys() - after.keys()),
        modified=sum(before[key] != after[key] for key in both),
    )


def build_keys(rules: Sequence[Rule], owners: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Source name -> keys of its rules."""
    found: dict[str, list[str]] = {}
    for rule in rules:
        found.setdefault(owners.get(rule.key, "flowbits"), []).append(rule.key)
    return {name: tuple(keys) for name, keys in found.items()}


def find_missing(
    sources: Sequence[SourceRules], merged: Mapping[str, Rule], named: frozenset[str]
) -> tuple[dict[str, str], list[LeftOut]]:
    """Key -> source of the merged rules, and what the merge left out without a word.

    ``named`` are keys that are accounted for already. Where two sources have one key the higher
    revision is in the ruleset; which source that came from is told by its text.
    """
    owners: dict[str, str] = {}
    texts: dict[str, list[tuple[str, str]]] = {}
    missing = []
    for source in sources:
        for key, message in source.names.items():
            if key in merged:
                owners.setdefault(key, source.name)
                texts.setdefault(key, []).append((source.name, message))
            elif key not in named:
                sid = int(key.partition(":")[2])
                reason = "disable.conf, or a variable or protocol that the engine does not have"
                missing.append(LeftOut(sid, message, source.name, reason))
    for key, claims in texts.items():
        if len(claims) > 1:
            message = merged[key].msg
            owners[key] = next((name for name, said in claims if said == message), claims[0][0])
            missing += [
                LeftOut(merged[key].sid, said, name, f"source {owners[key]} has the same sid")
                for name, said in claims
                if name != owners[key]
            ]
    return owners, missing
