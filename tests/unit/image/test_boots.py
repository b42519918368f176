"""Versions by what the boot loader counts, and what health says of one that was tried and failed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.cli import run_cli
from appliance.image.boots import (
    BootVersion,
    TrialRecord,
    judge_boots,
    keep_record,
    read_record,
    read_versions,
    render_failed,
    write_versions,
)
from appliance.management.health import build_health
from appliance.rules.model import RulesState
from tests.unit.test_rules_age import build_facts


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("hairpin_0.1.0.efi", ("0.1.0", None, 0)),
        ("hairpin_0.1.0+3.efi", ("0.1.0", 3, 0)),
        ("hairpin_0.2.0~rc1+2-1.efi", ("0.2.0~rc1", 2, 1)),
        ("hairpin_0.2.0+0-3.efi", ("0.2.0", 0, 3)),
    ],
)
def test_a_kernel_says_how_often_it_was_tried(
    name: str, wanted: tuple[str, int | None, int]
) -> None:
    (one,) = judge_boots([name], "", None)
    assert (one.version, one.left, one.done) == wanted


def test_other_files_are_no_versions() -> None:
    names = ["BOOTX64.EFI", "hairpin_.efi", "hairpin_0.1.0.efi.new", "hairpin_0.1.0+x.efi"]
    assert judge_boots(names, "0.1.0", None) == ()


def test_only_a_version_without_tries_that_does_not_run_has_failed() -> None:
    record = TrialRecord(version="0.2.0", at=5.0, lacking=("lane prevent: nothing is forwarded",))
    names = ["hairpin_0.1.0.efi", "hairpin_0.2.0+0-3.efi"]
    old, new = judge_boots(names, "0.1.0", record)
    assert (old.running, old.failed, old.lacking) == (True, False, ())
    assert (new.running, new.failed, new.at) == (False, True, 5.0)
    # The only one there is, never found good: it runs.
    assert not judge_boots(["hairpin_0.2.0+0-3.efi"], "0.2.0", record)[0].failed
    assert not judge_boots(["hairpin_0.2.0+1-2.efi"], "0.1.0", record)[0].failed


def test_it_is_told_with_the_reason_that_was_kept() -> None:
    one = BootVersion(version="0.2.0", left=0, done=3, lacking=("switch: closed", "no lanes"))
    assert render_failed(one, "0.1.0") == (
        "version 0.2.0 was tried 3 times and failed, 0.1.0 runs again: switch: closed; no lanes"
    )
    silent = BootVersion(version="0.2.0", left=0, done=1)
    assert render_failed(silent, "0.1.0") == (
        "version 0.2.0 was tried once and failed, 0.1.0 runs again: it never came as far as to be checked"
    )


def test_the_command_tells_each_version_and_what_follows_from_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = BootVersion(version="0.2.0", left=0, done=3, at=5.0, lacking=("no lanes",))
    found = (BootVersion(version="0.1.0", running=True), failed)
    monkeypatch.setattr("appliance.image.boots.read_boots", lambda: found)
    assert run_cli(["image", "boots", "--json"]) == 0
    good, bad = json.loads(capsys.readouterr().out)["items"]
    assert (good["version"], good["running"], good["state"]) == ("0.1.0", True, "good")
    assert bad == {
        "version": "0.2.0",
        "running": False,
        "state": "tried 3 times and failed",
        "left": 0,
        "done": 3,
        "failed": True,
        "lacking": ["no lanes"],
    }


def test_elsewhere_than_on_an_appliance_it_is_not_said_that_there_are_no_versions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plain = tmp_path / "os-release"
    plain.write_text("ID=debian\n")
    monkeypatch.setattr("appliance.image.boots.OS_RELEASE", plain)
    assert run_cli(["image", "boots"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "this is no appliance image" in told.err


def test_what_is_lacking_outlives_the_version(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"
    assert read_record(path) is None
    keep_record("0.2.0", ["x" * 1000] * 50, path)
    record = read_record(path)
    assert record is not None
    assert (record.version, len(record.lacking), len(record.lacking[0])) == ("0.2.0", 20, 300)
    for damaged in (
        "{",
        "[]",
        '{"version": "0.2.0"}',
        '{"version": "1", "at": "x", "lacking": []}',
    ):
        path.write_text(damaged)
        assert read_record(path) is None
    # A full disk must not change what is booted.
    keep_record("0.2.0", ["x"], tmp_path / "none" / "trial.json")


def test_health_reads_what_root_wrote(tmp_path: Path) -> None:
    path = tmp_path / "versions.json"
    assert read_versions(path) == ()
    found = judge_boots(["hairpin_0.1.0.efi", "hairpin_0.2.0+0-3.efi"], "0.1.0", None)
    write_versions(found, path)
    assert read_versions(path) == found
    assert path.stat().st_mode & 0o777 == 0o644
    path.write_text('{"versions": 1}')
    assert read_versions(path) == ()


@pytest.mark.parametrize("failed", [True, False])
def test_health_is_degraded_by_a_version_that_was_tried_and_failed(failed: bool) -> None:
    names = ["hairpin_0.1.0.efi", "hairpin_0.2.0+0-3.efi" if failed else "hairpin_0.2.0+3-0.efi"]
    facts = build_facts(RulesState((), None), None)
    health = build_health(replace(facts, boots=judge_boots(names, "0.1.0", None)))
    told = [one for one in health.problems if "0.2.0" in one.reason]
    assert bool(told) is failed
    if failed:
        assert told[0].reason.startswith("version 0.2.0 was tried 3 times and failed, 0.1.0 runs")
        assert "docs/update.md" in told[0].mend
        assert health.status != "ok"
