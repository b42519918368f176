"""A source as it was fetched -> its rule files, with bounds on everything. Nothing is ever unpacked.

Pure. Understands gzip'ed and plain tar, zip, and a bare rule file.
"""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zipfile
import zlib

from appliance.rules.model import RulesError

ARCHIVE_LIMIT = 64 * 2**20
UNPACKED_LIMIT = 192 * 2**20
MEMBER_LIMIT = 4_000
_ZIP_ENTRY = b"PK\x01\x02"


def _refuse(reason: str) -> RulesError:
    return RulesError(reason, "check what the source serves")


def _wanted(name: str) -> bool:
    return name.endswith(".rules") and not name.endswith("deleted.rules")


def _read_zip(data: bytes) -> list[tuple[str, bytes]]:
    files = []
    # Before it is opened: `zipfile` makes an object for each, half a gigabyte of a hostile archive's.
    if data.count(_ZIP_ENTRY) > MEMBER_LIMIT:
        raise _refuse(f"the archive has more than {MEMBER_LIMIT} files")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        left = UNPACKED_LIMIT
        for member in archive.infolist():
            if not _wanted(member.filename):
                continue
            with archive.open(member) as opened:
                content = opened.read(left + 1)
            left -= len(content)
            if left < 0:
                raise _refuse(f"the archive unpacks to more than {UNPACKED_LIMIT} bytes")
            files.append((member.filename, content))
    return files


def _read_tar(data: bytes) -> list[tuple[str, bytes]]:
    files = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for count, member in enumerate(archive):
            if count >= MEMBER_LIMIT:
                raise _refuse(f"the archive has more than {MEMBER_LIMIT} files")
            # A sparse member claims any size out of nothing.
            if not _wanted(member.name) or not member.isreg() or member.issparse():
                continue
            opened = archive.extractfile(member)
            if opened is not None:
                files.append((member.name, opened.read()))
    return files


def read_rule_files(data: bytes) -> list[tuple[str, bytes]]:
    """(name in the archive, content) of each rule file, in order of name.

    Raises RulesError when the archive is damaged or past a bound.
    """
    if len(data) > ARCHIVE_LIMIT:
        raise _refuse(f"the source is larger than {ARCHIVE_LIMIT} bytes")
    try:
        if data.startswith(b"PK\x03\x04"):
            return sorted(_read_zip(data))
        if data.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(data)) as opened:
                data = opened.read(UNPACKED_LIMIT + 1)
            if len(data) > UNPACKED_LIMIT:
                raise _refuse(f"the source unpacks to more than {UNPACKED_LIMIT} bytes")
        if data[257:262] == b"ustar":
            return sorted(_read_tar(data))
    except (
        EOFError, NotImplementedError, OSError, RuntimeError, ValueError, lzma.LZMAError, zlib.error,
        tarfile.TarError, zipfile.BadZipFile,
    ) as fault:  # fmt: skip
        raise _refuse(f"the source is damaged: {fault}") from fault
    return [("source.rules", data)]
