"""How old the rules in force are, and whether that is too old. Pure; times are passed in.

What counts is when a source was last *read*, whether or not it had anything new: rules that were
looked at yesterday are fresh. One source that is not read any more makes all of them old: what it
would have brought is missing. The starter rules come with the program and say when they were made; they
count only where there is nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.rules.model import STARTER, RevisionReport, RulesState

CLOCK_SLACK = 3600.0
"""Seconds that a clock may be behind the rules before it is told to be wrong."""
DAY = 86400.0


@dataclass(frozen=True, slots=True)
class RulesAge:
    """``since``: of the oldest source. ``starter_only``: nothing else is in force."""

    since: float
    source: str
    starter_only: bool


def find_age(state: RulesState) -> RulesAge | None:
    """Of the oldest source in any profile's ruleset; None while no ruleset tells."""
    ages = [age for one in state.profiles if one.report and (age := find_report_age(one.report))]
    return min(ages, key=lambda age: (age.starter_only, age.since), default=None)


def find_report_age(report: RevisionReport) -> RulesAge | None:
    # What gave nothing has no age: it is told as stale, and why, by its own name.
    given = [one for one in report.sources if one.fetched > 0]
    read = [one for one in given if one.name != STARTER]
    counted = read or given
    oldest = min(counted, key=lambda one: one.fetched, default=None)
    return None if oldest is None else RulesAge(oldest.fetched, oldest.name, not read)


def judge_age(age: RulesAge, now: float, stale_after: float | None) -> str:
    """Why the rules are not fresh; empty while they are. ``stale_after`` in seconds, None: never."""
    if stale_after is None:
        return ""
    if now < age.since - CLOCK_SLACK:
        return (
            f"the rules were read {render_age(age.since - now)} from now by this machine's clock: how "
            "old they are can't be told"
        )
    if now - age.since < stale_after:
        return ""
    what = "were made" if age.starter_only else f"of {age.source} were last read"
    return (
        f"the rules {what} {render_age(now - age.since)} ago; they count as fresh for "
        f"{render_age(stale_after)}"
    )


def render_age(seconds: float) -> str:
    """As in `3 days`, `5 hours`: in whole units, so that it is told anew only when one is over."""
    for size, name in ((DAY, "day"), (3600.0, "hour"), (60.0, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' if count != 1 else ''}"
    return "less than a minute"
