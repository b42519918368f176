"""`docs/cli.md`, made from the program itself: `python -m appliance.commands.reference > docs/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal, get_args, get_origin

import typer.main

from appliance.cli import build_app

_HEAD = """\
# The command line

Made from the program by `python -m appliance.commands.reference`; a test compares them.

Exit statuses: 0 done; 1 refused or failed (also: `lab status` of a lab that is not whole, `doctor` with a
failing check, `health` of a failing service, `image verify` that finds a difference); 2 wrong input or usage,
nothing changed; 130 ended by Ctrl-C; 141 whoever read the output has gone. `lab exec` ends with the
command's own status.

Results go to stdout; errors, notes and progress to stderr. An error is a line `error: ...`, a line for each
fault with its path, and `what to do: ...`. On a terminal tables are drawn, elsewhere they are plain columns,
never cut; times are UTC.

With `--json` stdout carries one document of `docs/api.md` (`alerts --follow`: one alert a line), and errors are
problem documents (RFC 9457), one line on stderr. Wrong usage is always told in plain text.

Where the service is: `--url` and `--token-file`, else `HAIRPIN_URL` and `HAIRPIN_TOKEN_FILE`, else
`/etc/hairpin/client.json`, else that of an appliance, `/run/hairpin-config/client.json`, or of the running lab,
`/run/hairpin-lab/lab/client.json`, each `{"url": ..., "tokenFile": ...}`. What the certificate of `https://` is
checked with: the file that `HAIRPIN_CA_FILE` names, else `certificateFile` of that JSON (it must be this very one,
whatever its names), else its `caFile`, else the system's authorities; it can't be left unchecked.

`HAIRPIN_LOG` (debug, info, warning, error) sets what is logged to stderr.
"""

JSON_SHAPES = {
    "vms": "VmList",
    "canary": "LaneProofs",
    "coverage": "Coverage",
    "explain": "Explanation",
    "quarantine add": "QuarantineReport",
    "quarantine list": "QuarantineList",
    "quarantine remove": "QuarantineReport",
    "shun list": "ShunList",
    "shun remove": "ShunReport",
    "shortcut list": "ShortcutList",
    "shortcut return": "ShortcutReport",
    "alerts": "AlertPage; with `--id` AlertDetail; with `--follow` an Alert a line",
    "flows": "FlowPage",
    "events": "EventPage",
    "health": "Health",
    "policy check": "`machines`, `zones`, `policies` (counts), `checkedAgainstSwitch`, `reason`, "
    "`plan` (PlanReport or null)",
    "policy plan": "PlanReport",
    "policy apply": "PlanReport",
    "policy show": "PolicyDocuments",
    "rules update": "UpdateJob",
    "rules show": "RulesStatus; with a filter RulePage",
    "image verify": "`good`, `versions`, `serials`, `findings` (`place`, `status`, `detail`, `signer`), "
    "`notCompared`",
    "image sign": "`manifest`, `version`, `files`",
    "image refresh": "as `image rules`, with `loaded` (by profile) and `leftOut`",
    "image rules": "`serial`, `created`, `ageDays`, `rules`, `size`, `signer`, `sources`, `faults`",
    "image extract": "`version`, `rootHash`, `signer`, `files`, `written`",
    "image update": "as `image extract`",
    "image check": "`passed`, `trial`, `lacking`",
    "image boots": "`items`, each `version`, `running`, `state`, `left`, `done`, `failed`, `lacking`",
    "doctor": "`level`, `findings` (each `name`, `level`, `found`, `mend`)",
    "host prepare": "`title`, `script`, `applied`, `done` (commands and files), `domain` (XML), `seed`; holds "
    "private keys",
    "host restore": "as `host prepare`, without `domain` and `seed`",
    "lab up": "as `lab status`",
    "lab down": "`name`, `wasUp`",
    "lab status": "`name`, `standing`, `whole`, `phase`, `url`, `vms`, `lanes`, `processes`, `problems`",
    "version": "`version`, `python`",
}
"""What each command prints with --json; names are the API's documents."""


def render_reference() -> str:
    """The whole page, Markdown."""
    command = typer.main.get_command(build_app())
    return _HEAD + "".join(_render_command("", command))


def find_commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Each command that does something, with its name without `hairpin`."""
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    for child in children.values():
        yield from find_commands(f"{name} {child.name}".strip(), child)


def _render_command(name: str, command: Any) -> Iterator[str]:
    for full, leaf in find_commands(name, command):
        arguments = [one for one in leaf.params if one.param_type_name == "argument"]
        options = [one for one in leaf.params if one.param_type_name == "option"]
        usage = "".join(f" {one.metavar or one.name.upper()}" for one in arguments)
        yield f"\n## hairpin {full}{usage}\n\n{leaf.help}\n"
        if full in JSON_SHAPES:
            yield f"JSON: {JSON_SHAPES[full]}.\n"
        lines = [f"- `{one.metavar}`: {one.help}" for one in arguments]
        lines += [_render_option(one) for one in options if one.name != "help"]
        if lines:
            yield "\n" + "\n".join(lines) + "\n"


def _render_option(option: Any) -> str:
    names = "/".join([", ".join(option.opts), *option.secondary_opts])
    value = "" if option.is_flag else f" {option.metavar or _render_type(option)}"
    default = ""
    if option.required:
        default = " Required."
    elif not option.is_flag and option.default is not None:
        default = f" Default: {getattr(option.default, 'value', option.default)}."
    return f"- `{names}{value}`: {option.help}{default}"


def _render_type(option: Any) -> str:
    kind = option.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(one.value) for one in kind)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return "NUMBER" if kind is int else "TEXT"


if __name__ == "__main__":
    print(render_reference(), end="")
