"""The thin door to disks at rest: a raw image or a block device; a qcow2 by QEMU's own tools.

QEMU locks an image while a machine runs on it (bytes 100 to 299, `file-posix.c`). Here the same bytes are asked about
before reading and held while writing, so that neither is done to a machine that runs, and none starts meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import structlog

from appliance.image.model import Damaged, ImageError, Progress, Source
from steering.errors import CommandFailed, FieldError, WrongInput
from steering.run import run

log = structlog.get_logger("image")

QCOW2 = b"QFI\xfb"
CONVERT_SECONDS = 900.0
_QCOW2_HEADER = struct.Struct(">4sIQIIQI36xQ")
_QCOW2_DATA_FILE = 0x4
DISK_LIMIT = 16 * 2**40
"""Bytes that a disk may have: nobody waits for more to be read."""
_LOCKED = (100, 200)  # first byte and how many: QEMU's permissions, and what it shares
_FLOCK = struct.Struct("hhqqixxxx")
_WINDOW = 4 * 2**20


class Writable(Source, Protocol):
    def write(self, offset: int, data: bytes) -> None:
        """On the disk when it returns. Raises ImageError."""


class RawDisk:
    """A raw image or a block device that is open."""

    def __init__(self, handle: int, path: Path) -> None:
        self._handle = handle
        self._path = path
        self._size = os.lseek(handle, 0, os.SEEK_END)

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > self._size:
            raise Damaged(f"{size} bytes at {offset} lie outside of {self._path}")
        pieces = []
        try:
            while size:
                piece = os.pread(self._handle, size, offset)
                if not piece:
                    raise ImageError(f"{self._path} ends at {offset}", "it was cut meanwhile")
                pieces.append(piece)
                offset, size = offset + len(piece), size - len(piece)
        except OSError as fault:
            raise ImageError(f"{self._path}: {fault.strerror}", "check the disk") from fault
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, offset: int, data: bytes) -> None:
        if offset < 0 or offset + len(data) > self._size:
            raise ImageError(f"{self._path}: {len(data)} bytes at {offset} would grow it")
        log.debug("write", path=str(self._path), offset=offset, size=len(data))
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(self._handle, view, offset)
                view, offset = view[written:], offset + written
            os.fsync(self._handle)
        except OSError as fault:
            raise ImageError(f"{self._path}: {fault.strerror}", "check the disk") from fault


class Qcow2Disk:
    """A qcow2 by `qemu-img` and `qemu-io`, each of which takes QEMU's lock: for a few windows of it."""

    def __init__(self, path: Path, size: int, work: Path) -> None:
        self._path = path
        self._size = size
        self._work = work
        self._window: tuple[int, bytes] = (-1, b"")

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > self._size:
            raise Damaged(f"{size} bytes at {offset} lie outside of {self._path}")
        pieces = []
        while size:
            number, skip = divmod(offset, _WINDOW)
            if self._window[0] != number:
                self._window = (number, self._read_window(number))
            piece = self._window[1][skip : skip + size]
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)

    def _read_window(self, number: int) -> bytes:
        target = self._work / "window"
        target.unlink(missing_ok=True)
        wanted = min(_WINDOW, self._size - number * _WINDOW)
        # `qemu-img dd` counts from different places in different versions.
        name = str(self._path).replace(",", ",,")
        window = f"driver=raw,offset={number * _WINDOW},size={wanted},file.driver=qcow2"
        window += f",file.file.driver=file,file.file.filename={name}"
        argv = ["qemu-img", "convert", "--image-opts", "-O", "raw", window, str(target)]
        _run_qemu(argv, self._path)
        data = target.read_bytes()
        if len(data) < wanted:
            raise ImageError(f"qemu-img gave {len(data)} bytes of {wanted}")
        return data[:wanted]

    def write(self, offset: int, data: bytes) -> None:
        if offset < 0 or offset + len(data) > self._size:
            raise ImageError(f"{self._path}: {len(data)} bytes at {offset} would grow it")
        source = self._work / "written"
        source.write_bytes(data)
        self._window = (-1, b"")
        # Its own words may not have spaces: both names are made here.
        command = f"write -s {source} {offset} {len(data)}"
        _run_qemu(
            ["qemu-io", "-f", "qcow2", "-c", command, "-c", "flush", str(self._path)], self._path
        )


@contextlib.contextmanager
def open_to_read(path: Path, progress: Progress) -> Iterator[Source]:
    """The disk of an image that no machine runs on. A qcow2 is unpacked beside it, for so long.

    Raises WrongInput, ImageError.
    """
    path = path.absolute()  # QEMU takes others for options or protocols: `nbd:x`
    handle = _open(path, os.O_RDONLY)
    try:
        if not _is_qcow2(handle):
            _refuse_locked(handle, path)
            yield RawDisk(handle, path)
            return
        _refuse_linked(handle, path)
        _read_qcow2_size(path)
        with _make_room(path) as work:
            raw = Path(work) / "disk.raw"
            progress(f"unpacking {path}")
            _run_qemu(
                ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)], path
            )
            with open_device_to_read(raw) as unpacked:
                yield unpacked
    finally:
        os.close(handle)


def _make_room(path: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix=".hairpin-", dir=path.parent)
    except OSError as fault:
        raise ImageError(
            f"{path} can't be unpacked beside itself: {fault.strerror}",
            f"`qemu-img convert -O raw {path} NEW` where there is room",
        ) from fault


@contextlib.contextmanager
def open_device_to_read(path: Path) -> Iterator[Source]:
    """A block device or raw file as it is, whoever else has it. Raises WrongInput."""
    handle = _open(path, os.O_RDONLY)
    try:
        yield RawDisk(handle, path)
    finally:
        os.close(handle)


@contextlib.contextmanager
def open_part_to_read(path: Path) -> Iterator[Source]:
    """A file of a release, byte for byte: what is checked is what is written. Raises WrongInput.

    A qcow2 is not unpacked, and a link not followed: it may lead from a disk that was attached to any other.
    """
    handle = _open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise WrongInput([FieldError(str(path), "no file")])
        yield RawDisk(handle, path)
    finally:
        os.close(handle)


@contextlib.contextmanager
def open_to_write(path: Path) -> Iterator[Writable]:
    """The disk of an image that no machine runs on, and for a raw one none can start. Raises as `open_to_read`."""
    path = path.absolute()
    handle = _open(path, os.O_RDWR)
    try:
        if not _is_qcow2(handle):
            _lock(handle, path)
            yield RawDisk(handle, path)
            return
        _refuse_linked(handle, path)
        size = _read_qcow2_size(path)
        with tempfile.TemporaryDirectory(prefix="hairpin-image-") as work:
            yield Qcow2Disk(path, size, Path(work))
    finally:
        os.close(handle)


def _open(path: Path, how: int) -> int:
    try:
        handle = os.open(path, how | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as fault:
        raise WrongInput([FieldError(str(path), fault.strerror or str(fault))]) from fault
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
        os.close(handle)
        raise WrongInput([FieldError(str(path), "neither a file nor a block device")])
    return handle


def _is_qcow2(handle: int) -> bool:
    return os.pread(handle, 4, 0) == QCOW2


def _refuse_linked(handle: int, path: Path) -> None:
    """A qcow2 that would make QEMU open other files than itself: asked before QEMU is.

    By its header (docs/interop/qcow2): `qemu-img info` itself opens what a header names as its data file, of which
    QEMU before 9.1 took any description (CVE-2024-4467).
    """
    header = os.pread(handle, _QCOW2_HEADER.size, 0).ljust(_QCOW2_HEADER.size, b"\0")
    _, version, backing, _, _, size, encrypted, features = _QCOW2_HEADER.unpack(header)
    mend = "flatten it first: `qemu-img convert -O qcow2 IMAGE NEW`"
    if backing or encrypted or (version >= 3 and features & _QCOW2_DATA_FILE):
        raise ImageError(f"{path} is not whole in itself: it has another file behind it", mend)
    if size > DISK_LIMIT:
        raise ImageError(f"{path} is a disk of {size} bytes, more than {DISK_LIMIT}")


def _read_qcow2_size(path: Path) -> int:
    """As QEMU sees it. Refuses again what `_refuse_linked` does, by QEMU's own words."""
    told = _run_qemu(["qemu-img", "info", "-f", "qcow2", "--output=json", str(path)], path)
    try:
        document = json.loads(told)
        size = int(document["virtual-size"])
        more = document.get("format-specific", {}).get("data", {})
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise ImageError(f"qemu-img told nothing of {path}", "see `qemu-img info`") from fault
    if "backing-filename" in document or "data-file" in more or document.get("encrypted"):
        mend = "flatten it first: `qemu-img convert -O qcow2 IMAGE NEW`"
        raise ImageError(f"{path} is not whole in itself: it has another file behind it", mend)
    return size


def _run_qemu(argv: list[str], path: Path) -> str:
    try:
        return run(argv, timeout=CONVERT_SECONDS).stdout
    except CommandFailed as fault:
        if "lock" in fault.output.lower():
            raise _build_running(path) from fault
        if fault.status == 127:
            raise ImageError(
                f"{argv[0]} can't be run, which a qcow2 needs: {fault.output}",
                f"apt-get install qemu-utils; or `qemu-img convert -O raw {path} NEW` elsewhere",
            ) from fault
        raise _explain(argv[0], fault, path) from fault


def _explain(program: str, fault: CommandFailed, path: Path) -> ImageError:
    if fault.status is None:
        return ImageError(f"{program} took longer than {CONVERT_SECONDS:.0f} s for {path}")
    if os.strerror(errno.ENOSPC) in fault.output:
        return ImageError(
            f"there is no space left where {path} lies",
            f"free some, or `qemu-img convert -O raw {path} NEW` where there is room",
        )
    return ImageError(
        f"{path} is no whole qcow2, says {program}: {fault.output.strip()[-1000:]}",
        "take a whole copy; `qemu-img check` tells what is damaged",
    )


def _build_running(path: Path) -> ImageError:
    return ImageError(
        f"a virtual machine runs on {path}, or another program changes it", "stop it first"
    )


def _refuse_locked(handle: int, path: Path) -> None:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, *_LOCKED, 0)
    try:
        found = _FLOCK.unpack(fcntl.fcntl(handle, fcntl.F_OFD_GETLK, asked))
    except OSError:
        return  # a file system without locks: QEMU has none there either
    if found[0] != fcntl.F_UNLCK:
        raise _build_running(path)


def _lock(handle: int, path: Path) -> None:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, *_LOCKED, 0)
    try:
        fcntl.fcntl(handle, fcntl.F_OFD_SETLK, asked)
    except OSError as fault:
        if fault.errno in (errno.EAGAIN, errno.EACCES):
            raise _build_running(path) from fault
