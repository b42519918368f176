"""What reads an image meets anything: it answers with a value or with Damaged, in bounds, and with nothing else."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.image.bundle import (
    build_header,
    encode_slot,
    pack_rules,
    parse_slot,
    read_bundle,
    slot_size,
)
from appliance.image.disk import open_device_to_read
from appliance.image.fat import read_tree
from appliance.image.gpt import read_table
from appliance.image.model import Bytes, Damaged, ImageError
from appliance.image.pe import compute_checksum, compute_digest, parse_program
from appliance.image.signing import (
    NotTrusted,
    build_key_id,
    check_detached,
    check_program,
    read_pair,
    sign,
)
from appliance.image.verity import check_tree, parse_signature, parse_superblock
from tests.support.disk_images import EFI, MIB, ROOT_SIZE, TREE_SIZE, Keys, make_keys, run
from tests.unit.image.conftest import Image, quiet

EXAMPLES = settings(max_examples=150)
Edits = st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=6)


def edit(data: bytes, edits: list[tuple[int, int]], within: int | None = None) -> bytes:
    changed = bytearray(data)
    for at, value in edits:
        changed[at % (within or len(changed))] = value
    return bytes(changed)


class Counting:
    """A source that allows so many bytes to be read of it."""

    def __init__(self, data: bytes, size: int, limit: int) -> None:
        self._data, self._size, self._left = data, size, limit

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > self._size:
            raise Damaged("outside")
        self._left -= size
        assert self._left >= 0, "more is read than there is need for"
        return self._data[offset : offset + size].ljust(size, b"\0")


@pytest.fixture(scope="session")
def table(image: Image) -> bytes:
    return image.disk.read_bytes()[: 34 * 512]


@EXAMPLES
@given(edits=Edits)
def test_partition_tables(table: bytes, edits: list[tuple[int, int]]) -> None:
    size = 60 * MIB
    try:
        found = read_table(Counting(edit(table, edits), size, 2 * MIB))
    except Damaged:
        return
    assert len(found.partitions) <= 1024
    assert all(one.offset + one.size <= size for one in found.partitions)


@pytest.fixture(scope="session")
def esp(image: Image) -> bytes:
    part = image.partition("esp")
    return image.disk.read_bytes()[part.offset : part.offset + part.size]


# Where FAT32 of these tests has its first sector, its tables and the first directories.
STRUCTURES = 620 * 1024


@settings(max_examples=40)
@given(edits=Edits)
def test_file_systems(esp: bytes, edits: list[tuple[int, int]]) -> None:
    try:
        tree = read_tree(Bytes(edit(esp, edits, 512)))
        for file in tree.files:
            file.read(0, min(file.size, 4096))
    except Damaged:
        return


@settings(max_examples=40)
@given(
    edits=st.lists(
        st.tuples(st.integers(16384, STRUCTURES), st.integers(0, 255)), min_size=1, max_size=40
    )
)
def test_tables_and_directories(esp: bytes, edits: list[tuple[int, int]]) -> None:
    try:
        read_tree(Bytes(edit(esp, edits)))
    except Damaged:
        return


def test_files_are_read_as_mtools_reads_them(image: Image, tmp_path: Path) -> None:
    part = image.partition("esp")
    at = f"{image.disk}@@{part.offset}"
    listed = sorted(run("mdir", "-i", at, "-/", "-b", "::").split())
    with open_device_to_read(image.disk) as opened:
        files = read_tree(part.of(opened)).files
        assert sorted(f"::{one.path}" for one in files) == [
            one for one in listed if not one.endswith("/")
        ]
        for file in files:
            target = tmp_path / "file"
            run("mcopy", "-o", "-n", "-i", at, f"::{file.path}", target)
            assert target.read_bytes() == file.read(0, file.size)


def test_fat16_is_read(tmp_path: Path) -> None:
    volume = tmp_path / "fat"
    with open(volume, "wb") as opened:
        opened.truncate(16 * MIB)
    run("mkfs.vfat", "-F", "16", volume)
    content = tmp_path / "content"
    content.write_bytes(bytes(range(256)) * 100)
    run("mmd", "-i", volume, "::/a")
    run("mcopy", "-i", volume, content, "::/a/A long name of a file.txt")
    tree = read_tree(Bytes(volume.read_bytes()))
    assert [(one.path, one.size) for one in tree.files] == [("/a/A long name of a file.txt", 25600)]
    assert tree.files[0].read(250, 1000) == content.read_bytes()[250:1250]
    assert tree.faults == ()


def test_chains_that_meet_are_refused(esp: bytes) -> None:
    """Two files of one cluster: what a driver reads depends on the driver."""
    name = esp.find(b"BOOTX64 EFI")
    other = esp.find(b"LOADER~1CON")
    changed = bytearray(esp)
    changed[other + 26 : other + 28] = changed[name + 26 : name + 28]
    with pytest.raises(Damaged, match=r"shares a cluster|has .* clusters"):
        read_tree(Bytes(bytes(changed)))


@EXAMPLES
@given(edits=Edits)
def test_programs(image: Image, edits: list[tuple[int, int]]) -> None:
    data = image.root.kernel.read_bytes()
    for within in (1024, None):
        file = Bytes(edit(data, edits, within))
        try:
            program = parse_program(file)
            compute_digest(file, program)
            compute_checksum(file)
            for signature in program.signatures:
                check_program(signature, image.trusted)
        except (Damaged, NotTrusted):
            continue


def test_digests_and_checksums_are_those_of_sbsign(image: Image) -> None:
    for path in (image.root.kernel, image.root.kernel.parent.parent / "loader.efi"):
        file = Bytes(path.read_bytes())
        program = parse_program(file)
        told = check_program(program.signatures[0], image.trusted)
        assert compute_digest(file, program) == told.digest
        assert program.checksum == compute_checksum(file)
        run("sbverify", "--cert", image.keys.certificate, path)


def test_bytes_that_no_digest_covers_are_refused(image: Image) -> None:
    data = image.root.kernel.read_bytes()
    with pytest.raises(Damaged, match="not at its end"):
        parse_program(Bytes(data + bytes(8)))
    unsigned = (EFI / "systemd-bootx64.efi").read_bytes()
    assert parse_program(Bytes(unsigned)).signatures == ()


@EXAMPLES
@given(data=st.binary(max_size=3000))
def test_signatures_of_anything(image: Image, data: bytes) -> None:
    checks: list[Callable[[], object]] = [
        lambda: check_detached(data, b"x", image.trusted),
        lambda: check_program(data, image.trusted),
        lambda: parse_signature(data),
        lambda: parse_superblock(data, 2**30, 2**30),
    ]
    for check in checks:
        with pytest.raises((Damaged, NotTrusted)):
            check()


@EXAMPLES
@given(edits=Edits)
def test_root_signatures(image: Image, edits: list[tuple[int, int]]) -> None:
    data = image.root.signature.read_bytes()
    changed = edit(data, edits)
    try:
        told = parse_signature(changed)
        signer = check_detached(told.signature, told.root_hash.encode(), image.trusted)
    except (Damaged, NotTrusted):
        return
    assert signer in image.trusted
    assert told.root_hash == image.root.root_hash


@EXAMPLES
@given(edits=Edits)
def test_superblocks_and_trees(image: Image, edits: list[tuple[int, int]]) -> None:
    data, tree = image.root.data.read_bytes(), edit(image.root.tree.read_bytes(), edits, 4096)
    try:
        block = parse_superblock(tree[:512], ROOT_SIZE, TREE_SIZE)
    except Damaged:
        return
    # However it is told to be: no more is read than there is.
    sources = (Counting(one, len(one), 4 * len(one)) for one in (data, tree))
    whole = not list(check_tree(*sources, block, image.root.root_hash, quiet))
    assert (
        whole == (tree == image.root.tree.read_bytes())
        or tree[16:32] != image.root.tree.read_bytes()[16:32]
    )


# Rules bundles


@pytest.fixture(scope="session")
def slot(keys: Keys) -> bytes:
    key, certificate = read_pair(keys.key, keys.certificate)
    payload = pack_rules([("a.rules", b'alert tcp any any -> any any (msg:"a"; sid:1;)\n')])
    header = build_header(
        payload, serial=7, created=1.7e9, sources=(), rules=1, key_id=build_key_id(certificate)
    ).encode()
    return encode_slot(header, sign(key, header), payload)


def test_a_bundle_reads_back(image: Image, slot: bytes) -> None:
    found = parse_slot(Bytes(slot), image.trusted)
    assert (found.header.serial, found.header.rules) == (7, 1)


def test_every_changed_byte_of_a_bundle_is_told(image: Image, slot: bytes) -> None:
    for at in range(len(slot)):
        changed = bytearray(slot)
        changed[at] ^= 0x20
        with pytest.raises((Damaged, NotTrusted)):
            parse_slot(Bytes(bytes(changed)), image.trusted)


@EXAMPLES
@given(edits=Edits, cut=st.integers(0, 5000))
def test_bundles(image: Image, slot: bytes, edits: list[tuple[int, int]], cut: int) -> None:
    changed = edit(slot, edits)
    source = Counting(changed, max(len(slot), cut), len(slot) + 4096)
    if changed == slot:
        parse_slot(source, image.trusted)
        return
    with pytest.raises(ImageError):
        parse_slot(source, image.trusted)


@EXAMPLES
@given(lengths=st.tuples(*[st.integers(0, 2**32 - 1)] * 3), big=st.integers(0, 2**64 - 1))
def test_lengths_of_bundles_are_bounded(
    image: Image, lengths: tuple[int, int, int], big: int
) -> None:
    prefix = struct.pack("<8sIIIQ36s", b"HAIRPINR", 1, lengths[1], lengths[2], big, bytes(36))
    with pytest.raises(ImageError):
        parse_slot(Counting(prefix, 32 * MIB, 200_000), image.trusted)


def test_the_newest_whole_copy_is_used_and_the_other_is_told_of(image: Image, slot: bytes) -> None:
    half = slot_size(2 * MIB)
    both = slot.ljust(half, b"\0") * 2
    assert read_bundle(Bytes(both), image.trusted).faults == ()
    torn = edit(both, [(100, 0)])
    read = read_bundle(Bytes(torn), image.trusted)
    assert read.bundle.header.serial == 7
    assert read.faults[0].startswith("copy 1:")
    one = slot.ljust(2 * half, b"\0")
    assert read_bundle(Bytes(one), image.trusted).faults == ("the other copy is missing",)
    with pytest.raises(ImageError, match="older than 8"):
        read_bundle(Bytes(both), image.trusted, floor=8)


@pytest.mark.parametrize("kind", ["rsa:2048", "ed25519", "ec -pkeyopt ec_paramgen_curve:P-256"])
def test_kinds_of_keys(tmp_path: Path, kind: str) -> None:
    keys = make_keys(tmp_path, "one", kind)
    key, certificate = read_pair(keys.key, keys.certificate)
    header = build_header(
        b"p", serial=1, created=0, sources=(), rules=1, key_id=build_key_id(certificate)
    ).encode()
    encoded = encode_slot(header, sign(key, header), b"p")
    assert parse_slot(Bytes(encoded), (certificate,)).payload == b"p"
    two = make_keys(tmp_path, "two", kind)
    _, other = read_pair(two.key, two.certificate)
    with pytest.raises(NotTrusted):
        parse_slot(Bytes(encoded), (other,))
