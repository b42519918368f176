"""`docs/first-boot.md`, made from `appliance.firstboot.document`:

`python -m appliance.commands.seed_reference > docs/first-boot.md`
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from appliance.commands.settings_reference import Schema, find_sections, render_default, render_type
from appliance.firstboot.document import SeedDocument
from appliance.firstboot.offer import SEED_CREDENTIAL, SEED_LIMIT, SINGLES

TAKEN_OVER = ("rules", "store")
"""Sections that the settings file has as they are."""

EXAMPLE = """\
name: rack-12
management:
  mac: "52:54:00:10:00:01"
  address: 192.0.2.10/24
  gateway: 192.0.2.1
  dns: [192.0.2.53]
api:
  token: 7d1f6ad0c2b94e5f8a3c6b0e9d2f4a71    # your own: openssl rand -hex 32
  port: 8470
switch:
  ovsdb: ssl:192.0.2.2:6640
  openflow: ssl:192.0.2.2:6653
  bridge: br-int
  serverName: hv-1.example.org
  ca: |
    -----BEGIN CERTIFICATE-----
    (of the authority that `hairpin host prepare` made)
    -----END CERTIFICATE-----
  certificate: |
    -----BEGIN CERTIFICATE-----
    (issued by it for this appliance)
    -----END CERTIFICATE-----
  key: |
    -----BEGIN PRIVATE KEY-----
    (its key; or leave it out here and give the credential hairpin.switch-key)
    -----END PRIVATE KEY-----
lanes:
  - profile: prevent
    vlan: 101
    legA: {interface: leg-prevent-a, mac: "52:54:00:10:01:0a"}
    legB: {interface: leg-prevent-b, mac: "52:54:00:10:01:0b"}
canary:
  interface: hairpin-canary
  mac: "52:54:00:10:02:01"
rules:
  sources:
    - name: et/open
export:
  - name: siem
    host: siem.example.org
"""

_HEAD = """\
# First boot

Made from the program by `python -m appliance.commands.seed_reference`; a test compares them.

An appliance is configured by one document, its *seed*, which it reads at every boot (`hairpin firstboot`).
There is no login, no shell and no wizard. Whoever can give the VM its seed configures it: that is the
hypervisor's administrator, who could as well read its memory.

## How it is given

Either as a **systemd credential** `{seed}`, which QEMU and libvirt hand over without a disk:

    qemu-system-x86_64 ... -fw_cfg name=opt/io.systemd.credentials/{seed},file=rack-12.yaml

    <sysinfo type='fwcfg'>
      <entry name='opt/io.systemd.credentials/{seed}' file='/var/lib/hairpin-host/rack-12.yaml'/>
    </sysinfo>

QEMU's group must be able to read the file, and with AppArmor libvirt gives a VM none below `/etc`. QEMU reads it when
it starts: after a change shut the VM down and start it; `virsh reboot` boots with what was read.

or as a **NoCloud disk**: label `CIDATA`, iso9660 or vfat, a file `user-data` in which the seed stands under the
key `hairpin` (and nothing else: no cloud-init runs here), and `meta-data`, of which `local-hostname` is the
name where the seed has none. Both at once is a fault.

The same file does for both: a credential may have its seed under the key `hairpin`, too.

    xorriso -as mkisofs -V CIDATA -J -r -o rack-12.iso user-data meta-data

Single values may come as credentials of their own, so that secrets need not stand beside the rest, and one seed
serves many appliances:

| credential | stands for |
|---|---|
{singles}
A seed has {limit} KiB at most, is YAML or JSON, and is read strictly: unknown keys, keys given twice or without
a value, anchors, values of another type, and credentials `hairpin.*` that are not listed here are faults. Devices are
found by their MAC addresses, and those that the seed does not name get no address and stay down.

## What happens

{boots}
With a fault neither settings nor the seed's keys are left in place and no process of the product starts. The switch
does what each policy's `onFailure` says, since no engine answers BFD. The way back to an earlier state is an earlier
seed. `hairpin firstboot` ends with status 2, and what is wrong is shown, each fault with its path, its reason
and how to mend it:

- on the console, with name, version and addresses (`hairpin console-status`), which has the same place when all
  is well: health, its problems, the age of the rules, the fingerprint of the API's certificate;
- by `GET /health` and `GET /api/v1/health` on the API's port: 503, by HTTP, without a token, without a secret.
  The management network is configured for that if its own part of the seed has no fault, else it answers on
  loopback only;
- in `/run/hairpin-config/faults.json` and the journal.

A seed is a matter of the next boot: nothing changes while the appliance runs.

## The API's certificate

HTTPS is all that is served beyond loopback. A seed of `hairpin host prepare` has a certificate that its CA issued
(docs/deploy.md): clients need that CA. Else give `api.certificate` and `api.key`, or let the appliance make a
certificate that signs itself, once, for its name and address. Compare its fingerprint with the console's, keep
it, and name it to clients:

    openssl s_client -connect 192.0.2.10:8470 </dev/null | openssl x509 > rack-12.pem
    openssl x509 -in rack-12.pem -noout -fingerprint -sha256
    HAIRPIN_URL=https://192.0.2.10:8470 HAIRPIN_TOKEN_FILE=token HAIRPIN_CA_FILE=rack-12.pem hairpin health

With `management.dhcp` the address is not known beforehand: such a certificate is for the name alone.

## A seed

```yaml
"""


_BOOTS = {
    "a new or changed seed, all of it right": "it is in force: settings, certificates and network for this boot, "
    "and a copy in `/var/lib/hairpin-firstboot` (root only, with a digest)",
    "the same as before": "as before; a certificate that has expired since is told on the console, and stops "
    "nothing here",
    "none, and one was accepted before": "the copy is in force, and the console says so: a seed's disk is often "
    "taken away after the first boot",
    "none, and the copy is damaged": "a fault",
    "one that can't be read, or has a fault": "**nothing of it is in force, nor of the one before it**",
}


def render_reference() -> str:
    """The whole page, Markdown."""
    root = SeedDocument.model_json_schema(by_alias=True)
    singles = "".join(f"| `{name}` | `{'.'.join(way)}` |\n" for name, way in SINGLES.items())
    boots = "| at a boot | |\n|---|---|\n"
    boots += "".join(f"| {offered} | {done} |\n" for offered, done in _BOOTS.items())
    limit = SEED_LIMIT // 1024
    head = _HEAD.format(seed=SEED_CREDENTIAL, singles=singles, boots=boots, limit=limit)
    return f"{head}{EXAMPLE}```\n{''.join(_render_sections(root))}"


def _render_sections(root: Schema) -> Iterator[str]:
    parts: dict[str, tuple[Schema, list[str]]] = {}
    for path, part in find_sections("", root):
        if path.partition(".")[0].partition("[")[0] not in TAKEN_OVER:
            parts.setdefault(part["title"], (part, []))[1].append(path)
    for part, paths in parts.values():
        title = " and ".join(f"`{path}`" for path in paths if path) or "The seed"
        yield f"\n## {title}\n\n{part['description']}\n"
        yield "\n| key | type | default | as in | meaning |\n|---|---|---|---|---|\n"
        for key, value in part["properties"].items():
            yield _render_row(key, value, part, root)


def _render_row(key: str, value: Schema, part: Schema, root: Schema) -> str:
    needed = key in part.get("required", ())
    default = "must be given" if needed else render_default(value)
    return (
        f"| `{key}` | {render_type(value, root)} | {default} | {_render_example(value)} "
        f"| {value['description']} |\n"
    )


def _render_example(value: Schema) -> str:
    examples = value.get("examples")
    if not examples:
        return ""
    example = examples[0]
    text = example if isinstance(example, str) else json.dumps(example)
    return text if text.startswith("(") else f"`{text}`"


if __name__ == "__main__":
    print(render_reference(), end="")
