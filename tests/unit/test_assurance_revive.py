"""When a lane is revived: at its engine's return, and then ever more seldom."""

from __future__ import annotations

from appliance.assurance.revive import QUICK_TRIES, Sight, Tried, find_due, note_tried
from steering.switch.bfd import choose_other, render_settings

OLD, NEW = (100, 1.0), (200, 2.0)


def test_a_return_is_an_answer_after_silence_or_of_another_engine() -> None:
    tried = Tried(OLD, 10.0, 1.0)
    silent, answers = Sight(OLD, False), Sight(OLD, True)
    assert find_due(silent, answers, tried, 10.1)
    assert find_due(answers, Sight(NEW, True), tried, 10.1)
    assert not find_due(answers, answers, tried, 10.1)
    assert not find_due(answers, silent, tried, 99.0)
    assert not find_due(answers, Sight(None, False), tried, 99.0)


def test_a_revival_that_brought_nothing_is_tried_again_ever_more_seldom() -> None:
    sight, tried, at = Sight(OLD, True), Tried(), 0.0
    pauses = []
    for _ in range(QUICK_TRIES + 8):
        tried = note_tried(tried, sight, at)
        assert not find_due(sight, sight, tried, at + tried.wait - 0.01)
        at += tried.wait
        assert find_due(sight, sight, tried, at + 1e-6)
        pauses.append(tried.wait)
    assert pauses[:QUICK_TRIES] == [0.4] * QUICK_TRIES
    assert pauses[QUICK_TRIES:] == [0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    assert note_tried(tried, Sight(NEW, True), at).wait == 0.4


def test_both_legs_change_in_one_transaction() -> None:
    assert render_settings(["leg-a", "leg-b"], "enable=false") == [
        "set", "Interface", "leg-a", "bfd:enable=false",
        "--", "set", "Interface", "leg-b", "bfd:enable=false",
    ]  # fmt: skip
    assert choose_other(50) != 50
