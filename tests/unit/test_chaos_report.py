"""The campaign's table, and its place in the documentation."""

from __future__ import annotations

import re

import pytest

from tests.chaos.__main__ import choose, merge
from tests.chaos.registry import Row, check, find_faults
from tests.chaos.report import BEGIN, END, PAGE, render_markdown, render_table, replace_between

GOOD = Row("engine dies", "closed", "0 pass", {"sent": 10}).document()
BAD = Row("engine dies", "open", "0 pass", {"sent": 9}, check((False, "9 | passed"))).document()


def test_a_row_is_met_when_nothing_was_missed() -> None:
    assert set(GOOD) == {"name", "mode", "figures", "goal", "met"}
    assert (GOOD["met"], BAD["met"]) == (True, False)
    assert BAD["figures"]["missed"] == ["9 | passed"]
    assert check((True, "no"), (False, "yes")) == ("yes",)


def test_the_table_tells_each_row_its_goal_and_what_was_missed() -> None:
    table = render_table([GOOD, BAD])
    assert table.splitlines()[0] == "met    engine dies (closed)"
    assert "missed: 9 | passed" in table
    assert table.endswith("1 of 2 rows meet their goal")
    rows = [line for line in render_markdown([GOOD, BAD], "Here.").splitlines() if "dies" in line]
    # A bar in a text must not make a column.
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [6, 6]


def test_the_page_keeps_what_stands_around_the_table() -> None:
    new = replace_between(f"before\n{BEGIN}\nold\n{END}\nafter\n", "new")
    assert new == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert replace_between(new, "new") == new
    with pytest.raises(ValueError, match="lacks the markers"):
        replace_between("nothing", "new")
    assert "old" in replace_between(PAGE.read_text(), "old")


def test_rows_measured_again_take_the_place_of_the_old_ones() -> None:
    again = {**BAD, "met": True}
    other = {**GOOD, "name": "other"}
    # All rows of the fault give way: what could not be measured the last time had one, of no mode.
    assert merge([GOOD, BAD], [again, other]) == [again, other]
    assert merge([other, GOOD, BAD], [again]) == [other, again]


def test_rows_are_chosen_by_a_part_of_their_name() -> None:
    assert "engine kill -9" in [one.name for one in choose(["engine kill"], False)]
    assert len(choose([], True)) < len(choose([], False)) == len(find_faults())
    assert sum(one.seconds for one in choose([], True)) > 0
    with pytest.raises(SystemExit):
        choose(["no such row"], False)
