"""The one door to the `suricata-update` command and to `suricata -V`.

The command is run with bounds on memory, file size and time, with its own data directory, and never
with its own test or reload: its failed reload exits 0. It is not imported (licence, root logger).
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import structlog

from appliance.rules.archive import ARCHIVE_LIMIT
from appliance.rules.model import RulesError
from steering.errors import CommandFailed
from steering.model import Profile
from steering.run import run_async

log = structlog.get_logger("rules")

MEMORY_LIMIT = 3 * 2**30
FETCH_SECONDS = 300.0
MERGE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Updater:
    """Where `suricata-update` is, and what it is told on every run.

    ``engine_data`` holds `update/`: `update.yaml` and one directory of filters for each profile.
    """

    program: Path
    engine_data: Path
    suricata: Path
    version: str

    def render(self, verb: str, data_dir: Path, file_limit: int) -> list[str]:
        return [
            "prlimit",
            f"--as={MEMORY_LIMIT}",
            f"--fsize={file_limit}",
            "--core=0",
            "--",
            str(self.program),
            verb,
            f"--data-dir={data_dir}",
            f"--config={self.engine_data / 'update' / 'update.yaml'}",
            f"--suricata={self.suricata}",
            f"--suricata-version={self.version}",
        ]

    def render_update(
        self, data_dir: Path, filters: Path, config: Path, urls: tuple[str, ...], file_limit: int
    ) -> list[str]:
        """``filters`` holds disable.conf, drop.conf, modify.conf; all are named, so that none of
        the machine's own in /etc/suricata is taken.
        """
        argv = self.render("update", data_dir, file_limit)
        argv += [f"--output={data_dir / 'rules'}", f"--suricata-conf={config}"]
        argv += ["--enable-conf=/dev/null"]
        argv += [f"--{name}-conf={filters / name}.conf" for name in ("disable", "modify", "drop")]
        argv += ["--no-test", "--no-reload", "--fail", "--force"]
        return argv + [f"--url={url}" for url in urls]

    async def run(self, argv: list[str], scratch: Path, timeout: float) -> None:  # noqa: ASYNC109
        """``scratch`` takes its temporary files. Raises CommandFailed."""
        scratch.mkdir(parents=True, exist_ok=True)
        data_dir = next(word for word in argv if word.startswith("--data-dir="))
        env = {
            "TMPDIR": str(scratch),
            # It would win over --data-dir.
            "DATA_DIRECTORY": data_dir.partition("=")[2],
            # Where no source is left (an obsolete one is skipped), ET Open would be fetched instead.
            "ETOPEN_URL": "file:///nonexistent",
        }
        await run_async(argv, timeout=timeout, env=env)

    async def run_merge(
        self, profile: Profile, files: tuple[Path, ...], config: Path, work: Path
    ) -> tuple[str, ...]:
        """The enabled rules that suricata-update makes of ``files`` for ``profile``.

        Raises RulesError, CommandFailed.
        """
        argv = self.render_update(
            data_dir=work,
            filters=self.engine_data / "update" / profile,
            config=config,
            urls=tuple(file.as_uri() for file in files),
            file_limit=4 * ARCHIVE_LIMIT,
        )
        await self.run(argv, work / "tmp", MERGE_SECONDS)
        merged = work / "rules" / "suricata.rules"
        if not merged.is_file():
            raise RulesError("suricata-update left no ruleset", "see its output in the log")
        lines = (line.strip() for line in merged.read_text(encoding="utf-8").split("\n"))
        return tuple(line for line in lines if line and not line.startswith("#"))

    async def run_fetch(self, name: str, url: str | None, work: Path) -> bytes:
        """What an https or index source serves now, at most ARCHIVE_LIMIT bytes.

        suricata-update only downloads here (every rule is disabled, so that it follows no file
        names of the feed); what it cached is read. Raises RulesError, CommandFailed.
        """
        filters = work / "filters"
        filters.mkdir(parents=True)
        for kind in ("disable", "modify", "drop"):
            (filters / f"{kind}.conf").write_text("*\n" if kind == "disable" else "")
        cache = work / "update" / "cache"
        # Without the directory, enabling the first source would enable ET Open beside it.
        (work / "update" / "sources").mkdir(parents=True)
        if url is None:
            try:
                index = self.render("update-sources", work, ARCHIVE_LIMIT)
                await self.run(index, work / "tmp", FETCH_SECONDS)
            except CommandFailed as fault:
                log.warning(
                    "rule source index not updated, its bundled copy is used", fault=str(fault)
                )
            enable = [*self.render("enable-source", work, ARCHIVE_LIMIT), name]
            try:
                await self.run(enable, work / "tmp", FETCH_SECONDS)
            except CommandFailed as fault:
                raise RulesError(
                    f"source {name} is not in suricata-update's index, or needs parameters "
                    f"({fault.output.strip()[-200:]})",
                    "give the source's url",
                ) from fault
        argv = self.render_update(
            work, filters, Path("/nonexistent"), (url,) if url else (), ARCHIVE_LIMIT
        )
        said = "nothing was fetched"
        try:
            await self.run(argv, work / "tmp", FETCH_SECONDS)
        except CommandFailed as failed:
            said = failed.output.strip()[-300:] or "it took too long"
        got = (
            [path for path in cache.glob("[0-9a-f]*-*") if path.is_file()] if cache.is_dir() else []
        )
        if len(got) != 1:
            # A feed's address may hold the key that was paid for.
            query = url.partition("?")[2] if url else ""
            said = said.replace(query, "...") if query else said
            raise RulesError(f"source {name} can't be fetched: {said}", "check its address")
        return got[0].read_bytes()


def find_updater() -> Path:
    """The console script beside this Python, or on the path. Raises RulesError."""
    beside = Path(sys.executable).parent / "suricata-update"
    found = str(beside) if beside.is_file() else shutil.which("suricata-update")
    if found is None:
        raise RulesError("suricata-update is not installed", "install the locked dependencies")
    return Path(found)


async def find_version(suricata: Path) -> str:
    """As in ``7.0.10``. Raises RulesError, CommandFailed."""
    try:
        said = (await run_async([str(suricata), "-V"], timeout=10)).stdout
    except CommandFailed as fault:
        mend = f"is {suricata} the Suricata to be used (inspection.suricata, --suricata)?"
        raise CommandFailed(fault.command, fault.status, fault.output, mend) from fault
    if match := re.search(r"version (\d+\.\d+\.\d+)", said):
        return match[1]
    raise RulesError(
        f"{suricata} -V says no version: {said[:100]}", "check inspection.suricata, or --suricata"
    )
