"""A packet thread that does nothing while its engine answers and even works; and rulesets to start on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.inspection.heartbeat import STALLED_LIMIT, Beat, find_hang
from appliance.inspection.rulesets import Ruleset, Rulesets
from appliance.rules.store import COPIES, CURRENT, LAST_GOOD, RuleStore, build_revision
from steering.model import Profile


def build_beats(queued: list[int], taken: list[int | None]) -> list[Beat]:
    """A beat a second, of an engine that burns a whole processor."""
    return [
        Beat(float(at), True, 0, float(at), one, other)
        for at, (one, other) in enumerate(zip(queued, taken, strict=True))
    ]


def test_engine_that_counts_nothing_of_what_is_queued_is_hung() -> None:
    beats = build_beats([100 + 40 * at for at in range(9)], [7] * 9)
    assert find_hang(beats) == "the engine counted no packet for 8.0 s while 320 were queued"
    assert find_hang(beats[:-1]) is None


def test_idle_lane_and_engine_that_tells_late_are_not_hung() -> None:
    assert find_hang(build_beats([100] * 30, [7] * 30)) is None
    # Packets only in the last seconds: not counted yet.
    assert find_hang(build_beats([100] * 20 + [200, 300, 400], [7] * 23)) is None
    # A young engine tells nothing yet.
    assert find_hang(build_beats(list(range(30)), [None] * 30)) is None


@given(st.lists(st.integers(0, 5000), min_size=20, max_size=60), st.integers(0, 3))
def test_engine_that_counts_up_to_four_seconds_late_is_never_hung(
    arrivals: list[int], late: int
) -> None:
    queued = [sum(arrivals[: at + 1]) for at in range(len(arrivals))]
    # Counted every 3 s, and told a second later at most.
    taken = [queued[max(0, at - at % 3 - late % 2)] for at in range(len(arrivals))]
    for end in range(1, len(arrivals)):
        assert find_hang(build_beats(queued[:end], list(taken[:end]))) is None
    assert STALLED_LIMIT / 2 >= 4


def write(store: RuleStore, text: str, *links: str) -> str:
    revision = build_revision(text.encode())
    directory = store.profile_dir(Profile.PREVENT) / revision
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "suricata.rules").write_text(text)
    for link in links:
        store.write_link(Profile.PREVENT, link, revision)
    return revision


@pytest.fixture
def store(tmp_path: Path) -> RuleStore:
    return RuleStore(tmp_path)


def test_ruleset_in_force_is_started_on_while_it_is_whole(store: RuleStore) -> None:
    rulesets = Rulesets(store.root, Profile.PREVENT)
    assert str(rulesets.find_whole()).startswith("no ruleset at ")
    old = write(store, "alert old\n", LAST_GOOD)
    new = write(store, "alert new\n", CURRENT)
    path = store.root / "prevent" / CURRENT / "suricata.rules"
    found = rulesets.find_whole()
    assert found == Ruleset(path, new, 0)
    assert rulesets.is_whole(found)
    # Refused by the engine: the one before, unless that is all there is.
    fallback = Ruleset(
        store.root / "prevent" / old / "suricata.rules",
        old,
        0,
        f"the engine does not load the ruleset at {path}; the one before it is inspected by",
    )
    assert rulesets.find_whole(refused=new) == fallback
    store.write_link(Profile.PREVENT, LAST_GOOD, None)
    assert rulesets.find_whole(refused=new) == found


@pytest.mark.parametrize("damage", ["", "alert ne", "alert new\nalert more\n"])
def test_damaged_ruleset_is_never_started_on(store: RuleStore, damage: str) -> None:
    rulesets = Rulesets(store.root, Profile.PREVENT)
    new = write(store, "alert new\n", CURRENT)
    found = rulesets.find_whole()
    store.rules_file(Profile.PREVENT, new).write_text(damage)
    assert isinstance(rulesets.find_whole(), str)
    assert isinstance(found, Ruleset)
    assert not rulesets.is_whole(found)
    old = write(store, "alert old\n", LAST_GOOD)
    fallback = rulesets.find_whole()
    assert isinstance(fallback, Ruleset)
    assert fallback.revision == old
    assert fallback.fault.endswith("; the one before it is inspected by")
    write(store, "alert old\n")
    store.rules_file(Profile.PREVENT, old).write_text("x")
    assert isinstance(rulesets.find_whole(), str)


def test_damaged_ruleset_is_started_on_by_its_copy_while_that_is_whole(store: RuleStore) -> None:
    """The same rules, so nothing is below the floor, nor any older set needed, until `serve` mends the file."""
    rulesets = Rulesets(store.root, Profile.PREVENT)
    write(store, "alert old\n", LAST_GOOD)
    new = write(store, "alert new\n", CURRENT)
    copy = store.profile_dir(Profile.PREVENT) / COPIES / new / "suricata.rules"
    copy.parent.mkdir(parents=True)
    copy.write_text("alert new\n")
    store.rules_file(Profile.PREVENT, new).write_text("")
    assert rulesets.find_whole() == Ruleset(copy.absolute(), new, 0)
    # What the engine refused is not tried again under another name.
    fallback = rulesets.find_whole(refused=new)
    assert isinstance(fallback, Ruleset)
    assert fallback.revision != new
    copy.write_text("alert ne")
    torn = rulesets.find_whole()
    assert isinstance(torn, Ruleset)
    assert torn.revision != new


def test_an_engine_that_gives_packets_back_is_not_stuck_though_some_always_wait() -> None:
    """As with little traffic: a batch waits at every look, and no processor time to speak of is used."""

    def build(given_back: int) -> list[Beat]:
        return [Beat(float(at), True, 7, 0.0, 7 + at * given_back) for at in range(10)]

    assert find_hang(build(20)) is None
    assert "left packets waiting" in (find_hang(build(0)) or "")


def test_how_many_rules_the_one_in_force_gives(store: RuleStore) -> None:
    rulesets = Rulesets(store.root, Profile.PREVENT)
    assert rulesets.find_wanted_now() == 0
    write(store, "alert new\n", CURRENT)
    # Nobody tried it: not known.
    assert rulesets.find_wanted_now() == 0
