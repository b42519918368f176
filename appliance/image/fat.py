"""FAT16 and FAT32 as EFI system partitions have it (Microsoft's "FAT32 File System Specification" 1.03). Pure.

Stricter than a driver: what a driver would overlook or read in its own way (a cluster of two files, two files of
one name, copies that differ, a chain that is longer than its file) is a fault here, for what firmware reads of it and
what is checked must be the same bytes.
"""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from appliance.image.model import Damaged, Source, find_nonzero

FAT_LIMIT = 16 * 2**20
FILE_LIMIT = 4096
ENTRY_LIMIT = 65_536
DEPTH_LIMIT = 16
_DIRECTORY, _VOLUME, _LONG = 0x10, 0x08, 0x0F
_FREE, _BAD = 0, 0x0FFFFFF7


@dataclass(frozen=True, slots=True)
class Volume:
    """Where things are, in bytes from the start of the partition. ``table`` is the first FAT."""

    cluster_size: int
    clusters: int
    data_at: int
    root_at: int
    root_size: int
    root_cluster: int
    wide: bool
    table: array.array[int] = field(repr=False)


@dataclass(frozen=True, slots=True)
class File:
    """``path`` begins with /. ``clusters`` are its places, in order."""

    path: str
    size: int
    clusters: tuple[int, ...]
    cluster_size: int
    data_at: int
    disk: Source = field(repr=False)

    def read(self, offset: int, size: int) -> bytes:
        """A file is a source: exactly ``size`` bytes."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise Damaged(f"{size} bytes at {offset} lie outside of {self.path}")
        pieces = []
        while size:
            number, skip = divmod(offset, self.cluster_size)
            length = min(size, self.cluster_size - skip)
            # As many clusters in a row as there are.
            while length < size and number + 1 < len(self.clusters):
                if self.clusters[number + 1] != self.clusters[number] + 1:
                    break
                number += 1
                length = min(size, length + self.cluster_size)
            first = self.clusters[offset // self.cluster_size]
            at = self.data_at + (first - 2) * self.cluster_size + skip
            pieces.append(self.disk.read(at, length))
            offset, size = offset + length, size - length
        return b"".join(pieces)


@dataclass(frozen=True, slots=True)
class Tree:
    """All files of a volume, by path; ``faults`` are what firmware could read otherwise than it was read here.

    ``unused`` are offsets of bytes that are not zero and belong to no file.
    """

    files: tuple[File, ...]
    directories: tuple[str, ...]
    label: str
    faults: tuple[str, ...]
    unused: tuple[int, ...]


@dataclass(slots=True)
class _Reading:
    disk: Source
    volume: Volume
    files: list[File] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)
    label: str = ""
    faults: list[str] = field(default_factory=list)
    taken: bytearray = field(default_factory=bytearray)
    entries: int = 0


def read_tree(disk: Source) -> Tree:
    """Raises Damaged when it is no FAT, or so torn that its files can't be told."""
    volume, faults = _read_volume(disk)
    reading = _Reading(disk, volume, faults=faults, taken=bytearray(volume.clusters + 2))
    if volume.wide:
        root = _read_clusters(reading, _follow(reading, volume.root_cluster, "/"))
    else:
        root = disk.read(volume.root_at, volume.root_size)
    _read_directory(reading, root, "", 0)
    names = [one.path.upper() for one in reading.files] + [
        one.upper() for one in reading.directories
    ]
    if len(set(names)) != len(names):
        raise Damaged("two files have the same name")
    lost = sum(
        1
        for cluster in range(2, volume.clusters + 2)
        if volume.table[cluster] != _FREE and not reading.taken[cluster]
    )
    if lost:
        reading.faults.append(f"{lost} clusters are taken by no file")
    files = tuple(sorted(reading.files, key=lambda one: one.path))
    unused = tuple(_find_unused(reading, files))
    return Tree(
        files, tuple(sorted(reading.directories)), reading.label, tuple(reading.faults), unused
    )


def _read_volume(disk: Source) -> tuple[Volume, list[str]]:
    sector = disk.read(0, 512)
    size, per_cluster, reserved, copies, root_entries, small = struct.unpack_from(
        "<HBHBHH", sector, 11
    )
    (short_fat,) = struct.unpack_from("<H", sector, 22)
    (large,) = struct.unpack_from("<I", sector, 32)
    wide = short_fat == 0
    (long_fat,) = struct.unpack_from("<I", sector, 36)
    (root_cluster,) = struct.unpack_from("<I", sector, 44)
    if sector[510:] != b"\x55\xaa" or size not in (512, 1024, 2048, 4096):
        raise Damaged("it is no FAT")
    if per_cluster not in (1, 2, 4, 8, 16, 32, 64, 128) or not reserved or copies not in (1, 2):
        raise Damaged("it is no FAT")
    if wide == bool(root_entries):
        raise Damaged("it is neither FAT16 nor FAT32")
    fat_sectors = long_fat if wide else short_fat
    total = small or large
    root_size = -(-root_entries * 32 // size) * size
    data_at = (reserved + copies * fat_sectors) * size + root_size
    if total * size > disk.size or data_at >= total * size:
        raise Damaged("its volume is larger than its partition")
    cluster_size = per_cluster * size
    clusters = (total * size - data_at) // cluster_size
    width = 4 if wide else 2
    if not wide and not 4085 <= clusters < 65525:
        raise Damaged("it is neither FAT16 nor FAT32")
    if (clusters + 2) * width > fat_sectors * size or fat_sectors * size > FAT_LIMIT:
        raise Damaged("its table does not fit")
    faults = []
    tables = [
        disk.read((reserved + number * fat_sectors) * size, fat_sectors * size)
        for number in range(copies)
    ]
    if len(set(tables)) > 1:
        faults.append("the two tables of clusters differ")
    table = array.array("I" if wide else "H", tables[0])
    if sys.byteorder == "big":
        table.byteswap()
    if wide:
        table = array.array("I", (entry & 0x0FFFFFFF for entry in table))
        faults += _check_wide(disk, sector, size, reserved)
    if any(table[clusters + 2 :]):
        faults.append("its table tells of clusters that are not there")
    return (
        Volume(
            cluster_size=cluster_size,
            clusters=clusters,
            data_at=data_at,
            root_at=data_at - root_size,
            root_size=root_size,
            root_cluster=root_cluster if wide else 0,
            wide=wide,
            table=table,
        ),
        faults,
    )


def _check_wide(disk: Source, sector: bytes, size: int, reserved: int) -> list[str]:
    faults = []
    version, _, _, backup = struct.unpack_from("<HIHH", sector, 42)
    if version:
        faults.append("its version is not known")
    # But for one byte, which says that it is mounted.
    if 0 < backup < reserved and _unmounted(disk.read(backup * size, 512)) != _unmounted(sector):
        faults.append("the copy of its first sector differs")
    return faults


def _unmounted(sector: bytes) -> bytes:
    return sector[:65] + sector[66:]


def _follow(reading: _Reading, first: int, name: str) -> tuple[int, ...]:
    """The clusters of a chain; none may be taken twice, so that it ends."""
    volume = reading.volume
    end = 0x0FFFFFF8 if volume.wide else 0xFFF8
    chain = []
    cluster = first
    while True:
        if not 2 <= cluster < volume.clusters + 2:
            raise Damaged(f"{name} goes outside of the volume")
        if reading.taken[cluster]:
            raise Damaged(f"{name} shares a cluster with another file")
        reading.taken[cluster] = 1
        chain.append(cluster)
        cluster = volume.table[cluster]
        if cluster >= end:
            return tuple(chain)


def _read_clusters(reading: _Reading, clusters: tuple[int, ...]) -> bytes:
    volume = reading.volume
    if len(clusters) * volume.cluster_size > ENTRY_LIMIT * 32:
        raise Damaged("a directory is too large")
    return b"".join(
        reading.disk.read(volume.data_at + (one - 2) * volume.cluster_size, volume.cluster_size)
        for one in clusters
    )


def _read_directory(reading: _Reading, data: bytes, path: str, depth: int) -> None:
    if depth > DEPTH_LIMIT:
        raise Damaged("its directories are nested too deep")
    long: list[bytes] = []
    for at in range(0, len(data), 32):
        entry = data[at : at + 32]
        if entry[0] == 0:
            if any(data[at:]):
                reading.faults.append(f"{path or '/'} has bytes after its last entry")
            return
        reading.entries += 1
        if reading.entries > ENTRY_LIMIT:
            raise Damaged("it has too many files")
        if entry[0] == 0xE5:
            long = []
        elif entry[11] & 0x3F == _LONG:
            long.append(entry)
        elif entry[11] & _VOLUME:
            # A driver that takes no heed of the flag would see a file.
            if path or reading.label or any(entry[20:22]) or any(entry[26:32]):
                reading.faults.append(f"{path or '/'} has a label that may be a file")
            reading.label = entry[:11].decode("ascii", errors="replace").rstrip()
            long = []
        else:
            _take_entry(reading, entry, _build_name(entry, long), path, depth)
            long = []


def _take_entry(reading: _Reading, entry: bytes, name: str, path: str, depth: int) -> None:
    high, _, _, low, size = struct.unpack_from("<HHHHI", entry, 20)
    first = low | (high << 16 if reading.volume.wide else 0)
    if name in (".", ".."):
        own = entry[:11] == name.encode().ljust(11)
        if not depth or not entry[11] & _DIRECTORY or not own:
            reading.faults.append(f"{path}/{name} is where it can't be")
        return
    whole = f"{path}/{name}"
    if len(reading.files) + len(reading.directories) >= FILE_LIMIT:
        raise Damaged(f"it has more than {FILE_LIMIT} files")
    if entry[11] & _DIRECTORY:
        reading.directories.append(whole)
        if size:
            reading.faults.append(f"{whole} has a size")
        _read_directory(
            reading, _read_clusters(reading, _follow(reading, first, whole)), whole, depth + 1
        )
        return
    volume = reading.volume
    clusters = _follow(reading, first, whole) if size or first else ()
    if len(clusters) != -(-size // volume.cluster_size):
        raise Damaged(f"{whole} has {len(clusters)} clusters for {size} bytes")
    reading.files.append(
        File(whole, size, clusters, volume.cluster_size, volume.data_at, reading.disk)
    )


def _build_name(entry: bytes, long: list[bytes]) -> str:
    stem = entry[:8].decode("ascii", errors="replace").rstrip(" ")
    ending = entry[8:11].decode("ascii", errors="replace").rstrip(" ")
    if entry[12] & 0x08:
        stem = stem.lower()
    if entry[12] & 0x10:
        ending = ending.lower()
    short = f"{stem}.{ending}" if ending else stem
    if not long:
        return _check_name(short)
    checksum = 0
    for byte in entry[:11]:
        checksum = ((checksum >> 1) | (checksum << 7 & 0x80)) + byte & 0xFF
    text = b""
    for number, piece in enumerate(reversed(long), start=1):
        wanted = number | (0x40 if number == len(long) else 0)
        if piece[0] != wanted or piece[13] != checksum:
            raise Damaged(f"the long name of {short!r} is torn")
        text += piece[1:11] + piece[14:26] + piece[28:32]
    name, _, rest = text.decode("utf-16-le", errors="replace").partition("\0")
    if rest.strip("\uffff"):
        raise Damaged(f"the long name of {short!r} is followed by other bytes")
    return _check_name(name)


def _check_name(name: str) -> str:
    if not name or "/" in name or "\\" in name or not name.isprintable() or "\ufffd" in name:
        raise Damaged(f"a file has the name {name!r}")
    return name


def _find_unused(reading: _Reading, files: tuple[File, ...]) -> Iterator[int]:
    """Bytes that are not zero: behind the end of a file, and the first in each stretch of free clusters."""
    volume, disk = reading.volume, reading.disk
    for one in files:
        rest = -one.size % volume.cluster_size
        if rest:
            end = volume.data_at + (one.clusters[-1] - 1) * volume.cluster_size
            if (found := find_nonzero(disk, end - rest, rest)) is not None:
                yield found
    start = None
    for cluster in range(2, volume.clusters + 3):
        free = cluster < volume.clusters + 2 and not reading.taken[cluster]
        if free and start is None:
            start = cluster
        elif not free and start is not None:
            at = volume.data_at + (start - 2) * volume.cluster_size
            size = (cluster - start) * volume.cluster_size
            start = None
            if (found := find_nonzero(disk, at, size)) is not None:
                yield found
