"""Two builds of one commit are the same bytes, but for the times that signatures of EFI programs carry."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTOR = 512
BLOCK = 2**20
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
PREFIX = "hairpin_0.0.1."
OUTPUTS = ("raw", "qcow2", "efi", "manifest", "raw.manifest", "cdx.json")

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(3600)]


def build(out: Path) -> Mapping[str, Path]:
    """What a build wrote, by the end of its name. Everything is installed anew, by packages that are kept."""
    environment = {**os.environ, "OUT": str(out), "VERSION": "0.0.1"}
    environment.pop("FAST", None)
    with (out.parent / f"{out.name}.log").open("wb") as log:
        subprocess.run(
            [str(ROOT / "image-build/build.sh")],
            env=environment,
            check=True,
            timeout=1700,
            stdout=log,
            stderr=log,
        )
    return {path.name.removeprefix(PREFIX): path for path in out.iterdir()}


def read_table(disk: Path) -> list[dict[str, object]]:
    argv = ["sfdisk", "--json", str(disk)]
    table = json.loads(subprocess.run(argv, capture_output=True, check=True, timeout=30).stdout)
    partitions: list[dict[str, object]] = table["partitiontable"]["partitions"]
    # Its name is that of the file.
    return [{key: value for key, value in one.items() if key != "node"} for one in partitions]


def hash_part(disk: Path, start: int, size: int) -> str:
    """``start`` and ``size`` in sectors."""
    digest = hashlib.sha256()
    with disk.open("rb") as stream:
        stream.seek(start * SECTOR)
        left = size * SECTOR
        while left > 0 and (block := stream.read(min(BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def strip_signature(program: bytes) -> bytes:
    """A PE32+ program without its certificates and without the checksum that counts them in.

    So with the kernel in a UKI, which is signed by itself, too.
    Sources: Microsoft, PE Format ("Optional Header", "Section Table", "The Attribute Certificate Table").
    """
    header = struct.unpack_from("<I", program, 0x3C)[0]
    assert program[header : header + 4] == b"PE\0\0"
    optional = header + 24
    assert struct.unpack_from("<H", program, optional)[0] == 0x20B
    certificates = optional + 112 + 4 * 8
    at, size = struct.unpack_from("<II", program, certificates)
    bare = bytearray(program)
    struct.pack_into("<I", bare, optional + 64, 0)
    struct.pack_into("<II", bare, certificates, 0, 0)
    if at:
        del bare[at : at + size]
    if (place := find_kernel(program, header)) is not None:
        # Last, since it moves what is behind it; nothing is read by its place any more.
        bare[place] = strip_signature(program[place])
    return bytes(bare)


def find_kernel(program: bytes, header: int) -> slice | None:
    """Of a UKI, its section `.linux`."""
    count, optional_size = (
        struct.unpack_from("<H", program, header + offset)[0] for offset in (6, 20)
    )
    for number in range(count):
        section = header + 24 + optional_size + 40 * number
        name, size, _, _, at = struct.unpack_from("<8sIIII", program, section)
        if name.rstrip(b"\0") == b".linux":
            return slice(at, at + size)
    return None


def read_esp(disk: Path, start: int) -> dict[str, bytes]:
    """Every file of the EFI system partition, by its path."""
    image = f"{disk}@@{start * SECTOR}"
    argv = ["mdir", "-/", "-b", "-a", "-i", image, "::"]
    listed = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout
    paths = [
        line for line in listed.splitlines() if line.startswith("::") and not line.endswith("/")
    ]
    return {
        path: subprocess.run(
            ["mcopy", "-i", image, path, "-"], capture_output=True, check=True, timeout=60
        ).stdout
        for path in paths
    }


def test_two_builds_of_one_commit_are_the_same_but_for_signatures(tmp_path: Path) -> None:
    one, other = build(tmp_path / "one"), build(tmp_path / "two")
    assert set(one) == set(other) == {*OUTPUTS, "SHA256SUMS"}
    for name in ("manifest", "cdx.json"):
        assert one[name].read_bytes() == other[name].read_bytes(), name
    assert strip_signature(one["efi"].read_bytes()) == strip_signature(other["efi"].read_bytes())

    table = read_table(one["raw"])
    # By it the roots are the same, too: a root's number is made of its hash.
    assert table == read_table(other["raw"])
    assert len(table) == 9
    for number, part in enumerate(table, start=1):
        start, size = int(str(part["start"])), int(str(part["size"]))
        if part["type"] != ESP:
            first, second = (hash_part(built["raw"], start, size) for built in (one, other))
            assert first == second, f"partition {number}, {part.get('name')}"
            continue
        here, there = (read_esp(built["raw"], start) for built in (one, other))
        assert set(here) == set(there)
        assert any(path.endswith("/hairpin_0.0.1+3.efi") for path in here)
        for path, content in here.items():
            same = strip_signature if path.lower().endswith(".efi") else bytes
            assert same(content) == same(there[path]), path


def test_checksums_and_the_qcow2_are_of_the_same_disk(image: Path) -> None:
    out, name = image.parent, image.name.removesuffix(".raw")
    sums = dict(
        reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines()
    )
    assert set(sums) == {f"{name}.{end}" for end in OUTPUTS}
    for file, digest in sums.items():
        with (out / file).open("rb") as stream:
            assert hashlib.file_digest(stream, "sha256").hexdigest() == digest, file
    compare = [
        "qemu-img",
        "compare",
        "-f",
        "raw",
        "-F",
        "qcow2",
        str(image),
        str(out / f"{name}.qcow2"),
    ]
    subprocess.run(compare, check=True, timeout=300, capture_output=True)
