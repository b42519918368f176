"""The control group that holds nfstream's processes, so that every one of them can be ended.

Best effort: cgroup v2, else a v1 hierarchy, wherever a group can be made below our own. Without
one, the chain of parent-death signals and the process group remain (`appliance.visibility.meter`).
Source: cgroups(7), cgroup_namespaces(7).
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

# v1 hierarchies in which a group costs nothing; `name=systemd` has no controller at all.
_V1_WANTED = ("name=systemd", "pids", "freezer")
METER = "meter"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted cgroup hierarchy and our own group in it."""

    version: int
    base: Path


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


def parse_hierarchies(mountinfo: str, own: str) -> list[Hierarchy]:
    """Hierarchies to try, the best first, from /proc/self/mountinfo and /proc/self/cgroup."""
    paths: dict[str, str] = {}
    for line in own.splitlines():
        number, controllers, path = line.split(":", 2)
        for controller in controllers.split(",") if controllers else [f"v2-{number}"]:
            paths[controller] = path
    found: list[tuple[int, Hierarchy]] = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = [*after.split(" ", 2), "", ""][:3]
        fields = before.split(" ")
        if len(fields) < 5 or kind not in ("cgroup", "cgroup2"):
            continue
        root, point = _unescape(fields[3]), _unescape(fields[4])
        names = (
            ["v2-0"] if kind == "cgroup2" else [n for n in _V1_WANTED if n in options.split(",")]
        )
        for name in names:
            ours = paths.get(name)
            if ours is None or not (ours + "/").startswith(root.rstrip("/") + "/"):
                continue
            base = Path(point) / ours[len(root.rstrip("/")) :].lstrip("/")
            rank = 0 if kind == "cgroup2" else 1 + _V1_WANTED.index(name)
            found.append((rank, Hierarchy(2 if kind == "cgroup2" else 1, base)))
    return [hierarchy for _, hierarchy in sorted(found, key=lambda pair: pair[0])]


@dataclass(frozen=True, slots=True)
class Group:
    """``path`` holds the supervisor, ``path/meter`` nfstream's processes."""

    version: int
    path: Path

    @property
    def meter(self) -> Path:
        return self.path / METER

    def __str__(self) -> str:
        return f"cgroup{self.version} {self.path}"

    def read_members(self) -> list[int]:
        """The processes in the meter's group now."""
        try:
            return [int(line) for line in (self.meter / "cgroup.procs").read_text().split()]
        except FileNotFoundError:
            return []


def _give(path: Path, uid: int, gid: int) -> None:
    os.chown(path, uid, gid)
    for name in ("cgroup.procs", "cgroup.kill"):
        with contextlib.suppress(FileNotFoundError):
            os.chown(path / name, uid, gid)


def make_group(name: str, owner: tuple[int, int] | None) -> tuple[Group | None, list[str]]:
    """A group of this name below our own, with this process in it; else the reasons why not.

    ``owner`` (uid, gid) is who will manage it. Earlier empty groups of the name are used again.
    """
    reasons = []
    hierarchies = parse_hierarchies(
        Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text()
    )
    for hierarchy in hierarchies:
        # Started again by a process that is itself in the group: stay there.
        base = hierarchy.base.parent if hierarchy.base.name == name else hierarchy.base
        group = Group(hierarchy.version, base / name)
        try:
            group.meter.mkdir(parents=True, exist_ok=True)
            if owner is not None:
                _give(group.path, *owner)
                _give(group.meter, *owner)
            (group.path / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as fault:
            reasons.append(f"{group}: {fault.strerror}")
            continue
        return group, []
    return None, reasons or ["no control group hierarchy is mounted here"]


def remove_group(group: Group) -> None:
    """Leave the group and take its directories away, as far as that is allowed and they are empty.

    Only root may leave; under a service manager the group goes with the service's.
    """
    with contextlib.suppress(OSError):
        (group.path.parent / "cgroup.procs").write_text(str(os.getpid()))
    for path in (group.meter, group.path):
        with contextlib.suppress(OSError):
            path.rmdir()


def remove_groups(name: str) -> None:
    """Remove the empty groups that earlier observers of this name left below our own group."""
    for hierarchy in parse_hierarchies(
        Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text()
    ):
        group = Group(hierarchy.version, hierarchy.base / name)
        if group.path.is_dir():
            remove_group(group)
