"""The rule pipeline on the real suricata-update and the real Suricata."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from appliance.rules.command import Updater, find_updater
from appliance.rules.model import (
    STARTER,
    LeftOut,
    ReloadVerdict,
    RulesError,
    RulesetRefused,
    SourceUnavailable,
    UpdateReport,
    UpdateRunning,
)
from appliance.rules.pipeline import RulePipeline
from steering.errors import HairpinError
from steering.model import Profile
from tests.support.rule_pipelines import (
    ATTACK,
    CRITICAL,
    ENGINE_DATA,
    ROOT,
    SURICATA,
    build_pipeline,
    rule,
    source,
    write_feed,
)

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]

STARTERS = 42
LOADED = STARTERS + 1  # and the canary's own


def quiet(_: str) -> None:
    """Progress that nobody reads."""


def read_link(directory: Path, profile: Profile, link: str = "current") -> str:
    return os.readlink(directory / "rules" / profile / link)


def read_ruleset(directory: Path, profile: Profile) -> list[str]:
    return (directory / "rules" / profile / "current/suricata.rules").read_text().splitlines()


def find_left_out(report: UpdateReport) -> dict[int | None, LeftOut]:
    return {one.sid: one for one in report.profiles[0].left_out}


async def test_a_feed_beside_the_starter_rules(tmp_path: Path) -> None:
    feed = write_feed(
        tmp_path / "feed.tar.gz",
        rule(1, ATTACK, metadata=CRITICAL),
        rule(2, ATTACK, metadata="signature_severity Informational"),
        rule(3, "classtype:bad-unknown;", metadata=CRITICAL),
        rule(4, ATTACK),
        rule(5, ATTACK, metadata=f"{CRITICAL}, confidence Low"),
        rule(6, f"flowbits:set,seen; {ATTACK}", metadata=CRITICAL),
        rule(7, f"flowbits:isset,seen; {ATTACK}", metadata=CRITICAL),
        rule(8, f"noalert; flowbits:set,eight; {ATTACK}", metadata=CRITICAL),
        rule(9, "classtype:misc-activity;").replace("alert", "drop", 1),
    )
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)], floor=26)
    told: list[str] = []
    report = await pipeline.update(told.append)
    assert report.ok
    actions = {
        info.sid: info.action
        for info in pipeline.find_rules(Profile.PREVENT)
        if info.source == "feed"
    }
    assert [sid for sid, action in actions.items() if action == "drop"] == [1, 7]
    assert len(actions) == 9
    assert {info.action for info in pipeline.find_rules(Profile.DETECT)} == {"alert"}
    prevent, detect = report.profiles
    assert (prevent.loaded, prevent.drops, prevent.left_out) == (LOADED + 9, STARTERS + 2, ())
    assert (prevent.changed.added, prevent.changed.removed) == (STARTERS + 9, 0)
    assert detect.drops == 0
    assert any("testing" in one for one in told)

    [log4shell, *_] = pipeline.find_rules(Profile.PREVENT, cve="cve-2021-44228")
    assert (log4shell.sid, log4shell.source) == (4850000, STARTER)
    assert log4shell.products == ("Apache Log4j2",)
    assert log4shell.severity == "Critical"
    assert [info.sid for info in pipeline.find_rules(Profile.DETECT, text="REDIS")] == [
        4850600,
        4850601,
    ]
    assert pipeline.find_rules(Profile.PREVENT, sid=3)[0].classtype == "bad-unknown"
    assert len(pipeline.find_rules(Profile.PREVENT, limit=2)) == 2
    assert pipeline.find_rules(Profile.PREVENT, cve="everything") == ()


async def test_a_hostile_feed_gets_nothing_through(tmp_path: Path) -> None:
    climbed = tmp_path / "climbed"
    feed = write_feed(
        tmp_path / "feed.tar.gz",
        rule(1),
        rule(2).replace("alert", "pass", 1),
        rule(3, "bypass;"),
        rule(4, f"filemd5:../../../../../../../..{climbed};"),
        rule(5, "lua:evil.lua;"),
        rule(4850000, rev=9, msg="Log4Shell, disarmed"),
        rule(6, msg="x" * 8000),
        rule(7, msg="x" * (8191 - len(rule(7, msg="")) + len("rule 7"))) + rule(8).replace("alert", "pass"),
        "# " + rule(9, "bypass;"),
        rule(10, "flowbits:set,hairpin.tls;"),
        **{f"rules/../../../../../../../..{climbed}": b"climbed", "classification.config": b"x" * 100},
    )  # fmt: skip
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)])
    report = await pipeline.update(quiet)
    assert [info.sid for info in pipeline.find_rules(Profile.PREVENT) if info.source == "feed"] == [
        1,
        3,
        6,
    ]
    assert not any("bypass" in line for line in read_ruleset(tmp_path, Profile.PREVENT))
    assert [one.sid for one in report.profiles[0].rewritten] == [3]
    left_out = find_left_out(report)
    assert set(left_out) == {2, 4, 5, 7, 10, 4850000}
    assert all(one.source == "feed" and one.reason for one in left_out.values())
    assert pipeline.find_rules(Profile.PREVENT, sid=4850000)[0].rev == 1
    assert not any("pass" in line.split()[0] for line in read_ruleset(tmp_path, Profile.PREVENT))
    assert not climbed.exists()


async def test_what_suricata_update_would_have_silently_dropped(tmp_path: Path) -> None:
    """It makes a drop of a disabled rule, then enables and silences it for its flowbits."""
    setter = rule(1, f"flowbits:set,seen; {ATTACK}", metadata=CRITICAL)
    # The filter spares rules that set a flowbit; an operator's own line does not.
    data = tmp_path / "suricata"
    (data / "rules").mkdir(parents=True)
    for path in (ENGINE_DATA / "rules").glob("*.rules"):
        (data / "rules" / path.name).write_bytes(path.read_bytes())
    for path in (ENGINE_DATA / "update").rglob("*.*"):
        copy = data / "update" / path.relative_to(ENGINE_DATA / "update")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text() + ("\n1:1\n" if path.name == "drop.conf" else ""))
    staged = tmp_path / "staged.rules"
    staged.write_text(f"# {setter}\n{rule(2, 'flowbits:isset,seen;')}\n")
    updater = Updater(find_updater(), data, SURICATA, "7.0.10")
    work = tmp_path / "work"
    merged = await updater.run_merge(Profile.PREVENT, (staged,), Path("/nonexistent"), work)
    assert any(line.startswith("drop") and "noalert;" in line for line in merged), (
        "the trap is gone"
    )

    feed = write_feed(tmp_path / "feed.tar.gz", staged.read_text())
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)])
    pipeline._engine_data = data  # the operator's own data directory
    await pipeline.update(quiet)
    for profile in Profile:
        [line] = [line for line in read_ruleset(tmp_path, profile) if "sid:1;" in line]
        assert line.startswith("alert")
        assert "noalert;" in line


async def test_rules_that_do_not_load_are_named_and_the_rest_loads(tmp_path: Path) -> None:
    feed = write_feed(
        tmp_path / "feed.tar.gz",
        rule(1),
        rule(2, "no_such_keyword;"),
        rule(3, 'http.uri; http.uri; content:"x";').replace("tcp", "http", 1),
        rule(4, f'content:"{"y" * 300}";' * 9 + "no_such_keyword;"),
        rule(5).replace("any any ->", "$NO_SUCH_NET any ->", 1),
        rule(6, rev=1, msg="old"),
        rule(6, rev=2, msg="new"),
        "# " + rule(7, "no_such_keyword;"),
    )
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)])
    report = await pipeline.update(quiet)
    left_out = find_left_out(report)
    assert set(left_out) == {2, 3, 4, 5}
    assert "unknown rule keyword" in left_out[2].reason
    assert "sticky buffer" in left_out[3].reason
    assert left_out[4].reason.startswith("Suricata: ")
    assert "variable" in left_out[5].reason
    assert [info.msg for info in pipeline.find_rules(Profile.DETECT, sid=6)] == ["new"]
    assert [one.loaded for one in report.profiles] == [LOADED + 2] * 2


async def test_the_same_sources_give_the_same_revision(tmp_path: Path) -> None:
    feed = write_feed(tmp_path / "feed.tar.gz", *(rule(sid) for sid in range(1, 40)))
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)])
    asked: list[str] = []

    async def reload(profile: str, path: Path) -> ReloadVerdict:
        asked.append(f"{profile} {len(path.read_text().splitlines())}")
        return ReloadVerdict(accepted=True)

    first = await pipeline.update(quiet, reload)
    second = await pipeline.update(quiet, reload)
    assert asked == [f"prevent {LOADED + 39}", f"detect {LOADED + 39}"]
    assert [one.revision for one in first.profiles] == [one.revision for one in second.profiles]
    assert not any(one.changed.any for one in second.profiles)
    shuffled = write_feed(tmp_path / "feed.tar.gz", *(rule(sid) for sid in range(39, 0, -1)))
    third = await build_pipeline(tmp_path, sources=[source("feed", shuffled)]).update(quiet, reload)
    assert [one.revision for one in first.profiles] == [one.revision for one in third.profiles]


async def test_the_former_ruleset_comes_back_when_the_engine_refuses(tmp_path: Path) -> None:
    pipeline = build_pipeline(tmp_path)
    await pipeline.ensure()
    good = read_link(tmp_path, Profile.PREVENT)
    feed = write_feed(tmp_path / "feed.tar.gz", rule(1))
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)])
    asked: list[tuple[str, int]] = []

    async def reload(profile: str, path: Path) -> ReloadVerdict:
        asked.append((profile, len(path.read_text().splitlines())))
        if profile == "prevent" and len(asked) == 1:
            return ReloadVerdict(accepted=False, reason="canary not dropped")
        return ReloadVerdict(accepted=True)

    report = await pipeline.update(quiet, reload)
    assert not report.ok
    assert [one.in_force for one in report.profiles] == [False, True]
    assert asked == [("prevent", LOADED + 1), ("prevent", LOADED), ("detect", LOADED + 1)]
    assert read_link(tmp_path, Profile.PREVENT) == good
    state = pipeline.read_state()
    refused = state.profiles[0].refused
    assert refused is not None
    assert (refused.revision, refused.reason) == (report.profiles[0].revision, "canary not dropped")
    assert state.profiles[1].refused is None
    assert state.profiles[0].last_good is None
    assert (await pipeline.update(quiet)).ok
    assert pipeline.read_state().profiles[0].refused is None
    assert read_link(tmp_path, Profile.PREVENT, "last-good") == good


class Silent(HairpinError):
    """Stands for an engine that does not answer."""


@pytest.mark.parametrize("fault", [Silent("no engine"), RuntimeError("a defect")])
async def test_the_former_ruleset_comes_back_when_the_engine_is_silent(
    tmp_path: Path, fault: Exception
) -> None:
    await build_pipeline(tmp_path).ensure()
    good = read_link(tmp_path, Profile.PREVENT)
    feed = write_feed(tmp_path / "feed.tar.gz", rule(1))

    async def reload(profile: str, path: Path) -> ReloadVerdict:
        raise fault

    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)])
    if isinstance(fault, HairpinError):
        report = await pipeline.update(quiet, reload)
        assert "no engine" in report.profiles[0].refused
    else:
        with pytest.raises(RuntimeError):
            await pipeline.update(quiet, reload)
    assert read_link(tmp_path, Profile.PREVENT) == good


async def test_too_few_rules_change_nothing(tmp_path: Path) -> None:
    await build_pipeline(tmp_path).ensure()
    good = read_link(tmp_path, Profile.DETECT)
    feed = write_feed(tmp_path / "feed.tar.gz", rule(1))
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)], floor=100)
    with pytest.raises(RulesetRefused, match="fewer than the floor of 100"):
        await pipeline.update(quiet)
    assert read_link(tmp_path, Profile.DETECT) == good
    attempt = pipeline.read_state().attempt
    assert attempt is not None
    assert "floor" in attempt.fault


async def test_a_configuration_that_suricata_refuses_changes_nothing(tmp_path: Path) -> None:
    await build_pipeline(tmp_path).ensure()
    good = read_link(tmp_path, Profile.PREVENT)
    config = tmp_path / "broken.yaml"
    config.write_text("%YAML 1.1\n---\nvars: [\n")
    feed = write_feed(tmp_path / "feed.tar.gz", rule(1))
    pipeline = build_pipeline(tmp_path, lambda _: config, sources=[source("feed", feed)])
    with pytest.raises(HairpinError):
        await pipeline.update(quiet)
    assert read_link(tmp_path, Profile.PREVENT) == good


async def test_a_source_that_fails_keeps_its_copy_and_is_named(tmp_path: Path) -> None:
    feed = write_feed(tmp_path / "feed.tar.gz", rule(1))
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)])
    first = await pipeline.update(quiet)
    whole = feed.read_bytes()
    for damage in (lambda: feed.write_bytes(whole[:-20]), lambda: write_feed(feed), feed.unlink):
        damage()
        report = await pipeline.update(quiet)
        [_, stale] = report.sources
        assert stale.stale
        assert stale.fault
        assert stale.fetched == first.sources[1].fetched
        assert report.profiles[0].revision == first.profiles[0].revision
    moved = build_pipeline(tmp_path, sources=[source("feed", tmp_path / "other.tar.gz")])
    with pytest.raises(SourceUnavailable, match="no copy of it is kept") as missing:
        await moved.update(quiet)
    assert "rules.sources" in missing.value.mend
    assert read_link(tmp_path, Profile.PREVENT) == first.profiles[0].revision


@pytest.mark.parametrize("path", ["/dev/zero", "/etc", "/nonexistent"])
async def test_what_is_no_file_is_no_source(tmp_path: Path, path: str) -> None:
    pipeline = build_pipeline(tmp_path, sources=[source("feed", Path(path))])
    with pytest.raises(SourceUnavailable):
        await pipeline.update(quiet)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Requests are not the test's output."""


@pytest.fixture
def https(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Path, threading.Event]]:
    """(address, what it serves, set it to stop) of a real HTTPS server on loopback."""
    served, key, certificate = tmp_path / "served", tmp_path / "key.pem", tmp_path / "cert.pem"
    served.mkdir()
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    request += [
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]
    subprocess.run(
        [*request, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    stop = threading.Event()

    def close() -> None:
        stop.wait()
        server.shutdown()
        server.server_close()

    serving = [
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}),
        threading.Thread(target=close),
    ]
    for thread in serving:
        thread.start()
    yield f"https://localhost:{server.server_port}", served, stop
    stop.set()
    for thread in serving:
        thread.join()


async def test_an_https_source_and_its_copy(
    tmp_path: Path, https: tuple[str, Path, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, served, stop = https
    write_feed(served / "feed.tar.gz", rule(1), rule(2, "lua:x;"))
    sources = [{"name": "far", "url": f"{address}/feed.tar.gz?key=secret"}]
    pipeline = build_pipeline(tmp_path, sources=sources)
    first = await pipeline.update(quiet)
    assert first.sources[1].rules == 1
    assert first.sources[1].url == f"{address}/feed.tar.gz"
    assert not first.sources[1].stale
    write_feed(served / "feed.tar.gz", rule(1), rule(3))
    second = await pipeline.update(quiet)
    assert (second.profiles[0].changed.added, second.sources[1].rules) == (1, 2)
    monkeypatch.delenv("SSL_CERT_FILE")
    untrusted = await pipeline.update(quiet)
    assert untrusted.sources[1].stale
    assert "certificate" in untrusted.sources[1].fault.lower()
    assert "secret" not in untrusted.sources[1].fault
    stop.set()
    await asyncio.sleep(0.5)
    gone = await pipeline.update(quiet)
    assert gone.sources[1].stale
    assert gone.profiles[0].revision == second.profiles[0].revision
    fresh = build_pipeline(tmp_path, sources=[{"name": "new", "url": f"{address}/missing.rules"}])
    with pytest.raises(SourceUnavailable, match="source new can't be fetched"):
        await fresh.update(quiet)


async def test_an_index_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = write_feed(tmp_path / "feed.tar.gz", rule(1))
    index = {
        "version": 1,
        "sources": {
            "vendor/rules": {"summary": "x", "vendor": "v", "license": "l", "url": feed.as_uri()},
            "vendor/old": {
                "summary": "x", "vendor": "v", "license": "l", "url": feed.as_uri(), "obsolete": "gone",
            },
            "vendor/paid": {
                "summary": "x", "vendor": "v", "license": "l", "url": "https://localhost/%(code)s",
                "parameters": {"code": {"prompt": "Code"}},
            },
        },
    }  # fmt: skip
    path = tmp_path / "index.yaml"
    path.write_text(json.dumps(index))
    monkeypatch.setenv("SOURCE_INDEX_URL", path.as_uri())
    report = await build_pipeline(tmp_path, sources=[{"name": "vendor/rules"}]).update(quiet)
    assert (report.sources[1].name, report.sources[1].rules) == ("vendor/rules", 1)
    assert report.profiles[0].loaded == LOADED + 1
    for name in ("vendor/missing", "vendor/paid", "vendor/old"):
        with pytest.raises(SourceUnavailable, match=name):
            await build_pipeline(tmp_path, sources=[{"name": name}]).update(quiet)


async def test_two_updates_never_run_at_once(tmp_path: Path) -> None:
    pipeline = build_pipeline(tmp_path)
    entered, go = asyncio.Event(), asyncio.Event()

    async def reload(profile: str, path: Path) -> ReloadVerdict:
        entered.set()
        await go.wait()
        return ReloadVerdict(accepted=True)

    running = asyncio.create_task(pipeline.update(quiet, reload))
    await entered.wait()
    with pytest.raises(UpdateRunning):
        await build_pipeline(tmp_path).update(quiet)
    go.set()
    assert (await running).ok


KILLED = """
import asyncio, sys, time
from pathlib import Path
from tests.support.rule_pipelines import build_pipeline, source
def hang(profile):
    print("staged", flush=True)
    time.sleep(60)
directory = Path(sys.argv[1])
pipeline = build_pipeline(directory, hang, sources=[source("feed", directory / "feed.tar.gz")])
asyncio.run(pipeline.update(lambda told: None))
"""


async def test_a_killed_update_leaves_the_ruleset_and_no_rubbish(tmp_path: Path) -> None:
    await build_pipeline(tmp_path).ensure()
    good = read_link(tmp_path, Profile.PREVENT)
    feed = write_feed(tmp_path / "feed.tar.gz", rule(1))
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(tmp_path), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    while (line := await child.stdout.readline()) != b"staged\n":
        assert line, "the update ended by itself"
    child.kill()
    await child.communicate()
    root = tmp_path / "rules"
    assert any((root / ".staging").iterdir()), "nothing was under way"
    (root / "prevent" / ".current.new").symlink_to("0123456789abcdef")
    assert read_link(tmp_path, Profile.PREVENT) == good
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)])
    assert (await pipeline.update(quiet)).ok
    assert not (root / ".staging").exists()
    assert not list(root.rglob("*.new"))


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "other"])
async def test_a_damaged_ruleset_is_put_back_from_its_copy(tmp_path: Path, damage: str) -> None:
    feed = write_feed(tmp_path / "feed.tar.gz", rule(1))
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)])
    await pipeline.update(quiet)
    assert await pipeline.ensure() == ()
    revision = read_link(tmp_path, Profile.PREVENT)
    rules = tmp_path / "rules/prevent/current/suricata.rules"
    whole = rules.read_text()
    match damage:
        case "cut":
            rules.write_text(whole[:-50])
        case "empty":
            rules.write_text("")
        case "missing":
            rules.unlink()
        case "other":
            rules.write_text("alert ip any any -> any any (sid:1;)\n")
    assert await pipeline.ensure() == (Profile.PREVENT,)
    assert rules.read_text() == whole
    assert read_link(tmp_path, Profile.PREVENT) == revision


async def test_without_a_copy_a_damaged_ruleset_gives_way_to_the_last_good_one(
    tmp_path: Path,
) -> None:
    await build_pipeline(tmp_path).ensure()
    good = read_link(tmp_path, Profile.PREVENT)
    feed = write_feed(tmp_path / "feed.tar.gz", rule(1))
    pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)])
    await pipeline.update(quiet)
    damage_all(tmp_path)
    assert read_link(tmp_path, Profile.PREVENT) != good
    with pytest.raises(RulesError):
        pipeline.find_rules(Profile.PREVENT)
    await pipeline.ensure()
    assert read_link(tmp_path, Profile.PREVENT) == good
    damage_all(tmp_path)
    (tmp_path / "rules/prevent/last-good").unlink(missing_ok=True)
    await pipeline.ensure()
    assert len(read_ruleset(tmp_path, Profile.PREVENT)) == LOADED


def damage_all(directory: Path) -> None:
    """The ruleset in force and its copy."""
    revision = read_link(directory, Profile.PREVENT)
    for place in (".", ".copies"):
        (directory / "rules/prevent" / place / str(revision) / "suricata.rules").write_text("")


async def test_nothing_below_the_floor_comes_into_force(tmp_path: Path) -> None:
    with pytest.raises(RulesetRefused, match=f"{STARTERS} rules, fewer than the floor of 1000"):
        await build_pipeline(tmp_path, floor=1000).ensure()
    assert not (tmp_path / "rules/prevent/current").exists()
    feed = write_feed(tmp_path / "feed.tar.gz", *(rule(sid) for sid in range(1, 10)))
    pipeline = build_pipeline(tmp_path, floor=STARTERS + 5, sources=[source("feed", feed)])
    await pipeline.ensure()
    assert len(read_ruleset(tmp_path, Profile.PREVENT)) == LOADED + 9


async def test_old_revisions_are_removed_and_those_in_use_kept(tmp_path: Path) -> None:
    pipeline: RulePipeline
    for number in range(1, 8):
        feed = write_feed(tmp_path / "feed.tar.gz", *(rule(sid) for sid in range(1, number + 1)))
        pipeline = build_pipeline(tmp_path, sources=[source("feed", feed)])
        await pipeline.update(quiet)
    kept = {path.name for path in (tmp_path / "rules/prevent").iterdir() if not path.is_symlink()}
    copies = {path.name for path in (tmp_path / "rules/prevent/.copies").iterdir()}
    kept.remove(".copies")
    assert len(kept) == 5
    assert copies == kept
    assert {read_link(tmp_path, Profile.PREVENT, link) for link in ("current", "last-good")} <= kept


async def test_no_source_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RulesError, match="no source"):
        await build_pipeline(tmp_path, starter=False).update(quiet)
