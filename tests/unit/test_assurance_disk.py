"""A full disk is told while it lasts, also when it is the store's own."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from appliance.assurance.disk import FULL_BYTES, LOW_SHARE, Space, judge_space, read_space


def test_the_sentences() -> None:
    mib = 2**20
    assert judge_space("the store", "/var", Space(500 * mib, 1000 * mib)) == (False, "")
    assert judge_space("the store", "/var", Space(20 * mib, 1000 * mib)) == (
        False,
        "the disk of the store is nearly full (20480 KiB of 1024000 KiB left at /var)",
    )
    assert judge_space("the store", "/var", Space(0, 1000 * mib)) == (
        True,
        "the disk of the store is full (0 KiB of 1024000 KiB left at /var): events are lost",
    )
    assert judge_space("the store", "/var", None) == (True, "the store at /var can't be reached")


@given(st.integers(0, 2**45), st.integers(0, 2**45))
def test_what_is_full_is_always_told(free: int, total: int) -> None:
    full, reason = judge_space("EVE", "/run", Space(free, total))
    assert full is (free < FULL_BYTES)
    assert bool(reason) is (full or free < LOW_SHARE * total)


def test_a_place_that_is_not_made_yet_will_be_on_the_disk_of_its_parent(tmp_path: Path) -> None:
    space, parent = read_space(tmp_path / "lanes" / "prevent"), read_space(tmp_path)
    assert space is not None
    assert parent is not None
    assert space.total == parent.total
    assert 0 < space.free <= space.total
