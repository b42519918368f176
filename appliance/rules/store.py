"""Revisions on disk, and the symbolic links that say which is in force.

    rules_dir/.lock                      held by whoever changes anything here
    rules_dir/.staging/                  scratch; whatever a killed run left is removed by the next
    rules_dir/state.json                 how the last update ended
    rules_dir/sources/                   the last good copy of each source
    rules_dir/<profile>/<revision>/      suricata.rules, report.json
    rules_dir/<profile>/.copies/         each revision once more, to put back what was damaged
    rules_dir/<profile>/current          -> <revision>, replaced in one rename
    rules_dir/<profile>/last-good        -> the revision before it

A revision is named after the digest of its rules, so the same rules are the same revision.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from appliance.rules.files import (
    parse_note,
    read_bounded,
    read_note,
    sync_directory,
    write_file,
    write_note,
)
from appliance.rules.model import Attempt, RevisionReport, RulesError, UpdateRunning
from steering.model import Profile

CURRENT = "current"
LAST_GOOD = "last-good"
COPIES = ".copies"
KEPT = 5
_RULES_LIMIT = 512 * 2**20
_REPORT_LIMIT = 64 * 2**20
_REVISION = re.compile(r"[0-9a-f]{16}")
_REPORT = TypeAdapter(RevisionReport)
_ATTEMPT = TypeAdapter(Attempt)


def build_revision(rules: bytes) -> str:
    return hashlib.sha256(rules).hexdigest()[:16]


class RuleStore:
    def __init__(self, root: Path) -> None:
        self.root = root

    @contextlib.contextmanager
    def lock(self) -> Iterator[Path]:
        """Hold the lock and get an empty staging directory. Raises UpdateRunning, RulesError.

        The kernel drops the lock when its holder dies, however it dies.
        """
        staging = self.root / ".staging"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.root.chmod(0o755)
            handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as fault:
            raise RulesError(
                f"{self.root}: {fault.strerror}", "make it writable for the service's user"
            ) from fault
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as held:
                raise UpdateRunning(
                    "another update of the rules is running", "wait until it has ended"
                ) from held
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(mode=0o700)
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        finally:
            os.close(handle)

    def profile_dir(self, profile: Profile) -> Path:
        return self.root / profile

    def find_linked(self, profile: Profile, link: str) -> str | None:
        """The revision that a link names; None where there is none."""
        with contextlib.suppress(OSError):
            name = os.readlink(self.profile_dir(profile) / link)
            if _REVISION.fullmatch(name):
                return name
        return None

    def rules_file(self, profile: Profile, revision: str) -> Path:
        return self.profile_dir(profile) / revision / "suricata.rules"

    def read_rules(self, profile: Profile, revision: str) -> str:
        """Raises RulesError when the revision is missing or not what its name says."""
        path = self.rules_file(profile, revision)
        try:
            data = read_bounded(path, _RULES_LIMIT)
        except OSError as fault:
            raise RulesError(f"{path}: {fault.strerror}", "update the rules") from fault
        if build_revision(data) != revision:
            raise RulesError(f"{path} was changed or torn", "update the rules")
        return data.decode()

    def is_intact(self, profile: Profile, revision: str | None) -> bool:
        if revision is None:
            return False
        try:
            self.read_rules(profile, revision)
        except RulesError:
            return False
        return True

    def report_file(self, profile: Profile, revision: str) -> Path:
        return self.profile_dir(profile) / revision / "report.json"

    def read_report(self, profile: Profile, revision: str) -> RevisionReport | None:
        """None where it is missing or damaged."""
        path = self.report_file(profile, revision)
        try:
            return _REPORT.validate_json(read_note(path, _REPORT_LIMIT))
        except (OSError, RulesError, ValidationError):
            return None

    def write_revision(self, staging: Path, report: RevisionReport, rules: bytes) -> None:
        """Make a revision complete on disk before anything can name it."""
        directory = self.profile_dir(report.profile)
        target = directory / report.revision
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        self._write_copy(report, rules)
        if self.is_intact(report.profile, report.revision):
            write_note(target / "report.json", _REPORT.dump_json(report))
            return
        shutil.rmtree(target, ignore_errors=True)
        fresh = staging / f"revision-{report.profile}"
        fresh.mkdir()
        fresh.chmod(0o755)
        write_file(fresh / "suricata.rules", rules)
        write_note(fresh / "report.json", _REPORT.dump_json(report))
        fresh.rename(target)
        sync_directory(directory)

    def _write_copy(self, report: RevisionReport, rules: bytes) -> None:
        directory = self.profile_dir(report.profile) / COPIES / report.revision
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / "suricata.rules", rules)
        write_note(directory / "report.json", _REPORT.dump_json(report))

    def find_copy(self, profile: Profile, revision: str) -> Path | None:
        """The file of a revision's copy, if it is what its name says."""
        path = self.profile_dir(profile) / COPIES / revision / "suricata.rules"
        try:
            whole = build_revision(read_bounded(path, _RULES_LIMIT)) == revision
        except (OSError, RulesError):
            return None
        return path if whole else None

    def restore_copy(self, profile: Profile, revision: str) -> bool:
        """Put a damaged revision back from the copy that is kept of each; False where that is no good."""
        copy = self.profile_dir(profile) / COPIES / revision
        target = self.profile_dir(profile) / revision
        try:
            rules = read_bounded(copy / "suricata.rules", _RULES_LIMIT)
            report = read_bounded(copy / "report.json", _REPORT_LIMIT)
            if build_revision(rules) != revision:
                return False
            _REPORT.validate_json(parse_note(report))
            target.mkdir(mode=0o755, exist_ok=True)
            write_file(target / "report.json", report)
            write_file(target / "suricata.rules", rules)
        except (OSError, RulesError, ValueError):
            return False
        return True

    def write_link(self, profile: Profile, link: str, revision: str | None) -> None:
        """Point a link at a revision in one step; None removes it."""
        directory = self.profile_dir(profile)
        if revision is None:
            (directory / link).unlink(missing_ok=True)
        else:
            fresh = directory / f".{link}.new"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(revision)
            fresh.replace(directory / link)
        sync_directory(directory)

    def remove_old(self, profile: Profile) -> None:
        """Keep the newest KEPT revisions, and whatever a link names."""
        linked = {self.find_linked(profile, link) for link in (CURRENT, LAST_GOOD)}
        found = []
        for path in self.profile_dir(profile).iterdir():
            if _REVISION.fullmatch(path.name) and path.is_dir():
                found.append((path.stat().st_mtime, path))
        kept = KEPT - len({path.name for _, path in found} & linked)
        others = sorted((item for item in found if item[1].name not in linked), reverse=True)
        for _, path in others[kept:]:
            shutil.rmtree(path, ignore_errors=True)
            shutil.rmtree(path.parent / COPIES / path.name, ignore_errors=True)

    def read_attempt(self) -> Attempt | None:
        try:
            return _ATTEMPT.validate_json(read_bounded(self.root / "state.json", 2**20))
        except (OSError, RulesError, ValidationError):
            return None

    def write_attempt(self, attempt: Attempt) -> None:
        write_file(self.root / "state.json", _ATTEMPT.dump_json(attempt))
