"""GUID partition tables (UEFI specification 2.10, chapter 5): both copies, their checksums, the MBR. Pure."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from appliance.image.model import SECTOR, Damaged, Part, Source

ENTRY_LIMIT = 1024
_ENTRY = struct.Struct("<16s16sQQQ72s")
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_NO_TYPE = bytes(16)
_MBR_TABLE = 446


@dataclass(frozen=True, slots=True)
class Partition:
    """One entry. ``number`` from 1, ``first`` and ``last`` are sectors, GUIDs are lower case text."""

    number: int
    type: str
    guid: str
    first: int
    last: int
    attributes: int
    name: str

    @property
    def offset(self) -> int:
        return self.first * SECTOR

    @property
    def size(self) -> int:
        return (self.last - self.first + 1) * SECTOR

    def of(self, disk: Source) -> Part:
        return Part(disk, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class Table:
    """A disk's partitions, and what is wrong with what tells of them.

    ``spans`` are (offset, size) of everything that the table itself takes, ``raw`` its bytes (of the copies that
    can be read). ``whole``: both copies are, and agree.
    ``enlarged``: the disk has got larger since, which the next boot takes note of (systemd-repart).
    """

    guid: str
    partitions: tuple[Partition, ...]
    spans: tuple[tuple[int, int], ...]
    faults: tuple[str, ...]
    whole: bool
    enlarged: bool
    raw: bytes


@dataclass(frozen=True, slots=True)
class _Copy:
    header: bytes
    own: int
    other: int
    first_usable: int
    last_usable: int
    guid: bytes
    entries_at: int
    count: int
    entries: bytes

    @property
    def entry_sectors(self) -> int:
        return -(-len(self.entries) // SECTOR)


def read_table(disk: Source) -> Table:
    """Raises Damaged where neither copy is whole, or partitions overlap."""
    sectors = disk.size // SECTOR
    if sectors < 6:
        raise Damaged(f"{disk.size} bytes are too few for a disk")
    faults: list[str] = []
    first = _try_copy(disk, "first", 1, sectors, faults)
    # Where the first says; at the end of the disk where it can't be asked.
    end = first.other if first else sectors - 1
    second = _try_copy(disk, "second", end, sectors, faults)
    told = first or second
    if told is None:
        raise Damaged("; ".join(faults))
    whole = first is not None and second is not None and _agree(first, second)
    if not whole and not faults:
        faults.append("the two partition tables differ")
    spans = [(0, 2 * SECTOR), (end * SECTOR, SECTOR)]
    # A copy that is damaged still has its place, by the other one.
    starts = [first.entries_at if first else 2]
    starts.append(second.entries_at if second else end - told.entry_sectors)
    spans += [(start * SECTOR, told.entry_sectors * SECTOR) for start in starts]
    partitions = tuple(_parse_entries(told))
    _check_places(partitions, told, spans)
    mbr = disk.read(0, SECTOR)
    return Table(
        guid=_text(told.guid),
        partitions=partitions,
        spans=tuple(sorted(spans)),
        faults=(*_check_mbr(mbr, {end, sectors - 1}), *_check_numbers(partitions), *faults),
        whole=whole,
        enlarged=end != sectors - 1,
        raw=b"".join([mbr, *(one.header + one.entries for one in (first, second) if one)]),
    )


def _try_copy(disk: Source, name: str, at: int, sectors: int, faults: list[str]) -> _Copy | None:
    try:
        return _read_copy(disk, at, sectors)
    except Damaged as fault:
        faults.append(f"the {name} partition table is damaged: {fault.reason}")
        return None


def find_gaps(table: Table, size: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of all that lies in no partition and not in the table."""
    taken = sorted([*table.spans, *((one.offset, one.size) for one in table.partitions)])
    at = 0
    for start, length in taken:
        if start > at:
            yield at, start - at
        at = max(at, start + length)
    if at < size:
        yield at, size - at


def _check_mbr(sector: bytes, ends: set[int]) -> list[str]:
    faults = []
    if sector[510:] != b"\x55\xaa":
        faults.append("the protective MBR has no signature")
    entry = sector[_MBR_TABLE : _MBR_TABLE + 16]
    start, count = struct.unpack("<II", entry[8:])
    if entry[4] != 0xEE or start != 1 or count not in {*ends, 0xFFFFFFFF}:
        faults.append("the protective MBR does not protect the whole disk")
    if any(sector[_MBR_TABLE + 16 : 510]):
        faults.append("the protective MBR has further partitions")
    if any(sector[:440]) or any(sector[440:_MBR_TABLE]):
        faults.append("there is boot code in the MBR")
    return faults


def _read_copy(disk: Source, at: int, sectors: int) -> _Copy:
    sector = disk.read(at * SECTOR, SECTOR)
    (
        magic, revision, size, crc, _, own, other, first, last, guid, entries_at, count, entry_size, entries_crc,
    ) = _HEADER.unpack_from(sector)  # fmt: skip
    if magic != b"EFI PART" or revision != 0x10000 or size != _HEADER.size:
        raise Damaged("its header is not one")
    if zlib.crc32(sector[:16] + bytes(4) + sector[20:size]) != crc:
        raise Damaged("its header's checksum is wrong")
    if any(sector[size:]) or any(sector[20:24]):
        raise Damaged("its header is followed by other bytes")
    if own != at or entry_size != _ENTRY.size or not 0 < count <= ENTRY_LIMIT:
        raise Damaged("its header tells what can't be")
    if (
        not 2 <= first <= last < sectors
        or not 2 <= entries_at < sectors
        or not 1 <= other < sectors
    ):
        raise Damaged("its header names places outside of the disk")
    entries = disk.read(entries_at * SECTOR, count * entry_size)
    if zlib.crc32(entries) != entries_crc:
        raise Damaged("its entries' checksum is wrong")
    return _Copy(sector, own, other, first, last, guid, entries_at, count, entries)


def _agree(first: _Copy, second: _Copy) -> bool:
    return (
        first.entries == second.entries
        and first.guid == second.guid
        and (first.first_usable, first.last_usable) == (second.first_usable, second.last_usable)
        and (first.own, first.other) == (second.other, second.own)
    )


def _parse_entries(copy: _Copy) -> Iterator[Partition]:
    for number in range(copy.count):
        kind, guid, first, last, attributes, name = _ENTRY.unpack_from(
            copy.entries, number * _ENTRY.size
        )
        if kind == _NO_TYPE:
            continue
        text = name.decode("utf-16-le", errors="replace").split("\0", 1)[0]
        yield Partition(number + 1, _text(kind), _text(guid), first, last, attributes, text)


def _check_numbers(partitions: Sequence[Partition]) -> Iterator[str]:
    # A partition is looked for by its number: which of two is found is chance.
    seen: dict[str, int] = {}
    for one in partitions:
        if (other := seen.setdefault(one.guid, one.number)) != one.number:
            yield f"partitions {other} and {one.number} have the same GUID"


def _check_places(
    partitions: Sequence[Partition], copy: _Copy, spans: Sequence[tuple[int, int]]
) -> None:
    taken = [(start // SECTOR, (start + size) // SECTOR - 1) for start, size in spans]
    for one in sorted(partitions, key=lambda one: one.first):
        if not copy.first_usable <= one.first <= one.last <= copy.last_usable:
            raise Damaged(f"partition {one.number} lies outside of the disk's usable part")
        for first, last in taken:
            if one.first <= last and first <= one.last:
                raise Damaged(f"partition {one.number} overlaps another part of the disk")
        taken.append((one.first, one.last))


def _text(guid: bytes) -> str:
    return str(uuid.UUID(bytes_le=guid))
