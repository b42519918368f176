"""When a lane is revived: at its engine's return, and then ever more seldom."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from appliance.assurance.revive import (
    QUICK_TRIES,
    ReviveWatch,
    Sight,
    Tried,
    find_due,
    note_tried,
)
from steering.model import Lane, Leg, Profile
from steering.switch.bfd import choose_other, render_settings

OLD, NEW = (100, 1.0), (200, 2.0)


def build_lane() -> Lane:
    return Lane(0, Profile.PREVENT, 3001, (0,), Leg("leg-a", "a"), Leg("leg-b", "b"))


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


async def test_nothing_is_revived_without_links_and_at_once_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lane = build_lane()
    links, revived = [False], asyncio.Event()

    async def revive(_: Lane) -> None:
        revived.set()

    async def look(_: ReviveWatch, __: Lane) -> Sight:
        return Sight(OLD, True)

    monkeypatch.setattr(ReviveWatch, "_look", look)
    watch = ReviveWatch(
        [lane], lambda _: Path("/"), lambda _: True, lambda _: links[0], lambda: None, revive
    )
    running = asyncio.create_task(watch.run())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(revived.wait(), 0.6)
    links[0] = True
    await asyncio.wait_for(revived.wait(), 0.5)
    running.cancel()


def test_both_legs_change_in_one_transaction() -> None:
    assert render_settings(["leg-a", "leg-b"], "enable=false") == [
        "set", "Interface", "leg-a", "bfd:enable=false",
        "--", "set", "Interface", "leg-b", "bfd:enable=false",
    ]  # fmt: skip
    assert choose_other(50) != 50
