"""Which bytes of which file are read next: whole lines, renames, truncation, used-again inodes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.alerts import tail
from appliance.alerts.eve import LINE_LIMIT
from appliance.alerts.tail import (
    Batch,
    Bookmark,
    find_files,
    find_fingerprint,
    index_bookmarks,
    read_batch,
    remove_rotated,
    split_lines,
)


def read(path: Path, bookmark: Bookmark | None = None, limit: int = 1000) -> Batch:
    known = index_bookmarks([bookmark] if bookmark else [])
    batch = read_batch(path, "prevent", known, 7, limit)
    assert batch is not None
    return batch


def texts(batch: Batch) -> list[bytes]:
    return [line.raw for line in batch.lines]


@pytest.fixture
def live(tmp_path: Path) -> Path:
    return tmp_path / "eve.json"


def test_files_are_ordered_by_age_and_others_are_left_alone(live: Path) -> None:
    names = ("eve.json", "eve.json.20", "eve.json.3", "eve.json.bak", "eve.json.1.gz", "x.json.1")
    for name in names:
        (live.parent / name).touch()
    assert [path.name for path in find_files(live)] == ["eve.json.3", "eve.json.20", "eve.json"]
    assert find_files(live.parent / "absent" / "eve.json") == ()


def test_only_whole_lines_are_read_and_the_bookmark_stays_before_the_rest(live: Path) -> None:
    live.write_bytes(b"one\ntwo\nthr")
    batch = read(live)
    assert texts(batch) == [b"one", b"two"]
    assert (batch.bookmark.offset, batch.behind, batch.torn, batch.at_end) == (8, 3, 3, True)
    with live.open("ab") as file:
        file.write(b"ee\n")
    batch = read(live, batch.bookmark)
    assert texts(batch) == [b"three"]
    assert batch.lines[0].offset == 8
    assert (batch.behind, batch.replaced, batch.bookmark.generation) == (0, False, 7)


def test_a_batch_is_bounded_and_says_what_is_left(live: Path) -> None:
    live.write_bytes(b"".join(b"%d\n" % n for n in range(10)))
    batch = read(live, limit=4)
    assert (len(batch.lines), batch.behind, batch.torn, batch.at_end) == (4, 12, 0, False)


def test_a_rename_changes_nothing(live: Path) -> None:
    live.write_bytes(b"one\n")
    first = read(live)
    rotated = live.rename(live.parent / "eve.json.17")
    with rotated.open("ab") as file:
        file.write(b"late\n")
    batch = read(rotated, first.bookmark)
    assert texts(batch) == [b"late"]
    assert not batch.replaced


@pytest.mark.parametrize("content", [b"", b"new\n", b"OLD line\nmore\nand more\n"])
def test_a_truncated_file_is_read_from_its_start_as_a_new_one(live: Path, content: bytes) -> None:
    live.write_bytes(b"old line\nmore\n")
    first = read(live)
    live.write_bytes(content)  # same inode
    known = index_bookmarks([first.bookmark])
    batch = read_batch(live, "prevent", known, 8, 100)
    assert batch is not None
    assert batch.replaced
    assert batch.bookmark.generation == 8
    assert b"\n".join([*texts(batch), b""] if content else []) == content


def test_the_fingerprint_grows_with_what_was_read_and_then_stays(live: Path) -> None:
    live.write_bytes(b"a" * 99 + b"\n")
    first = read(live)
    assert first.bookmark.fingerprint == find_fingerprint(b"a" * 99 + b"\n")
    with live.open("ab") as file:
        file.write(b"b" * 999 + b"\n")
    second = read(live, first.bookmark)
    assert second.bookmark.fingerprint.length == tail.FINGERPRINT_BYTES
    assert read(live, second.bookmark).bookmark == second.bookmark


def test_a_line_that_is_too_long_comes_in_pieces_and_holds_nothing_up(live: Path) -> None:
    live.write_bytes(b"x" * (2 * LINE_LIMIT + 5) + b"\nnext\n")
    batch = read(live)
    assert [len(line.raw) for line in batch.lines] == [LINE_LIMIT, LINE_LIMIT, 5, 4]
    assert batch.behind == 0


def test_what_is_no_regular_file_is_refused(live: Path) -> None:
    target = live.parent / "secret"
    target.write_bytes(b"secret\n")
    live.symlink_to(target)
    with pytest.raises(OSError, match=r"symbolic|ELOOP|levels"):
        read(live)
    live.unlink()
    os.mkfifo(live)
    with pytest.raises(OSError, match="regular"):
        read(live)
    live.unlink()
    assert read_batch(live, "prevent", {}, 1, 1) is None


def test_only_the_rotated_file_that_was_drained_is_deleted(live: Path) -> None:
    live.write_bytes(b"one\n")
    first = read(live)
    assert not remove_rotated(live, live, first.bookmark)
    rotated = live.rename(live.parent / "eve.json.1")
    other = live.parent / "eve.json.2"
    other.write_bytes(b"other\n")
    assert not remove_rotated(other, live, first.bookmark)
    assert remove_rotated(rotated, live, first.bookmark)
    assert not remove_rotated(rotated, live, first.bookmark)
    assert other.exists()


def test_of_two_bookmarks_for_one_inode_the_younger_counts() -> None:
    old, young = Bookmark("prevent", 1, 5, 6, 70), Bookmark("prevent", 2, 5, 6, 8)
    assert index_bookmarks([young, old]) == {(5, 6): young}


@given(st.binary(max_size=200), st.integers(1, 20))
def test_lines_and_their_length_make_up_what_was_consumed(data: bytes, limit: int) -> None:
    lines, length = split_lines(data, 100, limit)
    assert b"".join(line.raw + b"\n" for line in lines) == data[:length]
    assert len(lines) <= limit
    assert len(lines) == limit or b"\n" not in data[length:]
