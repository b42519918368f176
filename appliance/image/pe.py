"""EFI programs: sections, and the digest that an Authenticode signature covers. Pure.

Microsoft's "PE Format" and "Windows Authenticode Portable Executable Signature Format". Stricter than both: a file
has headers, then sections that don't overlap, then its signatures, and not one byte that the digest leaves out.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from appliance.image.model import Damaged, Source

SECTION_LIMIT = 96
HEADER_LIMIT = 2**20
CERTIFICATES_LIMIT = 2**20
SECTION_READ_LIMIT = 2**20
_CHUNK = 2**20
_SECURITY = 4
_PKCS = 2


@dataclass(frozen=True, slots=True)
class Section:
    """``offset`` and ``stored`` as in the file; ``used`` of them are the section's own, the rest fills up."""

    name: str
    offset: int
    stored: int
    used: int


@dataclass(frozen=True, slots=True)
class Program:
    """``signatures`` are PKCS #7, DER. ``covered`` are the (offset, size) that the digest is made over."""

    sections: tuple[Section, ...]
    signatures: tuple[bytes, ...]
    covered: tuple[tuple[int, int], ...]
    filled: int
    checksum: int

    def find(self, name: str) -> Section | None:
        return next((one for one in self.sections if one.name == name), None)


def parse_program(file: Source) -> Program:
    """Raises Damaged."""
    start = file.read(0, 64)
    if start[:2] != b"MZ":
        raise Damaged("it is no EFI program")
    (at,) = struct.unpack_from("<I", start, 60)
    head = file.read(at, 24)
    if head[:4] != b"PE\0\0":
        raise Damaged("it is no EFI program")
    count, optional_size = (
        struct.unpack_from("<H", head, 6)[0],
        struct.unpack_from("<H", head, 20)[0],
    )
    if not 0 < count <= SECTION_LIMIT:
        raise Damaged(f"it has {count} sections")
    optional_at = at + 24
    optional = file.read(optional_at, optional_size)
    if optional_size < 112 or struct.unpack_from("<H", optional)[0] != 0x20B:
        raise Damaged("it is no program of 64 bits")
    (header_size,) = struct.unpack_from("<I", optional, 60)
    (directories,) = struct.unpack_from("<I", optional, 108)
    if directories <= _SECURITY or 112 + 8 * directories > optional_size:
        raise Damaged("it has no place for a signature")
    table_at = optional_at + optional_size
    if not table_at + 40 * count <= header_size <= min(HEADER_LIMIT, file.size):
        raise Damaged("its headers don't fit")
    sections = tuple(_parse_sections(file.read(table_at, 40 * count), count))
    end = header_size
    for one in sorted((one for one in sections if one.stored), key=lambda one: one.offset):
        if one.offset < end or one.offset + one.stored > file.size:
            raise Damaged(f"its section {one.name} lies over another part of it")
        end = one.offset + one.stored
    security_at = optional_at + 112 + 8 * _SECURITY
    place, length = struct.unpack_from("<II", optional, 112 + 8 * _SECURITY)
    signatures: tuple[bytes, ...] = ()
    body = file.size
    if length:
        if place < end or place % 8 or place + length != file.size or length > CERTIFICATES_LIMIT:
            raise Damaged("its signatures are not at its end")
        signatures = tuple(_parse_certificates(file.read(place, length)))
        body = place
    checksum_at = optional_at + 64
    covered = (
        (0, checksum_at),
        (checksum_at + 4, security_at - checksum_at - 4),
        (security_at + 8, body - security_at - 8),
    )
    # What is signed is rounded up to 8 bytes by the signer, with zeros.
    (checksum,) = struct.unpack_from("<I", optional, 64)
    return Program(sections, signatures, covered, -body % 8, checksum)


def compute_digest(file: Source, program: Program, algorithm: str = "sha256") -> bytes:
    """The Authenticode digest. Sections in order of place and nothing between them: all bytes in a row."""
    digest = hashlib.new(algorithm)
    for offset, size in program.covered:
        for piece in _read_pieces(file, offset, size):
            digest.update(piece)
    digest.update(bytes(program.filled))
    return digest.digest()


def compute_checksum(file: Source) -> int:
    """The checksum of the optional header, which no signature covers, as it should be."""
    (at,) = struct.unpack_from("<I", file.read(60, 4))
    field = at + 24 + 64
    total = 0
    for offset, size in ((0, field), (field + 4, file.size - field - 4)):
        for piece in _read_pieces(file, offset, size):
            # A sum of 16-bit words with the carry added again is the number modulo 65,535.
            total += int.from_bytes(piece, "little") << (8 if offset % 2 else 0)
    return (total % 0xFFFF or 0xFFFF if total else 0) + file.size


def read_section(file: Source, program: Program, name: str) -> bytes:
    """The first MiB of a section; empty where there is none."""
    section = program.find(name)
    if section is None:
        return b""
    return file.read(section.offset, min(section.used, section.stored, SECTION_READ_LIMIT))


def _parse_sections(table: bytes, count: int) -> Iterator[Section]:
    for number in range(count):
        name, used, _, stored, offset = struct.unpack_from("<8sIIII", table, 40 * number)
        text = name.rstrip(b"\0").decode("ascii", errors="replace")
        yield Section(text, offset, stored, used)


def _parse_certificates(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 8 <= len(data):
        length, revision, kind = struct.unpack_from("<IHH", data, at)
        if length < 8 or at + length > len(data) or revision != 0x200 or kind != _PKCS:
            raise Damaged("its signatures are not of the form they should have")
        body = data[at + 8 : at + length]
        yield body[: _measure_der(body)]
        following = at + -(-length // 8) * 8
        if any(data[at + length : following]):
            break
        at = following
    if at < len(data):
        raise Damaged("its signatures are followed by other bytes")


def _measure_der(data: bytes) -> int:
    """How long the DER value at the start is, with its header; what follows must be filling."""
    if len(data) < 2 or data[0] != 0x30:
        raise Damaged("its signature is no PKCS #7")
    length, header = data[1], 2
    if length & 0x80:
        octets = length & 0x7F
        if not 0 < octets <= 4 or len(data) < 2 + octets:
            raise Damaged("its signature is no PKCS #7")
        length, header = int.from_bytes(data[2 : 2 + octets]), 2 + octets
    whole = header + length
    if whole > len(data) or any(data[whole:]) or len(data) - whole >= 8:
        raise Damaged("its signature is followed by other bytes")
    return whole


def _read_pieces(file: Source, offset: int, size: int) -> Iterator[bytes]:
    done = 0
    while done < size:
        piece = file.read(offset + done, min(_CHUNK, size - done))
        done += len(piece)
        yield piece
