"""The appliance's own rules bundle: used when signed and whole, told of when not, on the real pipeline."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest

from appliance.api.documents import HealthProblem
from appliance.image.bundle import slot_size
from appliance.management.health import Facts, _judge_rules
from appliance.rules.bundled import BundleReader
from appliance.rules.model import BUNDLE, ReloadVerdict, RulesetRefused, RulesState, SourceReport
from appliance.rules.pipeline import RulePipeline
from appliance.settings import RulesBundle, parse_settings
from steering.errors import WrongInput
from steering.model import Profile
from tests.support.disk_images import Keys, flipped, make_keys
from tests.support.rule_pipelines import build_pipeline, rule, source
from tests.unit.image.conftest import Image
from tests.unit.image.test_refresh import build

SIZE = 2 * 2**20
STARTERS = 42


def quiet(_: str) -> None:
    """Progress that nobody reads."""


@dataclass
class Appliance:
    """A partition (a file: the reader asks for no more), and pipelines on one state directory, each a start."""

    image: Image
    directory: Path
    device: Path
    certificate: Path
    sources: tuple[dict[str, str], ...] = ()

    def start(self, **rules: object) -> RulePipeline:
        bundle = {"device": str(self.device), "certificate": str(self.certificate), **rules}
        return build_pipeline(self.directory, bundle=bundle, sources=list(self.sources))

    def write(self, serial: int) -> None:
        self.device.write_bytes(build(self.image, serial, 1000).ljust(slot_size(SIZE), b"\0") * 2)

    def read_sids(self, profile: Profile = Profile.PREVENT) -> set[int]:
        pipeline = self.start()
        return {one.sid for one in pipeline.find_rules(profile, limit=1000)}

    def find_report(self, pipeline: RulePipeline) -> SourceReport | None:
        report = pipeline.read_state().profiles[0].report
        assert report is not None
        return next((one for one in report.sources if one.name == BUNDLE), None)


@pytest.fixture
def appliance(image: Image, keys: Keys, tmp_path: Path) -> Appliance:
    device = tmp_path / "partition"
    device.write_bytes(bytes(SIZE))
    return Appliance(image, tmp_path / "state", device, keys.certificate)


async def test_what_was_put_there_while_it_was_off_comes_into_force_at_the_start(
    appliance: Appliance,
) -> None:
    pipeline = appliance.start()
    await pipeline.ensure()
    assert await pipeline.adopt_bundle() is None  # empty: nothing to do, nothing to tell
    assert len(appliance.read_sids()) == STARTERS
    appliance.write(100)
    again = appliance.start()
    adopted = await again.adopt_bundle()
    assert adopted is not None
    assert (adopted.rules, adopted.stale, adopted.fault) == (1, False, "")
    assert abs(adopted.fetched - time.time()) < 60
    for profile in Profile:
        assert 100 in appliance.read_sids(profile)
    assert await appliance.start().adopt_bundle() is None
    # An update keeps it.
    await again.update(quiet)
    assert 100 in appliance.read_sids()


async def test_a_bundle_that_an_engine_refuses_is_not_told_as_used(appliance: Appliance) -> None:
    pipeline = appliance.start()
    await pipeline.ensure()
    appliance.write(100)

    async def refuse(profile: str, path: Path) -> ReloadVerdict:
        return ReloadVerdict(False, "its canary was lost")

    with pytest.raises(RulesetRefused, match="prevent: its canary was lost"):
        await appliance.start().adopt_bundle(refuse)
    assert 100 not in appliance.read_sids()


@pytest.mark.parametrize("fault", ["damaged", "foreign", "older", "gone", "no device"])
async def test_a_bundle_that_is_not_to_be_trusted_is_not_used_and_told_of(
    appliance: Appliance, fault: str, tmp_path: Path
) -> None:
    """What was used before, and is still signed in the copy that is kept, goes on inspecting."""
    appliance.write(100)
    first = appliance.start()
    await first.ensure()
    await first.adopt_bundle()
    if fault == "damaged":
        data = bytearray(appliance.device.read_bytes())
        data[900] ^= 1
        data[slot_size(SIZE) + 900] ^= 1
        appliance.device.write_bytes(bytes(data))
    elif fault == "older":
        appliance.write(99)
    elif fault == "gone":
        appliance.device.write_bytes(bytes(SIZE))
    elif fault == "no device":
        appliance.device.unlink()
    else:
        keys = make_keys(tmp_path, "foreign")
        foreign = Image(
            appliance.image.disk, keys, appliance.image.root, appliance.image.trusted,
            appliance.image.manifest, appliance.image.manifest_file,
        )  # fmt: skip
        encoded = build(foreign, 500, 1000).ljust(slot_size(SIZE), b"\0")
        appliance.device.write_bytes(encoded * 2)
    second = appliance.start()
    adopted = await second.adopt_bundle()
    assert adopted is not None
    assert adopted.stale
    words = {
        "damaged": "not those that were signed", "foreign": "not trusted", "older": "older than 100",
        "gone": "gone from its partition", "no device": "No such file",
    }  # fmt: skip
    assert words[fault] in adopted.fault
    assert appliance.find_report(second) == adopted
    sids = appliance.read_sids()
    assert 100 in sids
    assert not {99, 500} & sids


async def test_a_damaged_bundle_that_was_never_used_leaves_the_starter_rules(
    appliance: Appliance,
) -> None:
    appliance.write(100)
    half = slot_size(SIZE)
    with flipped(appliance.device, 900), flipped(appliance.device, half + 900):
        pipeline = appliance.start()
        await pipeline.ensure()
        adopted = await pipeline.adopt_bundle()
        assert adopted is not None
        assert (adopted.rules, adopted.stale) == (0, True)
        assert len(appliance.read_sids()) == STARTERS
    # Whole again: used at the next start.
    assert await appliance.start().adopt_bundle() is not None
    assert 100 in appliance.read_sids()


async def test_one_damaged_copy_is_told_of_and_the_other_is_used(appliance: Appliance) -> None:
    appliance.write(100)
    with flipped(appliance.device, 900):
        pipeline = appliance.start()
        adopted = await pipeline.adopt_bundle()
    assert adopted is not None
    assert (adopted.rules, adopted.stale) == (1, True)
    assert adopted.fault.startswith("copy 1:")


def test_a_kept_copy_is_checked_again(appliance: Appliance) -> None:
    """What stands in /var may have been changed while the appliance was off."""
    appliance.write(100)
    reader = BundleReader(
        RulesBundle(device=appliance.device, certificate=appliance.certificate),
        appliance.directory / "sources",
    )
    assert reader.read()[1].rules == 1
    appliance.device.write_bytes(bytes(SIZE))
    kept = appliance.directory / "sources" / "hairpin-bundle" / "bundle"
    assert reader.read()[1].rules == 1
    with flipped(kept, 900):
        rules, report = reader.read()
    assert rules.enabled == ()
    assert report.stale
    assert "not those that were signed" in report.fault


def read_bundle_again(appliance: Appliance, **settings: int) -> SourceReport:
    bundle = RulesBundle(device=appliance.device, certificate=appliance.certificate, **settings)
    return BundleReader(bundle, appliance.directory / "sources").read()[1]


def test_an_empty_partition_where_a_bundle_is_wanted_is_told(appliance: Appliance) -> None:
    """Sixty-four zeros in each copy, and the starter rules alone would be as good as what was refreshed."""
    assert read_bundle_again(appliance).fault == ""
    report = read_bundle_again(appliance, floor=50)
    assert report.stale
    assert report.fault.endswith("gone from its partition, and serial 50 at least is wanted")
    appliance.write(100)
    assert read_bundle_again(appliance).fault == ""
    (appliance.directory / "sources" / "hairpin-bundle" / "bundle").unlink()
    appliance.device.write_bytes(bytes(SIZE))
    assert "serial 100 at least is wanted" in read_bundle_again(appliance).fault


def test_a_lost_note_of_what_was_used_lets_no_older_bundle_in(appliance: Appliance) -> None:
    appliance.write(100)
    assert read_bundle_again(appliance).fault == ""
    (appliance.directory / "sources" / "hairpin-bundle" / "seen.json").write_text("{")
    appliance.write(99)
    report = read_bundle_again(appliance)
    assert "serial 99 is older than 100" in report.fault
    assert report.rules == 1


def test_a_flipped_digit_of_what_was_used_keeps_no_bundle_out(appliance: Appliance) -> None:
    """A higher one refused all that there was, and left the starter rules."""
    appliance.write(100)
    assert read_bundle_again(appliance).fault == ""
    note = appliance.directory / "sources" / "hairpin-bundle" / "seen.json"
    note.write_bytes(note.read_bytes().replace(b'"serial":100', b'"serial":900'))
    assert read_bundle_again(appliance).fault == ""


def test_an_older_copy_is_not_used_in_place_of_the_newest(appliance: Appliance) -> None:
    kept = appliance.directory / "sources" / "hairpin-bundle" / "bundle"
    appliance.write(99)
    read_bundle_again(appliance)
    old = kept.read_bytes()
    appliance.write(100)
    read_bundle_again(appliance)
    kept.write_bytes(old)
    appliance.device.write_bytes(bytes(SIZE))
    report = read_bundle_again(appliance)
    assert report.rules == 0
    assert "its copy is not used: serial 99 is older than 100" in report.fault


async def test_at_the_start_no_source_is_asked(appliance: Appliance, tmp_path: Path) -> None:
    feed = tmp_path / "own.rules"
    feed.write_text(rule(7) + "\n")
    appliance.sources = (source("own", feed),)
    await appliance.start().update(quiet)
    feed.write_text(rule(8) + "\n")
    appliance.write(100)
    await appliance.start().adopt_bundle()
    assert {7, 100} <= appliance.read_sids()
    assert 8 not in appliance.read_sids()
    other = tmp_path / "other.rules"
    appliance.sources = (source("other", other),)
    appliance.write(101)
    pipeline = appliance.start()
    await pipeline.adopt_bundle()
    report = pipeline.read_state().profiles[0].report
    assert report is not None
    assert {one.name: one.fault for one in report.sources}["other"] == "it was never read"


# Health


def judge(*sources: SourceReport, now: float) -> list[str]:
    """The problems that health tells of rules made of these sources."""
    profile = Mock(profile="prevent", revision="r", refused=None, report=Mock(sources=sources))
    facts = Mock(spec=Facts, now=now, rules=RulesState((profile,), None), stale_after=None)
    problems: list[HealthProblem] = []
    status = _judge_rules(facts, problems).status
    assert (status == "ok") == (not problems)
    return [one.reason for one in problems]


def test_health_says_why_a_bundle_is_not_used() -> None:
    bundle = SourceReport(BUNDLE, "file:///b", "", 0.0, 0, stale=True, fault="copy 1: torn")
    assert judge(bundle, now=1e9) == ["prevent: stale sources hairpin/bundle (copy 1: torn)"]


def test_a_bundle_needs_a_certificate() -> None:
    lane = "{profile: prevent, vlan: 1, legA: {interface: a, device: a}, legB: {interface: b, device: b}}"
    with pytest.raises(WrongInput, match=r"rules\.bundle\.certificate: must be given"):
        parse_settings(f"lanes: [{lane}]\nrules: {{bundle: {{}}}}")
    text = f"lanes: [{lane}]\nrules: {{bundle: {{certificate: /c.pem}}}}"
    found = parse_settings(text).rules.bundle
    assert found is not None
    assert found.device == Path("/dev/disk/by-partlabel/hairpin-rules")
