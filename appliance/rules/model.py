"""Frozen values of the rule pipeline, and its failures.

Times are seconds since the epoch, durations seconds. A rule's key is ``gid:sid`` as Suricata has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from steering.errors import HairpinError
from steering.model import Profile

STARTER = "hairpin/starter"
BUNDLE = "hairpin/bundle"
STARTER_SIDS = range(4_850_000, 4_851_000)
LEFT_OUT_LIMIT = 2_000


class RulesError(HairpinError):
    """A ruleset could not be built, tested or stored; what was in force still is."""


class SourceUnavailable(RulesError):
    """A rule source could not be read and no earlier copy of it is kept."""


class UpdateRunning(RulesError):
    """Another update holds the lock."""


class RulesetRefused(RulesError):
    """Suricata's own test refused the ruleset, or it has too few rules."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule as its text says it. Option names are lower case, values as written."""

    text: str
    action: str
    protocol: str
    options: tuple[tuple[str, str], ...]
    gid: int
    sid: int
    rev: int

    @property
    def key(self) -> str:
        return f"{self.gid}:{self.sid}"

    def find(self, name: str) -> str:
        """The value of the first option of that name; empty where there is none."""
        return next((value for option, value in self.options if option == name), "")

    @property
    def msg(self) -> str:
        return self.find("msg").strip('"')

    @property
    def silent(self) -> bool:
        """It never alerts (``noalert``): it exists for other rules to build on."""
        return any(
            name == "noalert" or (name == "flowbits" and value.strip().lower() == "noalert")
            for name, value in self.options
        )


@dataclass(frozen=True, slots=True)
class Unparsed:
    """A line that is no rule, and why."""

    reason: str
    sid: int | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A rule that its source has enabled and that is not in the ruleset."""

    sid: int | None
    msg: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What became of one source. ``stale``: it could not be read now, ``fault`` says why, its copy
    of ``fetched`` was used. ``rules`` are those it has enabled and that passed the checks.
    """

    name: str
    url: str
    sha256: str
    fetched: float
    rules: int
    stale: bool = False
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Changed:
    added: int = 0
    removed: int = 0
    modified: int = 0

    @property
    def any(self) -> bool:
        return bool(self.added or self.removed or self.modified)


@dataclass(frozen=True, slots=True)
class RevisionReport:
    """`report.json` of a revision. ``left_out`` holds at most LEFT_OUT_LIMIT of ``left_out_count``.

    ``keys`` is source name -> keys of its rules in the ruleset. ``skipped`` rules are those whose
    ``requires`` this Suricata does not meet. ``loaded`` counts the canary's and the shortcut's rules too, ``drops``
    does not. ``rewritten``: rules that are in force otherwise than their source has them, and how.
    """

    profile: Profile
    revision: str
    created: float
    sha256: str
    loaded: int
    skipped: int
    drops: int
    sources: tuple[SourceReport, ...]
    left_out: tuple[LeftOut, ...]
    left_out_count: int
    keys: Mapping[str, tuple[str, ...]]
    rewritten: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """What an update did for one profile. ``refused`` is the engine's reason, empty when it took it;
    a refused revision is not in force.
    """

    profile: Profile
    revision: str
    loaded: int
    drops: int
    left_out: tuple[LeftOut, ...]
    left_out_count: int
    changed: Changed
    seconds: float
    refused: str = ""
    rewritten: tuple[LeftOut, ...] = ()

    @property
    def in_force(self) -> bool:
        return not self.refused


@dataclass(frozen=True, slots=True)
class UpdateReport:
    profiles: tuple[ProfileReport, ...]
    sources: tuple[SourceReport, ...]
    at: float
    seconds: float

    @property
    def ok(self) -> bool:
        """Every profile's ruleset is in force (a stale source is still a success)."""
        return all(profile.in_force for profile in self.profiles)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The engine refused ``revision``; the one before it was put back."""

    revision: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """`state.json`: how the last update ended. ``fault`` is empty when it did not fail."""

    at: float
    fault: str = ""
    mend: str = ""
    refusals: Mapping[str, Refusal] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProfileState:
    """``revision`` is None while there is no ruleset yet, ``report`` while its report is unreadable."""

    profile: Profile
    revision: str | None
    last_good: str | None
    report: RevisionReport | None
    refused: Refusal | None


@dataclass(frozen=True, slots=True)
class RulesState:
    profiles: tuple[ProfileState, ...]
    attempt: Attempt | None


@dataclass(frozen=True, slots=True)
class RuleInfo:
    """A rule of a ruleset in force, as people ask for it. ``cves`` are as in ``CVE-2021-44228``."""

    sid: int
    gid: int
    rev: int
    action: str
    msg: str
    cves: tuple[str, ...]
    products: tuple[str, ...]
    classtype: str
    severity: str
    source: str
    text: str


@dataclass(frozen=True, slots=True)
class ReloadVerdict:
    """The engine's answer to a new ruleset, and why when it does not take it."""

    accepted: bool
    reason: str = ""
