"""What stands beside rulesets and sources: a flipped byte in it is no other age, and no other count of rules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from appliance.rules.age import find_age
from appliance.rules.command import Updater
from appliance.rules.files import parse_note, render_note
from appliance.rules.model import RevisionReport, SourceReport, SourceUnavailable
from appliance.rules.sources import SourceCache
from appliance.rules.store import CURRENT, RuleStore, build_revision
from appliance.settings import RuleSource
from steering.model import Profile
from tests.support.rule_pipelines import build_pipeline, rule

FETCHED = 1_790_000_000.0
PROFILES = (Profile.PREVENT, Profile.DETECT)


def write_revisions(root: Path) -> RuleStore:
    """A ruleset in force for each profile, from a source that was read at `FETCHED`."""
    store = RuleStore(root)
    text = f"{rule(1)}\n".encode()
    source = SourceReport("feed", "file:///feed", "0" * 64, FETCHED, 1)
    for profile in PROFILES:
        report = RevisionReport(
            profile, build_revision(text), FETCHED, "0" * 64, 2, 0, 0, (source,), (), 0, {"feed": ("1:1",)}
        )  # fmt: skip
        with store.lock() as staging:
            store.write_revision(staging, report, text)
        store.write_link(profile, CURRENT, report.revision)
    return store


async def test_a_flipped_byte_in_a_report_is_put_back_from_its_copy(tmp_path: Path) -> None:
    store = write_revisions(tmp_path / "rules")
    pipeline = build_pipeline(tmp_path)
    assert await pipeline.ensure() == ()
    state = pipeline.read_state()
    age = find_age(state)
    assert age is not None
    assert age.since == FETCHED
    revision = str(state.profiles[0].revision)
    path = store.report_file(Profile.PREVENT, revision)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert store.read_report(Profile.PREVENT, revision) is None, at
        assert await pipeline.ensure() == (Profile.PREVENT,)
        assert path.read_bytes() == whole
    assert pipeline.read_state() == state


async def test_a_damaged_copy_of_a_report_is_not_put_back(tmp_path: Path) -> None:
    store = write_revisions(tmp_path / "rules")
    (revision,) = {store.find_linked(profile, CURRENT) for profile in PROFILES}
    copy = tmp_path / "rules/prevent/.copies" / str(revision) / "report.json"
    copy.write_bytes(copy.read_bytes().replace(b"1790000000", b"2790000000"))
    assert not store.restore_copy(Profile.PREVENT, str(revision))
    assert store.restore_copy(Profile.DETECT, str(revision))


async def test_a_report_from_before_there_were_digests_is_read(tmp_path: Path) -> None:
    store = write_revisions(tmp_path / "rules")
    revision = str(store.find_linked(Profile.PREVENT, CURRENT))
    report = store.read_report(Profile.PREVENT, revision)
    path = store.report_file(Profile.PREVENT, revision)
    path.write_bytes(parse_note(path.read_bytes()))
    assert store.read_report(Profile.PREVENT, revision) == report


async def test_a_flipped_byte_in_the_note_of_a_source_is_no_fresh_source(tmp_path: Path) -> None:
    feed = tmp_path / "feed.rules"
    feed.write_text(rule(1) + "\n")
    source = RuleSource(name="feed", url=feed.as_uri())
    # Not asked for: the source is a file, and is read by ourselves.
    cache = SourceCache(tmp_path / "sources", Mock(spec=Updater), lambda: FETCHED)
    never = await cache.read_kept(source)
    assert never[1].fault == "it was never read"
    _, report = await cache.read(source, tmp_path)
    feed.unlink()
    _, stale = await cache.read(source, tmp_path)
    assert replace(stale, stale=False, fault="") == report
    (note,) = (tmp_path / "sources").glob("*/copy.json")
    whole = note.read_bytes()
    for at in range(len(whole)):
        note.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(SourceUnavailable, match="its copy is of no use"):
            await cache.read(source, tmp_path)
        _, kept = await cache.read_kept(source)
        assert (kept.stale, kept.rules) == (True, 0)
        assert kept.fault.startswith("its copy is of no use")


def test_a_note_is_what_its_digest_says() -> None:
    assert parse_note(render_note(b'{"a":1}')) == b'{"a":1}'
    for wrong in (b'{"sha256":"', render_note(b"{}")[:-1], render_note(b"{}") + b" "):
        with pytest.raises(ValueError, match="digest"):
            parse_note(wrong)
