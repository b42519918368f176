"""Which ruleset an engine may start on: one that is on disk exactly as it was made.

A revision is named after the digest of its rules (`appliance.rules.store`), so a torn or changed file is
told by its name. The one in force comes first, then its copy, then the one before it. Reads files; blocks
shortly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from appliance.inspection import files
from appliance.rules.store import CURRENT, LAST_GOOD, RuleStore
from steering.model import Profile

UNLOADABLE = "the engine does not load the ruleset"
"""How the fault begins of an engine that was started on the ruleset before the one in force."""


@dataclass(frozen=True, slots=True)
class Ruleset:
    """A ruleset that is whole. `path` is what the engine is given, `wanted` how many rules the trial

    loaded from it (0: not known). `fault` says why it is not the one in force, or is "".
    """

    path: Path
    revision: str
    wanted: int
    fault: str = ""


class Rulesets:
    """One lane's rulesets."""

    def __init__(self, root: Path, profile: Profile) -> None:
        self.store = RuleStore(root)
        self.profile = profile
        self._wanted: dict[str, int] = {}

    def find_whole(self, refused: str = "") -> Ruleset | str:
        """The ruleset to start on; where there is none, why. `refused` did not load the last time."""
        current = self.store.find_linked(self.profile, CURRENT)
        # By the link, so that a live reload finds what is put in force later.
        linked = self.store.profile_dir(self.profile) / CURRENT / "suricata.rules"
        whole = current is not None and self._is_usable(current)
        in_force = Ruleset(linked.absolute(), current or "", self.find_wanted(current or ""))
        if whole and current != refused:
            return in_force
        if whole:
            reason = f"{UNLOADABLE} at {linked}"
        elif files.read_fingerprint(linked) is not None:
            reason = f"the ruleset at {linked} was changed or torn"
        else:
            reason = f"no ruleset at {linked}"
        if not whole and current is not None:
            # The same rules: nothing to tell but what `serve` tells when it puts the file back.
            copy = self.store.find_copy(self.profile, current)
            if copy is not None and current != refused:
                return Ruleset(copy.absolute(), current, self.find_wanted(current))
        former = self.store.find_linked(self.profile, LAST_GOOD)
        if former is None or former == current or not self._is_usable(former):
            return in_force if whole else reason
        path = self.store.rules_file(self.profile, former).absolute()
        fault = f"{reason}; the one before it is inspected by"
        return Ruleset(path, former, self.find_wanted(former), fault)

    def is_whole(self, ruleset: Ruleset) -> bool:
        """Whether that revision still stands, and as the one in force where it was that."""
        if not self._is_usable(ruleset.revision):
            return False
        return bool(ruleset.fault) or (
            self.store.find_linked(self.profile, CURRENT) == ruleset.revision
        )

    def _is_usable(self, revision: str) -> bool:
        there = files.read_fingerprint(self.store.rules_file(self.profile, revision))
        return there is not None and self.store.is_intact(self.profile, revision)

    def find_floor(self) -> int:
        """Fewer rules than this come from no ruleset in force: the least of this one and the one before."""
        revisions = (self.store.find_linked(self.profile, link) for link in (CURRENT, LAST_GOOD))
        wanted = [self.find_wanted(one) for one in revisions if one is not None]
        return min((count for count in wanted if count), default=1)

    def find_wanted_now(self) -> int:
        """How many rules the one in force should give an engine; 0: not known."""
        current = self.store.find_linked(self.profile, CURRENT)
        return self.find_wanted(current) if current is not None else 0

    def find_wanted(self, revision: str) -> int:
        """How many rules the trial loaded from a revision; 0 when its report can't be read."""
        if revision not in self._wanted:
            report = self.store.read_report(self.profile, revision)
            if report is None:
                return 0
            self._wanted = {**dict(list(self._wanted.items())[-8:]), revision: report.loaded}
        return self._wanted[revision]

    def read_fingerprints(self) -> tuple[object, ...]:
        """What changes when another ruleset may stand there."""
        directory = self.store.profile_dir(self.profile)
        return tuple(
            files.read_fingerprint(directory / link / "suricata.rules")
            for link in (CURRENT, LAST_GOOD)
        )
