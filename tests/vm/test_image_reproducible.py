"""Two builds of one commit are the same bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 2**20

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(3000)]


def build(out: Path) -> dict[str, Path]:
    """What a build wrote, by the end of its name. Both builds are made alike, one after the other."""
    environment = {**os.environ, "OUT": str(out), "VERSION": "0.0.1", "FAST": "1"}
    subprocess.run(
        [str(ROOT / "image-build/build.sh")], env=environment, check=True, timeout=1400,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return {path.name.removeprefix("hairpin_0.0.1."): path for path in out.iterdir()}


def find_difference(one: Path, other: Path) -> int | None:
    """The first MiB in which two files differ; None where they are the same."""
    with one.open("rb") as first, other.open("rb") as second:
        at = 0
        while True:
            blocks = first.read(BLOCK), second.read(BLOCK)
            if blocks[0] != blocks[1]:
                return at
            if not blocks[0]:
                return None
            at += 1


def test_two_builds_of_one_commit_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = build(tmp_path / "one"), build(tmp_path / "two")
    assert (
        set(first) == set(second) >= {"raw", "qcow2", "efi", "manifest", "cdx.json", "SHA256SUMS"}
    )
    differing = {
        name: at for name in first if (at := find_difference(first[name], second[name])) is not None
    }
    assert differing == {}, "the first MiB that differs, by file"
    sums = dict(reversed(line.split("  ")) for line in first["SHA256SUMS"].read_text().splitlines())
    assert set(sums) == {path.name for name, path in first.items() if name != "SHA256SUMS"}
    for name, digest in sums.items():
        with (tmp_path / "one" / name).open("rb") as stream:
            assert hashlib.file_digest(stream, "sha256").hexdigest() == digest
