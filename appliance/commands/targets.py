"""Where a command is to write: looked at before the work, and with nothing half done left there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from steering.errors import FieldError, HairpinError, WrongInput


@contextlib.contextmanager
def open_new(path: Path, image: Path) -> Iterator[Callable[[bytes], None]]:
    """What puts data at ``path``, at once and whole. Nothing stays where that, or the work before it, fails.

    Opened before ``image`` is measured, which may take minutes. Raises WrongInput where nothing can be written there.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        if path.is_dir():
            raise WrongInput([FieldError(str(path), "a directory")], "name a file by --output")
        if path.exists() and image.exists() and path.samefile(image):
            raise WrongInput([FieldError(str(path), "the image")], "name another file by --output")
        opened = open(fresh, "wb", buffering=0)  # noqa: SIM115 - closed below, with its faults
    except OSError as fault:
        raise WrongInput([FieldError(str(path), fault.strerror or str(fault))]) from fault

    def put(data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[opened.write(view) :]
            opened.close()
            fresh.replace(path)
        except OSError as fault:
            reason = f"{path} can't be written: {fault.strerror or fault}"
            raise HairpinError(reason, "make room, or name another file by --output") from fault

    try:
        yield put
    finally:
        with contextlib.suppress(OSError):
            opened.close()
        fresh.unlink(missing_ok=True)


def make_empty(directory: Path) -> None:
    """Raises WrongInput for a directory in which something is, before anything is written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        first = next(directory.iterdir(), None)
    except FileExistsError as fault:
        raise WrongInput([FieldError(str(directory), "no directory")]) from fault
    except OSError as fault:
        raise WrongInput([FieldError(str(directory), fault.strerror or str(fault))]) from fault
    if first is not None:
        reason = f"not empty: {first.name} is in it"
        raise WrongInput([FieldError(str(directory), reason)], "name another directory by --output")
