"""dm-verity: superblock, signed root hash, and the whole tree of hashes, down to the block that differs. Pure.

Formats: cryptsetup's "DMVerity" (superblock version 1, hash type 1), and the JSON of systemd's verity-sig partitions
(Discoverable Partitions Specification). `veritysetup verify` takes no data at an offset, so it needs loop devices and
root, and it ends at the first block that differs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from appliance.image.model import Damaged, Progress, Source, find_nonzero

SIGNATURE_LIMIT = 64 * 2**10
DAMAGE_LIMIT = 100
"""So many damaged stretches are told of one by one."""
_SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6s256s168s")
_DIGESTS = {"sha256": 32, "sha512": 64}
BLOCKS_LIMIT = 2**21
"""8 GiB at the usual 4 KiB, whose digests take 140 MB of memory: more is not read."""
_BLOCKS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True, slots=True)
class Superblock:
    uuid: str
    algorithm: str
    data_block: int
    hash_block: int
    data_blocks: int
    salt: bytes

    @property
    def data_size(self) -> int:
        return self.data_block * self.data_blocks

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """(first block, blocks) of each level of the tree in the hash partition, the leaves first."""
        fan = self.fan
        counts: list[int] = []
        count = self.data_blocks
        while count > 1 or not counts:
            count = -(-count // fan)
            counts.append(count)
        placed = []
        at = 1  # the superblock takes the first
        for count in reversed(counts):
            placed.append((at, count))
            at += count
        return tuple(reversed(placed))

    @property
    def slot(self) -> int:
        """Bytes from one digest to the next: the next power of two."""
        return _DIGESTS[self.algorithm]

    @property
    def fan(self) -> int:
        return self.hash_block // self.slot

    @property
    def tree_end(self) -> int:
        first, count = self.levels[0]
        return (first + count) * self.hash_block


@dataclass(frozen=True, slots=True)
class RootSignature:
    """What a verity-sig partition says. ``root_hash`` is hex, ``signature`` PKCS #7 over it as text."""

    root_hash: str
    fingerprint: str
    signature: bytes


@dataclass(frozen=True, slots=True)
class Damage:
    """``what`` is "data" or "tree"; blocks from ``first`` to ``last``, of that partition."""

    what: str
    first: int
    last: int
    reason: str

    def __str__(self) -> str:
        many = self.first != self.last
        blocks = f"blocks {self.first} to {self.last}" if many else f"block {self.first}"
        return f"{blocks}: {self.reason}"


def parse_superblock(data: bytes, data_room: int, hash_room: int) -> Superblock:
    """The first 512 bytes of a hash partition. Raises Damaged, also when data or tree don't fit."""
    if len(data) < _SUPERBLOCK.size:
        raise Damaged("there is no superblock")
    (
        magic, version, kind, uuid, algorithm, data_block, hash_block, blocks, salt_size, pad, salt, rest,
    ) = _SUPERBLOCK.unpack_from(data)  # fmt: skip
    if magic != b"verity\0\0" or version != 1 or kind != 1:
        raise Damaged("there is no superblock")
    name = algorithm.rstrip(b"\0").decode("ascii", errors="replace")
    if name not in _DIGESTS:
        raise Damaged("the superblock names an unknown digest")
    if data_block not in _BLOCKS or hash_block not in _BLOCKS or salt_size > 256:
        raise Damaged("the superblock tells what can't be")
    if any(pad) or any(rest) or any(salt[salt_size:]):
        raise Damaged("the superblock has bytes where there are none")
    if not 0 < blocks <= min(BLOCKS_LIMIT, data_room // data_block):
        raise Damaged(f"the superblock covers {blocks} blocks, more than there are")
    found = Superblock(uuid.hex(), name, data_block, hash_block, blocks, salt[:salt_size])
    if found.tree_end > hash_room:
        raise Damaged("the tree of hashes does not fit into its partition")
    return found


def parse_signature(data: bytes) -> RootSignature:
    """A verity-sig partition: one JSON object, then zeros. Raises Damaged."""
    text = data.rstrip(b"\0")
    if len(text) > SIGNATURE_LIMIT:
        raise Damaged(f"the signature is longer than {SIGNATURE_LIMIT} bytes")
    try:
        document = json.loads(text.decode("ascii"), object_pairs_hook=_take_once)
        root_hash, fingerprint = document["rootHash"], document["certificateFingerprint"]
        signature = base64.b64decode(document["signature"], validate=True)
        binascii.unhexlify(root_hash), binascii.unhexlify(fingerprint)
    except (ValueError, KeyError, TypeError, RecursionError) as fault:
        raise Damaged(f"the root hash's signature can't be read: {fault}") from fault
    if set(document) != {"rootHash", "certificateFingerprint", "signature"}:
        raise Damaged("the root hash's signature has fields that are not known")
    if root_hash != root_hash.lower() or len(root_hash) not in (64, 128):
        raise Damaged("the root hash is not one")
    return RootSignature(root_hash, fingerprint, signature)


def _take_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    taken = dict(pairs)
    if len(taken) != len(pairs):
        raise ValueError("a field stands there twice")
    return taken


def check_tree(
    data: Source, tree: Source, block: Superblock, root_hash: str, progress: Progress
) -> Iterator[Damage]:
    """Every stretch of blocks of data and tree that is not what the root hash says, and bytes it does not cover.

    ``progress`` is called at every tenth of the data. Memory: one level of the tree. Raises ImageError.
    """
    expected = [bytes.fromhex(root_hash)]
    for level in range(len(block.levels) - 1, -1, -1):
        below: list[bytes] = []
        known = True
        first, count = block.levels[level]
        wanted = block.levels[level - 1][1] if level else block.data_blocks
        for number in range(count):
            content = tree.read((first + number) * block.hash_block, block.hash_block)
            if _hash(block, content) != expected[number]:
                mended = None if level else _rebuild(data, block, number)
                why = "it is not what the root hash says"
                if mended is not None and _hash(block, mended) == expected[number]:
                    content = mended
                    why += "; the data under it are"
                elif level == 0:
                    why += ", and so it can't be told which data under it are"
                else:
                    known = False
                yield Damage("tree", first + number, first + number, why)
            below += _split(block, content)
        if not known:
            # Above the leaves: what is under it has nothing left to be measured by.
            reason = "they can't be checked: the tree above them was changed"
            yield Damage("data", 0, block.data_blocks - 1, reason)
            return
        expected = below[:wanted]
        for extra in below[wanted:]:
            if any(extra):
                yield Damage(
                    "tree", first, first + count - 1, "digests of blocks that are not there"
                )
                break
    yield from _join(_check_data(data, block, expected, progress))
    yield from _check_rest(data, tree, block)


def _check_data(
    data: Source, block: Superblock, expected: list[bytes], progress: Progress
) -> Iterator[int]:
    batch = max(1, 2**20 // block.data_block)
    size = block.data_block
    tenth = max(1, block.data_blocks // 10)
    told = 0
    for start in range(0, block.data_blocks, batch):
        count = min(batch, block.data_blocks - start)
        content = memoryview(data.read(start * size, count * size))
        for number in range(count):
            if (
                _hash(block, content[number * size : (number + 1) * size])
                != expected[start + number]
            ):
                yield start + number
        if start // tenth > told:
            told = start // tenth
            progress(f"{told * 10} % of the root checked")


def _join(blocks: Iterator[int]) -> Iterator[Damage]:
    reason = "changed"
    first = last = None
    for number in blocks:
        if last is not None and number == last + 1:
            last = number
            continue
        if first is not None and last is not None:
            yield Damage("data", first, last, reason)
        first = last = number
    if first is not None and last is not None:
        yield Damage("data", first, last, reason)


def _check_rest(data: Source, tree: Source, block: Superblock) -> Iterator[Damage]:
    at = find_nonzero(data, block.data_size, data.size - block.data_size)
    if at is not None:
        number = at // block.data_block
        yield Damage("data", number, number, "bytes after what the root hash covers")
    spans = [(512, block.hash_block - 512), (block.tree_end, tree.size - block.tree_end)]
    for start, size in spans:
        if size > 0 and (at := find_nonzero(tree, start, size)) is not None:
            number = at // block.hash_block
            yield Damage("tree", number, number, "bytes that belong to nothing")


def _rebuild(data: Source, block: Superblock, number: int) -> bytes:
    """A leaf of the tree, made from the data that it is about."""
    first = number * block.fan
    count = min(block.fan, block.data_blocks - first)
    size = block.data_block
    content = memoryview(data.read(first * size, count * size))
    digests = (_hash(block, content[at * size : (at + 1) * size]) for at in range(count))
    return b"".join(one.ljust(block.slot, b"\0") for one in digests).ljust(block.hash_block, b"\0")


def _split(block: Superblock, content: bytes) -> list[bytes]:
    return [content[at : at + block.slot] for at in range(0, block.hash_block, block.slot)]


def _hash(block: Superblock, content: bytes | memoryview) -> bytes:
    digest = hashlib.new(block.algorithm, block.salt)
    digest.update(content)
    return digest.digest()
