"""What is done on a host, as values: the shell script and the door carry out the same ones.

A host's administrator may read and run the script where there is no Hairpin; `--apply` does it here. A test
holds both to the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Look:
    """What a command prints, without quotes and spaces around. ``awk``: a program its lines go through.

    A command that fails is a failure of the whole: never the same as one that prints nothing.
    """

    argv: tuple[str, ...]
    awk: str = ""


@dataclass(frozen=True, slots=True)
class Say:
    """A line for who watches."""

    text: str


@dataclass(frozen=True, slots=True)
class Run:
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Each:
    """Run ``argv`` once for every word that ``look`` gives, in place of ``{}``."""

    look: Look
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """End here; nothing further is done. Status 1."""

    reason: str
    mend: str


@dataclass(frozen=True, slots=True)
class When:
    """``then`` if ``look`` gives exactly ``equals``, else ``otherwise``."""

    look: Look
    equals: str
    then: tuple[Op, ...] = ()
    otherwise: tuple[Op, ...] = ()


@dataclass(frozen=True, slots=True)
class Await:
    """Look until it gives something, at most so many seconds; else refuse."""

    look: Look
    seconds: int
    reason: str
    mend: str


@dataclass(frozen=True, slots=True)
class Put:
    """A file, whole or not at all. Its owner is that of ``like``, or the group ``group``.

    One that is there with other contents is refused, unless ``ours`` gives ``equals``: then it is changed.
    """

    path: str
    mode: int
    text: str
    like: str = ""
    group: str = ""
    ours: Look | None = None
    equals: str = ""


TAKEN_MEND = "move it away, or run `hairpin host restore` if it is of an earlier plan"


def find_taken_reason(put: Put) -> str:
    """Why a file is not written."""
    return f"{put.path} is there already, with other contents"


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder, with those above it, that all may look into; its owner is that of ``like``. One that is there
    stays as it is: it may be anybody's."""

    path: str
    like: str = ""


@dataclass(frozen=True, slots=True)
class Drop:
    """Remove files whose first line has ``sign`` (others of that name are not ours), what a `Put` that was
    broken off left beside them, and then their folder if it is empty. What is not there is no fault."""

    paths: tuple[str, ...]
    folder: str
    sign: str


Op = Say | Run | Each | Refuse | When | Await | Put | Folder | Drop


@dataclass(frozen=True, slots=True)
class HostPlan:
    """``prepare`` and ``restore`` end by themselves where there is nothing (more) to do."""

    title: str
    prepare: tuple[Op, ...]
    restore: tuple[Op, ...]


def join(parts: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """ovs-vsctl's arguments for several commands in one transaction."""
    return tuple(word for part in parts for word in ("--", *part))[1:] if parts else ()
