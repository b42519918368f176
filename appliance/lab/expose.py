"""Let an unprivileged process read the program, wherever the tree and the interpreter are.

A clone under `/root`, or a Python there, can't be read by the user that `hairpin serve` runs as.
Nothing is copied and no mode is changed: the process gets a mount namespace of its own, in which
each directory that it may not enter is covered by an empty one that holds only what it needs,
read-only. (systemd's ProtectHome=tmpfs with BindReadOnlyPaths does the same.)

`main` runs as root, in a new mount namespace, with the arguments PATH... -- COMMAND...
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import structlog

import appliance
from appliance.lab.plan import ROOT
from appliance.lab.processes import MARKER
from steering.errors import HairpinError
from steering.run import run

# Not `-m`: the package imports this module before it would run.
LAUNCH = (sys.executable, "-c", "from appliance.lab.expose import main; main()")


def find_needed() -> tuple[Path, ...]:
    """What the program is read from: its packages, the engine's data, the interpreter."""
    root = Path(appliance.__file__).resolve().parent.parent
    needed = [root / "appliance", root / "steering", root / "suricata"]
    needed += [Path(sys.prefix), Path(sys.base_prefix).resolve()]
    return tuple(path for path in dict.fromkeys(needed) if path.exists())


def is_enterable(path: Path) -> bool:
    """Whether everybody may pass through a directory."""
    return bool(path.stat().st_mode & stat.S_IXOTH)


def find_covers(
    needed: Iterable[Path], enterable: Callable[[Path], bool]
) -> dict[Path, tuple[Path, ...]]:
    """The topmost directories that others can't enter, each with the needed paths below it."""
    covers: dict[Path, list[Path]] = {}
    for path in needed:
        for above in reversed(path.parents):
            if not enterable(above):
                covers.setdefault(above, []).append(path)
                break
    return {
        above: tuple(path for path in paths if not any(other in path.parents for other in paths))
        for above, paths in covers.items()
    }


def check_readable(needed: Iterable[Path]) -> None:
    """Raises HairpinError when a needed directory is itself closed to others (a strict umask)."""
    for path in needed:
        if not path.stat().st_mode & stat.S_IROTH or not is_enterable(path):
            raise HairpinError(
                f"{path} can't be read by the user that Hairpin runs as", "run `make setup`"
            )


def build_argv(argv: Sequence[str]) -> list[str]:
    """The command that runs ``argv`` able to read the program; ``argv`` itself if it already is."""
    needed = find_needed()
    check_readable(needed)
    if not find_covers(needed, is_enterable):
        return list(argv)
    unshare = ["unshare", "--mount", "--propagation", "private", "--"]
    return [*unshare, *LAUNCH, *map(str, needed), "--", *argv]


def _cover(directory: Path, needed: Sequence[Path]) -> None:
    # In the lab's directory, so that a killed start leaves nothing elsewhere.
    home = ROOT / os.environ[MARKER]
    with tempfile.TemporaryDirectory(prefix="cover-", dir=home) as stage:
        run(["mount", "-t", "tmpfs", "-o", "mode=0755,size=1m", "tmpfs", stage])
        for path in needed:
            place = Path(stage) / path.relative_to(directory)
            place.mkdir(parents=True, exist_ok=True)
            run(["mount", "--bind", str(path), str(place)])
            run(["mount", "-o", "remount,bind,ro", str(place)])
        run(["mount", "--move", stage, str(directory)])


def main() -> None:
    # What is printed belongs to the command that comes after.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    split = sys.argv.index("--")
    needed = [Path(path) for path in sys.argv[1:split]]
    argv = sys.argv[split + 1 :]
    os.umask(0o022)
    for directory, below in find_covers(needed, is_enterable).items():
        _cover(directory, below)
    os.execvp(argv[0], argv)  # noqa: S606 - becomes the process that the lab records
