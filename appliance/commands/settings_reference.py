"""`docs/settings.md`, made from `appliance.settings`:

`python -m appliance.commands.settings_reference > docs/settings.md`
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from appliance.settings import Settings

Schema = Mapping[str, Any]

_HEAD = """\
# Settings

Made from the program by `python -m appliance.commands.settings_reference`; a test compares them.

One YAML file for all processes of one appliance: `hairpin serve --config FILE`, and the same for `inspect`,
`observe` and `doctor`. Unknown keys, keys given twice, anchors and wrong values are refused, each with its path;
nothing is started then (exit status 2). Paths begin with `/`. A change takes effect when the processes are
started again.

A whole file, every key once:

```yaml
"""

EXAMPLE = """\
apiVersion: hairpin/v1
kind: Settings
name: rack-12
stateDir: /var/lib/hairpin
runDir: /run/hairpin
switch:
  ovsdb: ssl:192.0.2.10:6640
  bridge: br-int
  openflow: ssl:192.0.2.10:6653
  vswitchd: null
  tls:
    caFile: /etc/hairpin/switch/ca.pem
    certFile: /etc/hairpin/switch/appliance.pem
    keyFile: /etc/hairpin/switch/appliance.key
    serverName: hv-1.example.org
lanes:
  - profile: prevent
    vlan: 101
    queues: [0, 1]
    legA: {interface: leg-prevent-a, device: prevent-a}
    legB: {interface: leg-prevent-b, device: prevent-b}
    legC: {interface: leg-prevent-c, device: prevent-c}
  - profile: detect
    vlan: 102
    queues: [2]
    legA: {interface: leg-detect-a, device: detect-a}
    legB: {interface: leg-detect-b, device: detect-b}
    legC: {interface: leg-detect-c, device: detect-c}
inspection:
  user: hairpin-engine
  suricata: /usr/bin/suricata
  netns: null
  dialect: auto
  requireHyperscan: true
  superPackets: true
  pinned: true
  nice: -10
  eveLimitBytes: 268435456
canary:
  interface: hairpin-canary
  device: canary
  everySeconds: 30
rules:
  starter: true
  sources:
    - name: et/open
    - name: our-own
      url: file:///etc/hairpin/our-own.rules
  floor: 10
  staleAfterDays: 3
  updateEveryHours: 24
  bundle:
    device: /dev/disk/by-partlabel/hairpin-rules
    certificate: /usr/lib/hairpin/image.crt
    floor: 0
api:
  listen: 192.0.2.10
  port: 8470
  certFile: /etc/hairpin/api.pem
  keyFile: /etc/hairpin/api.key
  allowPlainHttp: false
  bodyLimitBytes: 4194304
export:
  - name: siem
    transport: tls
    host: siem.example.org
    port: 6514
    caFile: /etc/hairpin/siem-ca.pem
    certFile: /etc/hairpin/siem-client.pem
    keyFile: /etc/hairpin/siem-client.key
store:
  keepDays: 90
  keepBytes: 21474836480
  keepFlowRecords: 5000000
  partitionAlerts: 1000000
  partitionHours: 24
visibility:
  device: mirror0
  netns: null
  idleSeconds: 15
  activeSeconds: 60
"""
"""Every key of every section; a test holds it to that."""


def render_reference() -> str:
    """The whole page, Markdown."""
    root = Settings.model_json_schema(by_alias=True)
    paths: dict[str, list[str]] = {}
    parts: dict[str, Schema] = {}
    for path, part in find_sections("", root):
        paths.setdefault(part["title"], []).append(path)
        parts[part["title"]] = part
    sections = "".join(
        _render_section(" and ".join(f"`{path}`" for path in paths[title] if path), part, root)
        for title, part in parts.items()
    )
    return f"{_HEAD}{EXAMPLE}```\n{sections}"


def find_sections(
    path: str, schema: Schema, root: Schema | None = None
) -> Iterator[tuple[str, Schema]]:
    """Each mapping of the file with its path, as in ``lanes[].legA``; the whole file first."""
    root = schema if root is None else root
    yield path, schema
    for key, value in schema["properties"].items():
        optional = [("", one) for one in value.get("anyOf", ())]
        for suffix, inner in (("", value), ("[]", value.get("items", {})), *optional):
            if "$ref" in inner and "properties" in (part := _resolve(inner, root)):
                yield from find_sections(f"{path}.{key}{suffix}".removeprefix("."), part, root)


def _resolve(value: Schema, root: Schema) -> Schema:
    found: Schema = root["$defs"][value["$ref"].rpartition("/")[2]]
    return found


def _render_section(title: str, schema: Schema, root: Schema) -> str:
    lines = [f"\n## {title or 'The file'}\n\n{schema['description']}\n"]
    lines += ["\n| key | type | default | meaning |\n|---|---|---|---|\n"]
    for key, value in schema["properties"].items():
        default = (
            render_default(value) if key not in schema.get("required", ()) else "must be given"
        )
        lines.append(
            f"| `{key}` | {render_type(value, root)} | {default} | {value['description']} |\n"
        )
    return "".join(lines)


def render_default(value: Schema) -> str:
    """As a reader sees it: `its defaults` for a section, `none` where nothing stands for it."""
    if "default" not in value or value["default"] == {} or "$ref" in value:
        return "its defaults"
    default = value["default"]
    if default is None or default == []:
        return "none"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def render_type(value: Schema, root: Schema) -> str:
    """A value's type in words, with its bounds."""
    if "anyOf" in value:
        return " or ".join(
            render_type(one, root) for one in value["anyOf"] if one.get("type") != "null"
        )
    if "$ref" in value:
        value = _resolve(value, root)
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return " or ".join(f"`{one}`" for one in value["enum"])
    match value["type"]:
        case "object":
            return "mapping, below"
        case "array":
            some = _render_count(value.get("minItems"), value.get("maxItems"))
            return f"list{some} of: {render_type(value['items'], root)}"
        case "integer":
            return f"number{_render_range(value.get('minimum'), value.get('maximum'))}"
        case "boolean":
            return "`true` or `false`"
        case "string" if value.get("format") == "path":
            return "path"
        case "string":
            return "text"
    raise ValueError(f"no name for the type of {value}")


def _render_range(low: int | None, high: int | None) -> str:
    if low is None:
        return "" if high is None else f" up to {high}"
    return f", {low} or more" if high is None else f", {low} to {high}"


def _render_count(low: int | None, high: int | None) -> str:
    return "" if low is None and high is None else f" ({low or 0} to {high})"


if __name__ == "__main__":
    print(render_reference(), end="")
