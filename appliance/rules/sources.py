"""Reading rule sources, and keeping the last good copy of each.

A source that can't be read now, or that suddenly serves no rule at all, keeps its copy and is named as
stale; one that has no copy yet stops the update. Nothing is ever left out in silence.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import TypeAdapter, ValidationError

from appliance.rules.archive import ARCHIVE_LIMIT, read_rule_files
from appliance.rules.check import SourceRules, build_source
from appliance.rules.command import Updater
from appliance.rules.files import read_bounded, read_note, write_file, write_note
from appliance.rules.model import STARTER, RulesError, SourceReport, SourceUnavailable
from appliance.settings import RuleSource
from steering.errors import CommandFailed


@dataclass(frozen=True, slots=True)
class _Copy:
    """Which copy of a source is kept: `<sha256>.feed` beside this record."""

    sha256: str
    fetched: float


_COPY = TypeAdapter(_Copy)


def render_url(source: RuleSource) -> str:
    """The source's address as it may be shown: without user, password and query."""
    if source.url is None:
        return f"index:{source.name}"
    parts = urlsplit(source.url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _read_file_source(url: str) -> bytes:
    path = Path(unquote(urlsplit(url).path))
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as opened:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise RulesError(f"{path} is no regular file", "name a rule file or an archive")
            data = opened.read(ARCHIVE_LIMIT + 1)
    except OSError as fault:
        raise RulesError(f"{path}: {fault.strerror}", "check its path and permissions") from fault
    return data


WIRE = "hairpin-wire.rules"
"""Of the starter rules, those without which packets that the engine can't read would pass unread."""


def read_starter(engine_data: Path, *, wanted: bool = True) -> tuple[SourceRules, SourceReport]:
    """The starter rules; where they are not ``wanted``, those of `WIRE` alone.

    Raises RulesError: they are part of the program, and all of them must pass.
    """
    directory = engine_data / "rules"
    pattern = "*.rules" if wanted else WIRE
    try:
        files = [(path.name, path.read_bytes()) for path in sorted(directory.glob(pattern))]
        newest = max((path.stat().st_mtime for path in directory.glob(pattern)), default=0.0)
    except OSError as fault:
        raise RulesError(
            f"{directory}: {fault.strerror}", "install the engine data again"
        ) from fault
    rules = build_source(STARTER, files, starter=True)
    if rules.left_out or not rules.enabled:
        reason = rules.left_out[0].reason if rules.left_out else "no rules"
        raise RulesError(f"starter rules in {directory}: {reason}", "install the engine data again")
    digest = hashlib.sha256(b"".join(data for _, data in files)).hexdigest()
    return rules, SourceReport(
        STARTER, directory.as_uri(), digest, newest, rules=len(rules.enabled)
    )


class SourceCache:
    """The copies, one directory for each source under ``root``."""

    def __init__(self, root: Path, updater: Updater, clock: Callable[[], float]) -> None:
        self._root = root
        self._updater = updater
        self._clock = clock

    def _directory(self, source: RuleSource) -> Path:
        # A source that changes its address under its old name must not be served by the old copy.
        told = hashlib.sha256(f"{source.name}\n{source.url}".encode()).hexdigest()[:12]
        return self._root / f"{source.name.replace('/', '-')}.{told}"

    async def read(self, source: RuleSource, work: Path) -> tuple[SourceRules, SourceReport]:
        """The source's checked rules, as it serves them now or from the copy that is kept.

        ``work`` is scratch space. Raises SourceUnavailable when there is neither.
        """
        try:
            if source.url is not None and source.url.startswith("file://"):
                data = await asyncio.to_thread(_read_file_source, source.url)
            else:
                data = await self._updater.run_fetch(source.name, source.url, work)
            rules = await asyncio.to_thread(self._parse, source, data)
        except (RulesError, CommandFailed) as fault:
            return await asyncio.to_thread(self._read_copy, source, fault)
        copy = _Copy(hashlib.sha256(data).hexdigest(), self._clock())
        self._write_copy(source, data, copy)
        return rules, self._report(source, rules, copy)

    async def read_kept(self, source: RuleSource) -> tuple[SourceRules, SourceReport]:
        """The copy that is kept, without asking the source; no rules, and told so, where there is none."""
        try:
            rules, report = await asyncio.to_thread(self._read_copy, source, RulesError(""))
        except SourceUnavailable as missing:
            empty = SourceRules(source.name, (), (), {}, ())
            never = isinstance(missing.__cause__, FileNotFoundError)
            fault = "it was never read" if never else f"its copy is of no use: {missing.__cause__}"
            return empty, SourceReport(
                source.name, render_url(source), "", 0.0, rules=0, stale=True, fault=fault
            )
        return rules, replace(report, stale=False, fault="")

    def _parse(self, source: RuleSource, data: bytes) -> SourceRules:
        rules = build_source(source.name, read_rule_files(data))
        if not rules.enabled:
            raise RulesError(f"source {source.name} has no rules", "check what it serves")
        return rules

    def _report(
        self, source: RuleSource, rules: SourceRules, copy: _Copy, fault: str = ""
    ) -> SourceReport:
        return SourceReport(
            name=source.name,
            url=render_url(source),
            sha256=copy.sha256,
            fetched=copy.fetched,
            rules=len(rules.enabled),
            stale=bool(fault),
            fault=fault,
        )

    def _write_copy(self, source: RuleSource, data: bytes, copy: _Copy) -> None:
        directory = self._directory(source)
        directory.mkdir(parents=True, exist_ok=True)
        feed = directory / f"{copy.sha256}.feed"
        write_file(feed, data)
        write_note(directory / "copy.json", _COPY.dump_json(copy))
        for other in directory.glob("*.feed"):
            if other != feed:
                other.unlink(missing_ok=True)

    def _read_copy(
        self, source: RuleSource, fault: RulesError | CommandFailed
    ) -> tuple[SourceRules, SourceReport]:
        directory = self._directory(source)
        reason = fault.reason if isinstance(fault, RulesError) else str(fault)
        try:
            copy = _COPY.validate_json(read_note(directory / "copy.json", 4096))
            data = read_bounded(directory / f"{copy.sha256}.feed", ARCHIVE_LIMIT)
            if hashlib.sha256(data).hexdigest() != copy.sha256:
                raise RulesError("the kept copy is damaged")
            rules = self._parse(source, data)
        except (OSError, ValidationError, RulesError) as missing:
            kept = (
                "no copy of it is kept"
                if isinstance(missing, FileNotFoundError)
                else f"its copy is of no use: {missing}"
            )
            raise SourceUnavailable(
                f"rule source {source.name}: {reason}, and {kept}",
                "make it reachable, or take it out of rules.sources; "
                "the rules in force stay as they are",
            ) from missing
        return rules, self._report(source, rules, copy, reason)
