"""From sources to a ruleset in force: read, check, merge, test, store, flip, and ask the engine.

What is in force is replaced last, in one rename, and put back when the engine refuses it; a failure
before that changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from appliance.rules.bundled import BundleReader
from appliance.rules.canary import CANARY_KEY, find_token, seal_rules
from appliance.rules.check import SourceRules, finish_rules
from appliance.rules.command import Updater, find_updater, find_version
from appliance.rules.merge import build_changed, build_keys, find_missing
from appliance.rules.model import (
    BUNDLE,
    LEFT_OUT_LIMIT,
    STARTER,
    Attempt,
    Changed,
    LeftOut,
    ProfileReport,
    ProfileState,
    Refusal,
    ReloadVerdict,
    RevisionReport,
    Rule,
    RuleInfo,
    RulesError,
    RulesetRefused,
    RulesState,
    SourceReport,
    UpdateReport,
)
from appliance.rules.parse import build_info, parse_cve, parse_rule
from appliance.rules.shortcut import RULE_BIT, SHORTCUT_KEYS, build_shortcut_rules
from appliance.rules.sources import SourceCache, read_starter
from appliance.rules.store import CURRENT, LAST_GOOD, RuleStore, build_revision
from appliance.rules.trial import find_loadable, render_rules, write_test_config
from appliance.settings import Settings
from steering.errors import CommandFailed, HairpinError
from steering.model import Profile

log = structlog.get_logger("rules")

OWN_KEYS = SHORTCUT_KEYS | {CANARY_KEY}
"""Rules that no source gave: nobody is shown them."""
Reload = Callable[[str, Path], Awaitable[ReloadVerdict]]
Progress = Callable[[str], None]
Gathered = tuple[tuple[SourceRules, SourceReport], ...]


@dataclass(frozen=True, slots=True)
class _Built:
    """A tested ruleset that is not in force yet."""

    report: RevisionReport
    rules: str
    changed: Changed
    seconds: float


class RulePipeline:
    """The rulesets of every profile that has a lane.

    ``engine_data`` is the `suricata` directory. ``test_config`` gives the configuration that a
    profile's engine runs on; None takes a small one of our own. ``trial``: no engine will run on what comes into
    force, and nobody is told that one does. All that changes anything holds a
    lock, also against other processes.
    """

    def __init__(
        self,
        settings: Settings,
        engine_data: Path,
        test_config: Callable[[Profile], Path] | None,
        suricata: Path,
        clock: Callable[[], float] = time.time,
        *,
        trial: bool = False,
    ) -> None:
        self._settings = settings
        self._done = "passed its trial" if trial else "in force"
        self._engine_data = engine_data
        self._test_config = test_config
        self._suricata = suricata
        self._clock = clock
        self._store = RuleStore(settings.rules_dir)
        self._sources_dir = self._store.root / "sources"
        bundle = settings.rules.bundle
        self._bundle = None if bundle is None else BundleReader(bundle, self._sources_dir)
        self._profiles = tuple(dict.fromkeys(lane.profile for lane in settings.lanes))
        self._found: dict[tuple[Profile, str], tuple[RuleInfo, ...]] = {}
        self._tokens: dict[str, str | None] = {}
        self._whole: dict[Profile, tuple[object, ...]] = {}

    # Changing

    async def update(self, progress: Progress, reload: Reload | None = None) -> UpdateReport:
        """Read every source anew and put a tested ruleset in force for each profile.

        ``progress`` gets one sentence a step. ``reload`` asks a profile's engine to load the file;
        when it refuses, the former ruleset is put back and loaded, and the report says so. Raises
        RulesError (SourceUnavailable, UpdateRunning, RulesetRefused) or CommandFailed: then nothing
        has changed.
        """
        started = time.monotonic()
        with self._store.lock() as staging:
            try:
                updater = await self._find_updater()
                gathered = await self._gather(updater, staging, progress)
                built = await self._build_all(
                    updater, gathered, staging, progress, self._settings.rules.floor
                )
                profiles = [await self._put_in_force(one, reload, progress) for one in built]
            except (RulesError, CommandFailed, OSError) as fault:
                self._note_failure(fault)
                if isinstance(fault, OSError):
                    raise RulesError(
                        f"rules can't be stored: {fault}", "check the disk of stateDir"
                    ) from fault
                raise
            return UpdateReport(
                profiles=tuple(profiles),
                sources=tuple(report for _, report in gathered),
                at=self._clock(),
                seconds=time.monotonic() - started,
            )

    async def ensure(self) -> tuple[Profile, ...]:
        """Leave every profile with an intact ruleset, from what is on this machine.

        Gives the profiles whose ruleset had been damaged.

        One that was damaged is put back from its copy, else the last good one; a profile without any
        gets the starter rules, or where those are too few or not wanted, what the sources give. None
        comes into force below the floor. Raises as `update`.
        """
        if all(self._is_in_force(profile) for profile in self._profiles):
            return ()
        damaged = []
        with self._store.lock() as staging:
            wanted = []
            for profile in self._profiles:
                if self._is_in_force(profile):
                    continue
                if (revision := self._store.find_linked(profile, CURRENT)) is not None:
                    damaged.append(profile)
                    if self._store.restore_copy(profile, revision):
                        log.warning("ruleset damaged, put back from its copy", profile=profile)
                        continue
                former = self._store.find_linked(profile, LAST_GOOD)
                if former is not None and self._is_good(profile, former):
                    log.warning("ruleset damaged, last good one put back", profile=profile)
                    self._store.write_link(profile, CURRENT, former)
                else:
                    wanted.append(profile)
            if wanted:
                for one in await self._build_first(staging, wanted):
                    await self._put_in_force(one, None, lambda _: None)
        return tuple(damaged)

    async def adopt_bundle(self, reload: Reload | None = None) -> SourceReport | None:
        """Put the bundle of the appliance's disk in force, where another one is, or none.

        Asks no source: of those the copies are taken that are kept. Gives what became of the bundle, None
        where all was as it is. Raises as `update`.
        """
        if self._bundle is None:
            return None
        with self._store.lock() as staging:
            bundled = await asyncio.to_thread(self._bundle.read)
            if all(self._has(profile, bundled[1]) for profile in self._profiles):
                return None
            try:
                updater = await self._find_updater()
                gathered = await self._gather(updater, staging, lambda _: None, bundled)
                floor = self._settings.rules.floor
                built = await self._build_all(updater, gathered, staging, lambda _: None, floor)
                reports = [await self._put_in_force(one, reload, lambda _: None) for one in built]
            except (RulesError, CommandFailed, OSError) as fault:
                self._note_failure(fault)
                raise
            if refused := [f"{one.profile}: {one.refused}" for one in reports if one.refused]:
                raise RulesetRefused("; ".join(refused), "the last good rules are in force")
            return bundled[1]

    def _has(self, profile: Profile, bundled: SourceReport) -> bool:
        revision = self._store.find_linked(profile, CURRENT)
        report = self._store.read_report(profile, revision) if revision else None
        if report is None:
            return False
        found = next((one for one in report.sources if one.name == BUNDLE), None)
        return found == bundled or (found is None and not bundled.rules and not bundled.fault)

    async def _build_first(self, staging: Path, wanted: Sequence[Profile]) -> list[_Built]:
        updater = await self._find_updater()
        floor = self._settings.rules.floor
        if self._settings.rules.starter:
            starter: Gathered = (read_starter(self._engine_data),)
            enough = len(starter[0][0].enabled) >= floor
            if enough or not self._settings.rules.sources:
                return await self._build_all(
                    updater, starter, staging, lambda _: None, floor, wanted
                )
        gathered = await self._gather(updater, staging, lambda _: None)
        return await self._build_all(updater, gathered, staging, lambda _: None, floor, wanted)

    def _is_good(self, profile: Profile, revision: str) -> bool:
        """Intact, if need be from its copy, and not below the floor."""
        store = self._store
        whole = store.is_intact(profile, revision) and store.read_report(profile, revision)
        if not whole and not store.restore_copy(profile, revision):
            return False
        report = store.read_report(profile, revision)
        return report is not None and report.loaded > self._settings.rules.floor

    def _is_in_force(self, profile: Profile) -> bool:
        """Read anew only when the file was touched: it is asked every two seconds."""
        revision = self._store.find_linked(profile, CURRENT)
        if revision is None:
            return False
        store = self._store
        try:
            found = [
                path.stat()
                for path in (
                    store.rules_file(profile, revision),
                    store.report_file(profile, revision),
                )
            ]
        except OSError:
            return False
        mark = (
            revision,
            *((one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in found),
        )
        if self._whole.get(profile) != mark:
            if not store.is_intact(profile, revision):
                return False
            if store.read_report(profile, revision) is None:
                return False  # by it is told how many rules there should be, and how old they are
            self._whole[profile] = mark
        return True

    async def _find_updater(self) -> Updater:
        version = await find_version(self._suricata)
        return Updater(find_updater(), self._engine_data, self._suricata, version)

    def _note_failure(self, fault: RulesError | CommandFailed | OSError) -> None:
        mend = "" if isinstance(fault, OSError) else fault.mend
        reason = fault.reason if isinstance(fault, RulesError | CommandFailed) else str(fault)
        before = self._store.read_attempt()
        refusals = before.refusals if before else {}
        try:
            self._store.write_attempt(Attempt(self._clock(), reason, mend, refusals))
        except OSError as unwritten:
            log.error("failure of the update can't be noted", reason=reason, fault=str(unwritten))

    async def _gather(
        self,
        updater: Updater,
        staging: Path,
        progress: Progress,
        bundled: tuple[SourceRules, SourceReport] | None = None,
    ) -> Gathered:
        """Every source's rules. ``bundled``: the bundle as it was read; then no source is asked."""
        gathered: list[tuple[SourceRules, SourceReport]] = []
        starter, sources = self._settings.rules.starter, self._settings.rules.sources
        if not starter and not sources and self._bundle is None:
            raise RulesError(
                "there is no source of rules", "name one in rules.sources, or set rules.starter"
            )
        gathered.append(await asyncio.to_thread(read_starter, self._engine_data, wanted=starter))
        offline = bundled is not None
        if self._bundle is not None:
            if bundled is None:
                bundled = await asyncio.to_thread(self._bundle.read)
            if bundled[1].rules or bundled[1].fault:
                gathered.append(bundled)
        cache = SourceCache(self._sources_dir, updater, self._clock)
        for number, source in enumerate(sources):
            progress(f"reading source {source.name}")
            if offline:
                rules, report = await cache.read_kept(source)
            else:
                rules, report = await cache.read(source, staging / f"fetch-{number}")
            if report.stale:
                progress(f"source {source.name} is stale: {report.fault}")
                log.warning("rule source is stale", source=source.name, fault=report.fault)
            gathered.append((rules, report))
        return tuple(gathered)

    async def _build_all(
        self,
        updater: Updater,
        gathered: Gathered,
        staging: Path,
        progress: Progress,
        floor: int,
        profiles: Sequence[Profile] | None = None,
    ) -> list[_Built]:
        files = await asyncio.to_thread(self._stage_sources, gathered, staging)
        built: list[_Built] = []
        # What one profile's test refused is left out of the next before its own test.
        known: dict[str, LeftOut] = {}
        for profile in self._profiles if profiles is None else profiles:
            one = await self._build(
                updater, gathered, files, profile, staging / profile, progress, floor, known
            )
            built.append(one)
        return built

    def _stage_sources(self, gathered: Gathered, staging: Path) -> tuple[Path, ...]:
        directory = staging / "sources"
        directory.mkdir()
        files = []
        for number, (source, _) in enumerate(gathered):
            file = directory / f"{number:03d}.rules"
            lines = [*source.enabled, *(f"# {line}" for line in source.disabled)]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            files.append(file)
        return tuple(files)

    async def _build(
        self,
        updater: Updater,
        gathered: Gathered,
        files: tuple[Path, ...],
        profile: Profile,
        work: Path,
        progress: Progress,
        floor: int,
        known: dict[str, LeftOut],
    ) -> _Built:
        started = time.monotonic()
        work.mkdir()
        if self._test_config is None:
            config = write_test_config(self._engine_data, work / "test.yaml")
        else:
            config = self._test_config(profile)
        progress(f"{profile}: merging {sum(len(source.enabled) for source, _ in gathered)} rules")
        lines = await updater.run_merge(profile, files, config, work)
        shortcut = any(
            lane.profile is profile and lane.leg_c is not None for lane in self._settings.lanes
        )
        rules, spoiled, rewritten = await asyncio.to_thread(
            finish_rules, lines, profile, shortcut=shortcut
        )
        if rewritten:
            progress(f"{profile}: {len(rewritten)} rules had `bypass`, which is taken out")
        merged = {rule.key: rule for rule in rules}
        sources = [source for source, _ in gathered]
        named = frozenset(f"1:{one.sid}" for one in spoiled)
        owners, missing = find_missing(sources, merged, named)
        progress(f"{profile}: testing {len(rules)} rules")
        candidates = tuple(rule for rule in rules if rule.key not in known)
        loadable, trial, refused = await find_loadable(
            self._suricata, config, candidates, work, owners
        )
        inherited = [known[key] for key in merged if key in known]
        known.update((rule.key, one) for one in refused for rule in rules if rule.sid == one.sid)
        if trial.loaded < floor:
            raise RulesetRefused(
                f"{profile}: {trial.loaded} rules, fewer than the floor of {floor}",
                "check the sources, or lower rules.floor",
            )
        if broken := [one for one in refused if one.source == STARTER]:
            raise RulesetRefused(
                f"starter rule {broken[0].sid}: {broken[0].reason}",
                "report it: all of them must load",
            )
        left_out = [one for source in sources for one in source.left_out]
        left_out += [*missing, *spoiled, *inherited, *refused]
        left_out.sort(key=lambda one: (one.source, one.sid or 0, one.reason))
        own: tuple[str, ...] = ()
        if shortcut:
            own = build_shortcut_rules(by_rule=any(RULE_BIT in rule.text for rule in loadable))
        text = seal_rules(render_rules(loadable) + "".join(f"{line}\n" for line in own))
        before = await asyncio.to_thread(self._read_current, profile)
        return _Built(
            report=RevisionReport(
                profile=profile,
                revision=build_revision(text.encode()),
                created=self._clock(),
                sha256=hashlib.sha256(text.encode()).hexdigest(),
                loaded=trial.loaded + len(own) + 1,  # the canary's
                skipped=trial.skipped,
                drops=sum(rule.action == "drop" for rule in loadable),
                sources=tuple(report for _, report in gathered),
                left_out=tuple(left_out[:LEFT_OUT_LIMIT]),
                left_out_count=len(left_out),
                keys=build_keys(loadable, owners),
                rewritten=tuple(rewritten[:LEFT_OUT_LIMIT]),
            ),
            rules=text,
            changed=build_changed(before, {rule.key: rule.text for rule in loadable}),
            seconds=time.monotonic() - started,
        )

    def _read_current(self, profile: Profile) -> dict[str, str]:
        revision = self._store.find_linked(profile, CURRENT)
        if not self._store.is_intact(profile, revision):
            return {}
        lines = self._store.read_rules(profile, str(revision)).splitlines()
        rules = (parse_rule(line) for line in lines)
        return {
            rule.key: rule.text
            for rule in rules
            if isinstance(rule, Rule) and rule.key not in OWN_KEYS
        }

    async def _put_in_force(
        self, built: _Built, reload: Reload | None, progress: Progress
    ) -> ProfileReport:
        """Store, flip, ask the engine; flip back when it refuses."""
        report = built.report
        profile = report.profile
        store = self._store
        store.write_revision(
            store.root / ".staging", report, await asyncio.to_thread(built.rules.encode)
        )
        former = store.find_linked(profile, CURRENT)
        if not store.is_intact(profile, former):
            former = None
        before_that = store.find_linked(profile, LAST_GOOD)
        refusal: Refusal | None = None
        if former == report.revision:
            progress(f"{profile}: unchanged")
        else:
            if former is not None:
                store.write_link(profile, LAST_GOOD, former)
            store.write_link(profile, CURRENT, report.revision)
            progress(f"{profile}: revision {report.revision} {self._done}, {report.loaded} rules")
            if reload is not None:
                refusal = await self._ask(reload, profile, report.revision, former, before_that)
                if refusal is not None:
                    progress(f"{profile}: the engine refused it: {refusal.reason}")
        attempt = store.read_attempt()
        refusals = {} if attempt is None else dict(attempt.refusals)
        refusals.pop(profile, None)
        if refusal is not None:
            refusals[profile] = refusal
        fault = "" if refusal is None else f"{profile}: the engine refused the ruleset"
        mend = "" if refusal is None else "see its reason, mend the source and update again"
        store.write_attempt(Attempt(self._clock(), fault, mend, refusals))
        store.remove_old(profile)
        return ProfileReport(
            profile=profile,
            revision=report.revision,
            loaded=report.loaded,
            drops=report.drops,
            left_out=report.left_out,
            left_out_count=report.left_out_count,
            changed=built.changed,
            seconds=built.seconds,
            refused="" if refusal is None else refusal.reason,
            rewritten=report.rewritten,
        )

    async def _ask(
        self,
        reload: Reload,
        profile: Profile,
        revision: str,
        former: str | None,
        before_that: str | None,
    ) -> Refusal | None:
        path = self._store.profile_dir(profile) / CURRENT / "suricata.rules"
        try:
            verdict = await self._ask_once(reload, profile, path)
        except BaseException:
            # Nobody knows what the engine did: its next start must find what it last ran on.
            self._put_back(profile, former, before_that)
            raise
        if verdict.accepted:
            return None
        refusal = Refusal(revision, verdict.reason or "no reason given", self._clock())
        log.error("engine refused the ruleset", profile=profile, reason=refusal.reason)
        if former is None:
            # Nothing to go back to: the tested ruleset stays for the engine's next start.
            return refusal
        self._put_back(profile, former, before_that)
        again = await self._ask_once(reload, profile, path)
        if not again.accepted:
            reason = f"{refusal.reason}; the former ruleset was not loaded again: {again.reason}"
            refusal = replace(refusal, reason=reason)
        return refusal

    async def _ask_once(self, reload: Reload, profile: Profile, path: Path) -> ReloadVerdict:
        try:
            return await reload(profile, path)
        except HairpinError as fault:
            return ReloadVerdict(accepted=False, reason=str(fault))

    def _put_back(self, profile: Profile, former: str | None, before_that: str | None) -> None:
        if former is not None:
            self._store.write_link(profile, CURRENT, former)
            self._store.write_link(profile, LAST_GOOD, before_that)

    # Reading

    def read_state(self) -> RulesState:
        attempt = self._store.read_attempt()
        states = []
        for profile in self._profiles:
            revision = self._store.find_linked(profile, CURRENT)
            states.append(
                ProfileState(
                    profile=profile,
                    revision=revision,
                    last_good=self._store.find_linked(profile, LAST_GOOD),
                    report=self._store.read_report(profile, revision) if revision else None,
                    refused=attempt.refusals.get(profile) if attempt else None,
                )
            )
        return RulesState(tuple(states), attempt)

    def find_token(self, profile: Profile) -> str | None:
        """What the canary's rule of the ruleset in force carries; None without one. Raises RulesError."""
        revision = self._store.find_linked(profile, CURRENT)
        if revision is None:
            return None
        if revision not in self._tokens:
            self._tokens = {
                revision: find_token(self._store.read_rules(profile, revision)),
                **self._tokens,
            }
        return self._tokens[revision]

    def find_rules(
        self,
        profile: Profile,
        sid: int | None = None,
        cve: str | None = None,
        text: str | None = None,
        limit: int = 100,
    ) -> tuple[RuleInfo, ...]:
        """The rules in force for a profile that meet everything asked, in order of gid and sid.

        ``cve`` is as people write it (CVE-2021-44228, cve_2021_44228, 2021-44228); ``text`` is looked
        for in the message and products, without case. The first call on a large ruleset takes about
        a second. Raises RulesError when the ruleset is damaged.
        """
        wanted_cve = None
        if cve is not None and (wanted_cve := parse_cve(cve)) is None:
            return ()
        needle = text.casefold() if text else ""
        found = []
        for info in self._read_infos(profile):
            if sid is not None and info.sid != sid:
                continue
            if wanted_cve is not None and wanted_cve not in info.cves:
                continue
            if needle and needle not in " ".join((info.msg, *info.products)).casefold():
                continue
            found.append(info)
            if len(found) >= limit:
                break
        return tuple(found)

    def _read_infos(self, profile: Profile) -> tuple[RuleInfo, ...]:
        revision = self._store.find_linked(profile, CURRENT)
        if revision is None:
            return ()
        if (profile, revision) not in self._found:
            report = self._store.read_report(profile, revision)
            owners = {
                key: source
                for source, keys in (report.keys if report else {}).items()
                for key in keys
            }
            lines = self._store.read_rules(profile, revision).splitlines()
            rules = (parse_rule(line) for line in lines)
            infos = tuple(
                build_info(rule, owners.get(rule.key, ""))
                for rule in rules
                if isinstance(rule, Rule) and rule.key not in OWN_KEYS
            )
            self._found = {key: one for key, one in self._found.items() if key[0] != profile}
            self._found[profile, revision] = infos
        return self._found[profile, revision]
