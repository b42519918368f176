"""`hairpin host`: prepare a hypervisor for an appliance, and take it back."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.api.documents import ApiDocument
from appliance.commands import options
from appliance.commands.output import clean, print_json, print_line, print_note
from steering.errors import FieldError, HairpinError, WrongInput

if TYPE_CHECKING:
    from appliance.hosting.ops import Op
    from appliance.hosting.spec import HostSpec

app = typer.Typer(
    help="Prepare a hypervisor for the appliance, and take it back.", no_args_is_help=True
)

Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="What the host is like: host.yaml.")]
Keys = Annotated[
    Path | None,
    typer.Option("--keys", metavar="DIR", help="Where its keys are kept; ./hairpin-NAME if none."),
]
Apply = Annotated[
    bool, typer.Option("--apply", help="Do it, on this machine; without it, print a script.")
]


SPEC_LIMIT = 512 * 1024
"""Bytes of host.yaml that are read, as of a seed."""


class HostReport(ApiDocument):
    """What `hairpin host ... --json` prints. ``done`` is empty where the script was only printed.

    ``domain`` and ``seed`` are the service VM's XML and what it is told at first boot (a secret).
    """

    title: str
    script: str
    applied: bool
    done: tuple[str, ...]
    domain: str = ""
    seed: str = ""


@app.command("prepare")
def prepare(
    spec: Spec,
    keys: Keys = None,
    apply: Apply = False,
    renew: Annotated[
        bool, typer.Option("--renew", help="Issue both certificates anew, by the same CA.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Print (or do) what makes a host's switch ready: ports, listeners, certificates, the VM."""
    from appliance.hosting.keeping import find_folder, keep
    from appliance.hosting.plan import build_plan
    from appliance.hosting.spec import build_ports
    from appliance.hosting.vm import check_paths, check_seed, render_domain, render_seed

    host = _read_spec(spec)
    check_paths(host)
    # With a secret that stands for the one to come: nothing is issued for what can't be used.
    check_seed(host, build_ports(host, bytes(32)))
    folder = find_folder(host, keys)
    kept = keep(host, folder, time.time(), renewed=renew)
    ports = build_ports(host, kept.secret)
    domain = render_domain(host, ports)
    seed = render_seed(host, ports, kept.pki, kept.token)
    plan = build_plan(host, ports, kept.pki, domain, seed)
    if kept.issued:
        print_note(f"issued certificates in {clean(folder)}; keep this folder, and keep it secret")
    if not apply and not json:
        print_note("the script holds private keys: let nobody else read it")
    _carry_out(plan.title, plan.prepare, apply=apply, json=json, domain=domain, seed=seed)


@app.command("restore")
def restore(spec: Spec, apply: Apply = False, json: options.Json = False) -> None:
    """Print (or do) what takes it all back, from what the switch's database has recorded."""
    from appliance.hosting.plan import build_restore_plan

    plan = build_restore_plan(_read_spec(spec))
    _carry_out(plan.title, plan.restore, apply=apply, json=json)


def _read_spec(path: Path) -> HostSpec:
    from appliance.hosting.spec import parse_spec

    try:
        with open(path, "rb") as opened:
            data = opened.read(SPEC_LIMIT + 1)
        if len(data) > SPEC_LIMIT:
            raise WrongInput([FieldError(str(path), f"longer than {SPEC_LIMIT} bytes")])
        return parse_spec(data.decode())
    except OSError as fault:
        raise WrongInput([FieldError(str(path), fault.strerror or str(fault))]) from fault
    except UnicodeDecodeError as fault:
        raise WrongInput([FieldError(str(path), f"not UTF-8: {fault.reason}")]) from fault


def _carry_out(
    title: str,
    ops: tuple[Op, ...],
    *,
    apply: bool,
    json: bool,
    domain: str = "",
    seed: str = "",
) -> None:
    from appliance.hosting.door import carry_out
    from appliance.hosting.script import render_script

    done: tuple[str, ...] = ()
    if apply:
        if os.geteuid() != 0:
            raise HairpinError("only root may change the host's switch", "run it as root")
        done = carry_out(ops, print_note if json else print_line)
    script = render_script(title, ops)
    if json:
        report = HostReport(
            title=title, script=script, applied=apply, done=done, domain=domain, seed=seed
        )
        return print_json(report)
    if not apply:
        print_line(script.rstrip("\n"))
