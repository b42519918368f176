"""The shell script of what is done on a host (POSIX sh and awk; ovs-vsctl, ovs-ofctl, ip, ss). Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator

from appliance.hosting.ops import (
    TAKEN_MEND,
    Await,
    Drop,
    Each,
    Folder,
    Look,
    Op,
    Put,
    Refuse,
    Run,
    Say,
    When,
    find_taken_reason,
)
from steering.errors import HairpinError

END = "END-OF-HAIRPIN-FILE"
_HEAD = """\
#!/bin/sh
# {title}
# Printed by `hairpin host`; needs no Hairpin here. Run as root; it can be run again.
set -eu
umask 077
refuse() {{ printf 'refused: %s; %s\\n' "$1" "$2" >&2; exit 1; }}
# look AWK COMMAND...: what it prints, through awk, without quotes. If it fails, so does the script.
look() {{ by=$1; shift; said=$("$@") || return 1; printf '%s\\n' "$said" | awk "$by" | tr -d '"'; }}
# drop FILE SIGN: remove it if its first line has the sign; another one is not ours.
drop() {{ [ ! -f "$1" ] || case "$(head -n 1 "$1")" in *"$2"*) rm -f "$1";; esac; }}
"""


def render_script(title: str, ops: Iterable[Op]) -> str:
    return _HEAD.format(title=title) + "".join(_render(ops, ""))


def _look(look: Look) -> str:
    """A command substitution; to be assigned, since only then its failure ends the script (`set -e`)."""
    return f"$(look {shlex.join((look.awk or '1', *look.argv))})"


def _render(ops: Iterable[Op], indent: str) -> Iterator[str]:
    for op in ops:
        for line in _render_op(op, indent):
            yield f"{line}\n"


def _render_op(op: Op, indent: str) -> Iterator[str]:
    match op:
        case Say(text):
            yield f"{indent}echo {shlex.quote(text)}"
        case Run(argv):
            yield f"{indent}{shlex.join(argv)} > /dev/null"
        case Each(look, argv):
            command = " ".join(
                '"$one"'.join(shlex.quote(part) if part else "" for part in word.split("{}"))
                for word in argv
            )
            yield f"{indent}got={_look(look)}"
            yield f"{indent}for one in $got; do {command} > /dev/null; done"
        case Refuse(reason, mend):
            yield f"{indent}refuse {shlex.quote(reason)} {shlex.quote(mend)}"
        case When(look, equals, then, otherwise):
            yield from _render_when(look, equals, then, otherwise, indent)
        case Await(look, seconds, reason, mend):
            yield f"{indent}tries=0 got={_look(look)}"
            yield f'{indent}until [ -n "$got" ]; do'
            yield f"{indent}    tries=$((tries + 1))"
            yield (
                f"{indent}    [ $tries -lt {seconds * 5} ] || "
                f"refuse {shlex.quote(reason)} {shlex.quote(mend)}"
            )
            yield f"{indent}    sleep 0.2"
            yield f"{indent}    got={_look(look)}"
            yield f"{indent}done"
        case Folder(path, like):
            quoted = shlex.quote(path)
            own = f" chown --reference={shlex.quote(like)} {quoted};" if like else ""
            yield f"{indent}[ -d {quoted} ] || {{ (umask 022; mkdir -p {quoted});{own} }}"
        case Put():
            yield from _render_put(op, indent)
        case Drop(paths, folder, sign):
            for one in paths:
                path, beside = shlex.quote(one), shlex.quote(f"{one}.new")
                yield f"{indent}drop {path} {shlex.quote(sign)}"
                yield f"{indent}[ -s {beside} ] || rm -f {beside}"
                yield f"{indent}drop {beside} {shlex.quote(sign)}"
            quoted = shlex.quote(folder)
            yield f"{indent}[ ! -d {quoted} ] || rmdir --ignore-fail-on-non-empty {quoted}"


def _render_when(
    look: Look, equals: str, then: tuple[Op, ...], otherwise: tuple[Op, ...], indent: str
) -> Iterator[str]:
    deeper = indent + "    "
    sign, first, second = ("=", then, otherwise) if then else ("!=", otherwise, ())
    yield f"{indent}got={_look(look)}"
    yield f'{indent}if [ "$got" {sign} {shlex.quote(equals)} ]; then'
    yield from (line.rstrip("\n") for line in _render(first, deeper))
    if second:
        yield f"{indent}else"
        yield from (line.rstrip("\n") for line in _render(second, deeper))
    yield f"{indent}fi"


def _render_put(put: Put, indent: str) -> Iterator[str]:
    """The text goes by a here-document, so that no private key is ever an argument of a process."""
    path, temporary = shlex.quote(put.path), shlex.quote(f"{put.path}.new")
    if END in put.text:
        raise HairpinError(f"a text for {put.path} can't stand in a script", "issue it anew")
    # The folder may be another user's, who could put a link in the way: only a new file is written to.
    yield f"{indent}rm -f {temporary}"
    yield f"{indent}(set -C; cat > {temporary}) <<'{END}'"
    yield put.text.rstrip("\n")
    yield END
    if put.ours is not None:
        yield f"{indent}got={_look(put.ours)}"
    fine = f"[ ! -e {path} ] || cmp -s {temporary} {path}"
    if put.ours is not None:
        fine += f' || [ "$got" = {shlex.quote(put.equals)} ]'
    reason, mend = shlex.quote(find_taken_reason(put)), shlex.quote(TAKEN_MEND)
    yield f"{indent}{fine} || {{ rm -f {temporary}; refuse {reason} {mend}; }}"
    if put.like:
        yield f"{indent}chown -h --reference={shlex.quote(put.like)} {temporary}"
    if put.group:
        yield f"{indent}chgrp {shlex.quote(put.group)} {temporary}"
    yield f"{indent}chmod {put.mode:04o} {temporary}"
    yield f"{indent}mv {temporary} {path}"
