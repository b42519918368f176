"""Which blocks of texts may hold a substring: one bit for each hash of four bytes that a block has.

A block with all bits of a needle set may hold it and is read; one that lacks a bit can't. Building it is
a few passes of numpy over the bytes, so it costs half a microsecond an alert, where an index of words or
trigrams (FTS5) costs hundreds. Full groups of blocks are turned round, so that a needle's bit is read
for a whole group at once. Texts made to set all bits only make a search read those blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

BLOCK_ALERTS = 512
BITS = 17
GROUP_BLOCKS = 128
PAGE_SLOTS = 32
PAGES = (1 << BITS) // PAGE_SLOTS
SIEVE_BYTES = (1 << BITS) // 8
ROW_BYTES = GROUP_BLOCKS // 8
ALL_BLOCKS = (1 << GROUP_BLOCKS) - 1
_NEEDLE_SLOTS = 12
_STEPS = (
    (np.uint64(7), np.uint64(0x00AA00AA00AA00AA)),
    (np.uint64(14), np.uint64(0x0000CCCC0000CCCC)),
    (np.uint64(28), np.uint64(0x00000000F0F0F0F0)),
)
_FACTOR = np.uint32(0x9E3779B1)
_SHIFT = np.uint32(32 - BITS)
GRAM = 4
"""Bytes. With three, digits alone would set a bit for every number that there is."""


def build_sieve(text: bytes) -> bytes:
    """`SIEVE_BYTES`: the bits of all sequences of `GRAM` bytes in ``text``."""
    marks = np.zeros(1 << BITS, np.bool_)
    for offset in range(GRAM):
        count = (len(text) - offset) // GRAM
        if count > 0:
            marks[_hash(np.frombuffer(text, "<u4", count, offset))] = True
    return np.packbits(marks).tobytes()


def find_slots(needle: bytes) -> tuple[int, ...]:
    """The bits that a text with ``needle`` in it has, at most `_NEEDLE_SLOTS`; none for under `GRAM` bytes."""
    grams = [
        int.from_bytes(needle[place : place + GRAM], "little")
        for place in range(len(needle) - GRAM + 1)
    ]
    slots = dict.fromkeys(int(slot) for slot in _hash(np.array(grams, np.uint32)))
    chosen = tuple(slots)
    step = max(len(chosen) / _NEEDLE_SLOTS, 1.0)
    return tuple(chosen[int(n * step)] for n in range(min(len(chosen), _NEEDLE_SLOTS)))


def may_hold(sieve: bytes, slots: Iterable[int]) -> bool:
    return all(sieve[slot >> 3] & (0x80 >> (slot & 7)) for slot in slots)


def turn_group(sieves: Sequence[bytes]) -> list[bytes]:
    """The pages of a group: `PAGES` times a row of `GROUP_BLOCKS` bits for each of `PAGE_SLOTS` slots."""
    bits = np.zeros((GROUP_BLOCKS, SIEVE_BYTES), np.uint8)
    for number, one in enumerate(sieves):
        bits[number] = np.frombuffer(one, np.uint8)
    # Eight blocks by eight slots at a time, as one number of 64 bits (Hacker's Delight 7-3).
    squares = np.ascontiguousarray(bits.reshape(ROW_BYTES, 8, SIEVE_BYTES).transpose(0, 2, 1))
    x = squares.view(">u8").astype(np.uint64)
    for shift, mask in _STEPS:
        t = (x ^ (x >> shift)) & mask
        x ^= t ^ (t << shift)
    rows = x.astype(">u8").view(np.uint8).reshape(ROW_BYTES, 1 << BITS)
    turned = np.ascontiguousarray(rows.T).tobytes()
    size = PAGE_SLOTS * ROW_BYTES
    return [turned[start : start + size] for start in range(0, len(turned), size)]


def find_pages(slots: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(slot // PAGE_SLOTS for slot in slots))


def sift_group(pages: Mapping[int, bytes], slots: Iterable[int]) -> int:
    """Bits of the group's blocks that may hold the needle of ``slots``; ``pages`` by their number."""
    left = ALL_BLOCKS
    for slot in slots:
        start = slot % PAGE_SLOTS * ROW_BYTES
        left &= int.from_bytes(pages[slot // PAGE_SLOTS][start : start + ROW_BYTES], "big")
    return left


def find_bit(block: int) -> int:
    """A block's bit in its group."""
    return 1 << (GROUP_BLOCKS - 1 - block % GROUP_BLOCKS)


def _hash(
    grams: np.ndarray[tuple[int], np.dtype[np.uint32]],
) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    found: np.ndarray[tuple[int], np.dtype[np.uint32]] = (grams * _FACTOR) >> _SHIFT
    return found
