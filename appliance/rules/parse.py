"""Rule text -> values, the way Suricata itself cuts it up (Suricata 7, chapter "Rules format").

Pure. Options end at a `;` that no backslash precedes, also inside quotes; option names and actions are
compared without case. Both are as in Suricata's parser: what this reads otherwise would be a hole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from appliance.rules.model import Rule, RuleInfo, Unparsed

# Suricata reads rule files 8,192 bytes at a time and takes the rest of a longer line for the next
# rule: a rule hidden there would be loaded unseen.
LINE_LIMIT = 8_190
_RULE = re.compile(r"(?P<action>[A-Za-z]+)\s+(?P<header>[^()]+)\((?P<options>.*)\)")
_OPTION_END = re.compile(r"(?<!\\);")
_NAME = re.compile(r"[a-z0-9_.-]+")
_SID = re.compile(r"\bsid\s*:\s*(\d{1,10})\s*;")
_CVE = re.compile(r"(?:CVE[_-])?(\d{4})[_-](\d{4,7})", re.IGNORECASE)
_LARGEST_ID = 2**32 - 1


def parse_rule(line: str) -> Rule | Unparsed:
    """One rule from one line (without its newline, not commented out)."""
    hint = _SID.search(line[:LINE_LIMIT])
    sid = int(hint[1]) if hint else None
    if len(line.encode(errors="replace")) > LINE_LIMIT:
        return Unparsed(f"longer than the {LINE_LIMIT} bytes that Suricata reads as one line", sid)
    if "\ufffd" in line or not line.replace("\t", " ").isprintable():
        return Unparsed("has control characters or is not UTF-8", sid)
    match = _RULE.fullmatch(line)
    if match is None:
        return Unparsed("is no rule", sid)
    *parts, rest = _OPTION_END.split(match["options"])
    if rest.strip():
        return Unparsed("its last option does not end in a semicolon", sid)
    options = []
    for part in parts:
        name, _, value = part.partition(":")
        name = name.strip().lower()
        if not _NAME.fullmatch(name):
            return Unparsed("has an option that is no name", sid)
        options.append((name, value.strip()))
    ids: dict[str, int] = {"gid": 1, "rev": 0}
    for name, value in options:
        if name in ("gid", "sid", "rev"):
            if name == "sid" and name in ids:
                return Unparsed("has two sids", sid)
            if not (value.isascii() and value.isdigit() and 0 < int(value) <= _LARGEST_ID):
                return Unparsed(f"{name} is not a number from 1 to {_LARGEST_ID}", sid)
            ids[name] = int(value)
    if "sid" not in ids:
        return Unparsed("has no sid", None)
    return Rule(
        text=line,
        action=match["action"].lower(),
        protocol=match["header"].split()[0].lower(),
        options=tuple(options),
        gid=ids["gid"],
        sid=ids["sid"],
        rev=ids["rev"],
    )


def parse_lines(data: bytes) -> Iterator[tuple[str, bool]]:
    """(rule line, enabled) of a rule file: continued lines joined, blank lines and prose left out.

    A line that is commented out is given when it may be a rule, with ``enabled`` False.
    """
    joined = b""
    for raw in data.split(b"\n"):
        raw = raw.rstrip(b"\r\t ")
        if raw.endswith(b"\\"):
            joined += raw[:-1] + b" "
            continue
        line = (joined + raw).decode(errors="replace").strip()
        joined = b""
        enabled = not line.startswith("#")
        text = line.lstrip("# \t")
        if text and (enabled or _RULE.fullmatch(text)):
            yield text, enabled
    if joined.strip():
        yield joined.decode(errors="replace").strip(), True


def parse_metadata(rule: Rule) -> tuple[tuple[str, str], ...]:
    """(key, value) of all its ``metadata`` options, keys in lower case."""
    found = []
    for name, value in rule.options:
        if name == "metadata":
            for item in value.split(","):
                key, _, said = item.strip().partition(" ")
                found.append((key.lower(), said.strip()))
    return tuple(found)


def parse_cve(text: str) -> str | None:
    """``CVE-2021-44228`` from the ways rules and people write it; None when it is none."""
    match = _CVE.fullmatch(text.strip())
    return f"CVE-{match[1]}-{match[2]}" if match else None


def build_info(rule: Rule, source: str) -> RuleInfo:
    metadata = parse_metadata(rule)
    named = [value for key, value in metadata if key == "cve"]
    named += [
        value.partition(",")[2]
        for name, value in rule.options
        if name == "reference" and value.lower().startswith("cve,")
    ]
    cves = dict.fromkeys(cve for name in named for cve in [parse_cve(name)] if cve)
    return RuleInfo(
        sid=rule.sid,
        gid=rule.gid,
        rev=rule.rev,
        action=rule.action,
        msg=rule.msg,
        cves=tuple(cves),
        products=tuple(
            value.replace("_", " ") for key, value in metadata if key == "affected_product"
        ),
        classtype=rule.find("classtype"),
        severity=next((value for key, value in metadata if key == "signature_severity"), ""),
        source=source,
        text=rule.text,
    )
