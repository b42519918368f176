"""Accounts of what went uninspected: never less than before, nothing twice, whatever is restarted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.assurance import shortcuts
from appliance.assurance.connections import End, TakenConnection
from appliance.assurance.shortcuts import (
    Account,
    Book,
    parse_book,
    record_look,
    record_returned,
    record_seen,
    render_book,
)
from appliance.management.shortcut import build_accounts
from steering.counters import Count, Counters, Tally, add_tallies
from steering.errors import HairpinError
from steering.model import (
    Family,
    PolicySet,
    Shortcut,
    Trigger,
)
from tests.support.worlds import build_cut_policy

AT = 1_000_000.0
MB, RULE = Trigger.ONE_MEGABYTE, Trigger.RULE


def build_policies(**triggers: Trigger | None) -> PolicySet:
    return PolicySet(
        policies=tuple(
            build_cut_policy(
                name, None if trigger is None else Shortcut(trigger, 5), priority=100 + number
            )
            for number, (name, trigger) in enumerate(triggers.items())
        )
    )


BACKUP = build_policies(backup=MB)


def build_counters(policies: PolicySet = BACKUP, **packets: int) -> Counters:
    tallies = tuple(
        Tally(f"TAKE {name}", "shortcut", name, Count(count, 100 * count))
        for name, count in packets.items()
    )
    return add_tallies(tallies, [policy.name for policy in policies.policies], ())


def build_connection(number: int, age: float, policy: str = "backup") -> TakenConnection:
    ends = End("vm-1", "a", "10.0.0.1", number), End("vm-2", "b", "10.0.0.2", 873)
    return TakenConnection(
        f"{number:08x}", policy, MB, Family.IPV4, *ends, age, 0.0, frozenset({f"{number}"})
    )


def look(
    book: Book,
    tick: float,
    packets: int = 0,
    *connections: TakenConnection,
    skew: float = 0.0,
    took: float = 0.0,
) -> Book:
    counters = build_counters(backup=packets)
    ticks = tick - took, tick
    return record_look(book, AT + tick + skew, ticks, counters, connections, BACKUP)


def restart(book: Book) -> Book:
    """As a service that begins anew reads it from the store."""
    return parse_book(json.loads(json.dumps(render_book(book))))


def read(book: Book, policy: str = "backup", trigger: Trigger = MB) -> Account:
    return book.accounts.get((policy, trigger), Account())


def test_what_grew_is_added_and_each_connection_is_counted_once() -> None:
    book = look(Book(), 1.0, 5, build_connection(1, 0.5))
    book = look(book, 2.0, 9, build_connection(1, 1.5), build_connection(2, 0.2))
    book = look(book, 3.0, 9, build_connection(2, 1.2))
    assert read(book) == Account(connections=2, packets=9, bytes=900)


def test_the_same_ends_anew_are_another_connection() -> None:
    book = look(Book(), 1.0, 0, build_connection(1, 0.5))
    book = look(book, 4.0, 0, build_connection(1, 0.7))
    assert read(book).connections == 2


def test_a_look_that_takes_long_counts_nothing_twice() -> None:
    """How old a connection was, was read at some moment of the look."""
    book = look(Book(), 1.0, 0)
    for tick, took, age in ((2.0, 0.01, 0.5), (4.0, 0.9, 1.7), (5.0, 0.01, 3.5), (8.0, 2.0, 4.9)):
        book = look(book, tick, 0, build_connection(1, age), took=took)
    assert read(book).connections == 1


def test_a_clock_that_is_set_counts_nothing_again() -> None:
    book = look(Book(), 1.0, 5, build_connection(1, 0.5))
    for tick, skew in ((2.0, 3_600.0), (3.0, -3_600.0)):
        book = look(book, tick, 5, build_connection(1, tick - 0.5), skew=skew)
    assert read(book) == Account(connections=1, packets=5, bytes=500)


def test_a_service_that_begins_anew_counts_what_came_meanwhile_and_nothing_twice() -> None:
    book = look(Book(), 1.0, 5, build_connection(1, 0.5))
    book = restart(book)
    book = look(book, 60.0, 12, build_connection(1, 59.5), build_connection(2, 30.0))
    assert read(book) == Account(connections=2, packets=12, bytes=1_200)


def test_a_switch_that_begins_anew_takes_nothing_away() -> None:
    book = look(Book(), 1.0, 100, build_connection(1, 0.5))
    book = look(book, 2.0, 3)
    assert read(book) == Account(connections=1, packets=103, bytes=10_300)


def test_what_passed_before_a_trigger_changed_is_the_former_triggers() -> None:
    book = look(Book(), 1.0, 5)
    now = build_policies(backup=RULE)
    book = record_look(book, AT + 2, (2.0, 2.0), build_counters(now, backup=9), (), now)
    assert (read(book).packets, read(book, trigger=RULE).packets) == (9, 0)
    book = record_look(book, AT + 3, (3.0, 3.0), build_counters(now, backup=11), (), now)
    assert (read(book).packets, read(book, trigger=RULE).packets) == (9, 2)


def test_returned_connections_are_counted_by_policy() -> None:
    standing = build_connection(1, 0.5), build_connection(2, 0.5)
    book = record_returned(look(Book(), 1.0, 0, *standing), standing)
    assert read(book) == Account(connections=2, returned=2)


steps = st.lists(
    st.tuples(
        st.integers(0, 50),  # packets since the last look
        st.sampled_from(["on", "on", "on", "switch restarts", "service restarts"]),
        st.integers(0, 3),  # new connections
    ),
    max_size=25,
)


@given(steps)
def test_accounts_never_fall_and_tell_all_that_was_counted_between_looks(
    wanted: list[tuple[int, str, int]],
) -> None:
    book, standing, true, tick = Book(), 0, 0, 0.0
    open_now: dict[int, float] = {}
    begun = 0
    for packets, what, new in wanted:
        tick += 1.0
        if what == "switch restarts":
            # More than it had shown before can't be told from growth: the accounts then tell less.
            packets = min(packets, max(standing - 1, 0))
            standing, open_now = 0, {}
        if what == "service restarts":
            book = restart(book)
        standing, true = standing + packets, true + packets
        for _ in range(new):
            begun += 1
            open_now[begun] = tick - 0.4
        connections = [build_connection(n, tick - began) for n, began in open_now.items()]
        before, book = read(book), look(book, tick, standing, *connections)
        after = read(book)
        assert after.packets >= before.packets
        assert after.connections >= before.connections
        assert (after.packets, after.bytes, after.connections) == (true, 100 * true, begun)


def test_of_policies_that_come_and_go_a_bounded_number_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shortcuts, "MOST_ACCOUNTS", 3)
    book = look(Book(), 1.0, 5)
    for number in range(5):
        name = f"policy-{number}"
        policies = build_policies(**{name: MB, "backup": MB})
        counters = build_counters(policies, **{name: 1, "backup": 6 + number})
        book = record_look(book, AT + number, (2.0 + number,) * 2, counters, (), policies)
    assert ("backup", MB) in book.accounts, "it grew last"
    assert len(book.accounts) == 3


@pytest.mark.parametrize(
    "spoilt",
    [
        None,
        [],
        {},
        {**render_book(Book()), "accounts": [["backup", "2MB", 1, 1, 1, 1]]},
        {**render_book(Book()), "accounts": [["backup", "1MB", -1, 1, 1, 1]]},
        {**render_book(Book()), "accounts": [["backup", "1MB", 1, 1, 1, 1, 1]]},
        {**render_book(Book()), "meter": [1]},
        {**render_book(Book()), "triggers": {"backup": "often"}},
        {**render_book(Book()), "at": "now"},
    ],
)
def test_what_is_no_book_is_told_and_not_believed(spoilt: object) -> None:
    with pytest.raises(HairpinError, match="can't be read"):
        parse_book(spoilt)


def test_every_policy_that_may_let_go_has_an_account_and_none_is_forgotten() -> None:
    policies = build_policies(backup=RULE, plain=None, web=MB)
    kept = {("backup", MB): Account(7, 70, 700, 1), ("withdrawn", MB): Account(1, 1, 1)}
    found = build_accounts(kept, [replace(build_connection(1, 1.0), policy="web")], policies)
    told = [(one.policy, one.reason, one.limit, one.open, one.connections) for one in found]
    assert told == [
        ("backup", MB, None, 0, 7),
        ("backup", RULE, 5, 0, 0),
        ("web", MB, 5, 1, 0),
        ("withdrawn", MB, None, 0, 1),
    ]


def test_readings_that_come_late_count_nothing_twice() -> None:
    """A return reads what there is; a look that was under way, or that reading, may be told later."""
    first, second = build_connection(1, 0.5), build_connection(2, 0.2)
    book = look(Book(), 1.0, 0, first)
    book = record_seen(book, AT + 1.2, (1.1, 1.2), [replace(first, age=0.7), second])
    book = record_returned(book, [first, second])
    assert read(book) == Account(connections=2, returned=2)
    book = look(book, 1.3, 0)  # they are gone
    book = look(book, 1.4, 0, replace(first, age=0.7), replace(second, age=0.2), took=0.3)
    assert read(book) == Account(connections=2, returned=2)
    # What comes to take one afterwards is another one, by the same ends too.
    book = look(book, 4.0, 0, replace(second, age=0.3))
    assert read(book) == Account(connections=3, returned=2)


def test_what_is_gone_is_forgotten_in_time() -> None:
    book = look(Book(), 1.0, 0, *(build_connection(number, 0.5) for number in range(100)))
    assert len(book.counted or {}) == 100
    book = look(look(book, 2.0), 2.0 + shortcuts.GONE_SECONDS)
    assert book.counted == {}
