"""The command line against the real API server (with a fake Control behind it)."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

from appliance.api.stream import StreamLimits
from appliance.cli import ALONE, build_app, run_cli
from appliance.client import Client, Place
from appliance.commands import lab as lab_commands
from appliance.commands.output import clean
from appliance.commands.reference import JSON_SHAPES, find_commands, render_reference
from steering.errors import SwitchError
from tests.support.api_server import TOKEN, run_api
from tests.support.fake_control import FakeControl

EMPTY = '{"apiVersion": "hairpin/v1", "kind": "List", "items": []}'
ROOT = Path(__file__).parents[2]


@dataclass
class Ended:
    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


class Child(subprocess.Popen[str]):
    """A process that does not outlive a test that failed, and does not hold it up."""

    def __exit__(self, *failure: Any) -> None:
        if failure[0] is not None:
            self.kill()
        super().__exit__(*failure)


@dataclass
class Program:
    """Runs `hairpin` inside this process, or as one of its own."""

    control: FakeControl
    url: str
    token_file: Path
    capsys: pytest.CaptureFixture[str]

    def run(self, *argv: str) -> Ended:
        self.capsys.readouterr()
        status = run_cli(argv)
        said = self.capsys.readouterr()
        return Ended(status, said.out, said.err)

    def start(self, *argv: str, **more: Any) -> Child:
        return Child(
            [sys.executable, "-m", "appliance.cli", *argv],
            cwd=ROOT,
            env={**os.environ, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )

    @property
    def env(self) -> dict[str, str]:
        return {"HAIRPIN_URL": self.url, "HAIRPIN_TOKEN_FILE": str(self.token_file)}


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    before = list(logging.getLogger().handlers), structlog.get_config()
    yield
    logging.getLogger().handlers = before[0]
    structlog.configure(**before[1])


@pytest.fixture
def program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Program]:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    control = FakeControl()
    with run_api(control) as url:
        found = Program(control, url, token_file, capsys)
        for name, value in found.env.items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.mark.parametrize(
    ("argv", "path"),
    [
        ("vms", "/vms"),
        ("coverage", "/coverage"),
        ("coverage --status blind --vm app1", "/coverage?status=blind&vm=app1"),
        ("explain web1 app1 --port 80", "/explain?source=web1&destination=app1&port=80"),
        ("alerts --limit 2", "/alerts?limit=2"),
        ("alerts --verdict blocked --cve CVE-2014-6271", "/alerts?verdict=blocked"),
        ("alerts --id 1", "/alerts/1"),
        ("flows", "/flows"),
        ("events", "/events"),
        ("health", "/health"),
        ("quarantine list", "/quarantines"),
        ("shun list", "/shuns"),
        ("shortcut list", "/shortcuts"),
        ("shortcut list --policy other --vm web1", "/shortcuts?policy=other&vm=web1"),
        ("policy show", "/policies"),
        ("rules show", "/rules"),
        ("rules show --sid 9000001", "/rules/signatures?sid=9000001"),
    ],
)
def test_json_is_exactly_the_document_of_the_api(program: Program, argv: str, path: str) -> None:
    import urllib.request

    ended = program.run(*argv.split(), "--json")
    request = urllib.request.Request(  # noqa: S310 - the test's own server
        f"{program.url}/api/v1{path}", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        expected = json.loads(answer.read())
    assert (ended.status, ended.err) == (0, "")
    assert ended.document == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("vms", ["web1  vm-1", "10.77.0.1", "tap1"]),
        ("coverage", ["1 blind (50.0 %)", "no policy names this pair", "gap: app1 has no address"]),
        ("explain web1 app1 --port 80", ["web1 -> app1, tcp port 80, ipv4: inspected", "CLASSIFY"]),
        ("alerts", ["blocked", "web1 10.77.0.1:40005", "CVE-2014-6271", "web-to-app"]),
        ("flows", ["HTTP", "98 of 100 packets (2.0 % missed)"]),
        ("events", ["policy.applied"]),
        ("health", ["ok, revision 1", "engine running, 12 rules, BFD up"]),
        ("policy show", ["# revision 1, etag 1-fake", "kind: List"]),
        ("rules show", ["prevent", "not loaded on prevent: sid 7: unknown protocol x"]),
        ("rules show --cve CVE-2014-6271", ["9000001", "Shellshock"]),
        ("rules update", ["the rules were changed"]),
    ],
)
def test_people_get_plain_columns_in_a_pipe(
    program: Program, argv: str, expected: list[str]
) -> None:
    ended = program.run(*argv.split())
    assert ended.status == 0
    for text in expected:
        assert text in ended.out
    assert "\x1b" not in ended.out
    assert not any(line.endswith(" ") for line in ended.out.splitlines())


def test_a_plan_shows_what_would_change_and_changes_nothing(
    program: Program, tmp_path: Path
) -> None:
    file = tmp_path / "policies.yaml"
    file.write_text(EMPTY)
    planned = program.run("policy", "plan", str(file))
    assert planned.status == 0
    assert "+ table=POLICY,priority=100,ip" in planned.out
    assert "- table=POLICY,priority=90,ip" in planned.out
    assert "web1 -> app1: blind -> inspected" in planned.out
    assert program.control.revision == 1

    checked = program.run("policy", "check", str(file), "--json")
    assert checked.document["checkedAgainstSwitch"] is True
    assert program.control.revision == 1

    applied = program.run("policy", "apply", str(file))
    assert "revision 2 is in force after 0.01 s" in applied.out
    assert program.control.revision == 2

    stale = program.run("policy", "apply", str(file), "--etag", "1-fake")
    assert stale.status == 1
    assert "error: the policies were changed meanwhile" in stale.err
    assert program.control.revision == 2


def test_errors_with_json_are_alone_on_stderr(program: Program, tmp_path: Path) -> None:
    file = tmp_path / "policies.yaml"
    file.write_text(EMPTY)
    stale = program.run("policy", "apply", str(file), "--etag", "1-other", "--json")
    assert (stale.status, stale.out) == (1, "")
    assert json.loads(stale.err)["status"] == 412


def test_policies_are_read_from_stdin(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(EMPTY.encode())))
    assert program.run("policy", "apply", "-", "--json").document["applied"] is True


def test_wrong_documents_are_told_fault_by_fault_before_anything_is_asked(
    program: Program, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(
        "apiVersion: hairpin/v1\nkind: Zone\nmetadata: {name: UPPER}\nspec: {colour: red}\n"
    )
    for command in ("check", "plan", "apply"):
        ended = program.run("policy", command, str(file))
        assert ended.status == 2
        assert ended.err.startswith("error: wrong input, ")
        assert "\n  items[0].metadata.name: " in ended.err
        assert "colour" in ended.err
    asjson = program.run("policy", "apply", str(file), "--json")
    assert asjson.out == ""
    assert len(json.loads(asjson.err)["errors"]) >= 2
    assert program.control.revision == 1


def test_checking_works_without_a_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    monkeypatch.setenv("HAIRPIN_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HAIRPIN_TOKEN_FILE", str(token_file))
    file = tmp_path / "policies.yaml"
    file.write_text(EMPTY)
    assert run_cli(["policy", "check", str(file)]) == 0
    assert "not checked against the switch: the management service" in capsys.readouterr().out
    assert run_cli(["policy", "check", str(file), "--offline"]) == 0
    assert run_cli(["policy", "plan", str(file)]) == 1
    assert "`hairpin lab up`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "nothing",
        "vms --colour",
        "alerts --limit 0",
        "alerts --verdict maybe",
        "alerts --since yesterday",
        "alerts --follow --id 3",
        "coverage --history --vm web-1",
        "explain web1",
        "explain web1 app1 --port 70000",
        "policy apply /nonexistent/file",
        "serve --config /nonexistent/file",
        "vms --url ftp://x --token-file /dev/null",
        "lab up --vms 0",
        "lab up --name ../x",
    ],
)
def test_wrong_input_ends_with_2(program: Program, argv: str) -> None:
    ended = program.run(*argv.split())
    assert ended.status == 2
    assert ended.err or argv == ""
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("explain web1 nobody", "error: there is no VM nobody"),
        ("alerts --id 404", "error: there is no alert 404"),
    ],
)
def test_what_is_not_there_ends_with_1_and_a_mend(program: Program, argv: str, said: str) -> None:
    ended = program.run(*argv.split())
    assert ended.status == 1
    assert ended.err.startswith(said)
    problem = json.loads(program.run(*argv.split(), "--json").err)
    assert (problem["status"], problem["type"]) == (404, "urn:hairpin:problem:not-found")


def test_a_wrong_token_is_told(program: Program) -> None:
    program.token_file.write_text("another-token-987654321")
    ended = program.run("vms")
    assert ended.status == 1
    assert ended.err.startswith("error: no token, or a wrong one\n  what to do: ")


def test_a_failing_service_is_told(program: Program) -> None:
    program.control.status = "failing"
    ended = program.run("health")
    assert ended.status == 1
    assert "problem: an engine is down" in ended.out
    program.control.fault = SwitchError("the switch does not answer", "start it")
    told = "error: the switch does not answer\n  what to do: start it\n"
    assert program.run("coverage").err.endswith(told)


def test_a_failed_update_of_the_rules_ends_with_1(program: Program) -> None:
    from appliance.api.documents import UpdateJob

    async def start() -> UpdateJob:
        return UpdateJob(state="failed", reason="the source does not answer", mend="try later")

    program.control.start_rules_update = start  # type: ignore[method-assign]
    ended = program.run("rules", "update")
    assert (ended.status, "error: the update failed: the source" in ended.err) == (1, True)
    assert program.run("rules", "update", "--json").status == 1


def test_hostile_text_does_not_reach_the_terminal(program: Program) -> None:
    alert = program.control.alerts[-1]
    hostile = alert.signature.model_copy(update={"message": "\x1b[2J\x07[red]x\u202e\n\r\udc00"})
    program.control.alerts[-1] = alert.model_copy(
        update={"signature": hostile.model_copy(update={"message": hostile.message[:-1]})}
    )
    ended = program.run("alerts", "--limit", "1")
    assert ".[2J.[red]x..." in ended.out
    assert len(ended.out.splitlines()) == 2
    assert clean(hostile.message) == ".[2J.[red]x...."


def test_following_shows_what_was_and_what_comes_and_ends_quietly(program: Program) -> None:
    with program.start("alerts", "--follow", "--json") as follower:
        assert follower.stdout is not None
        assert follower.stderr is not None
        first = [json.loads(follower.stdout.readline())["id"] for _ in range(5)]
        assert first == [1, 2, 3, 4, 5]
        program.control.add_alert_from_outside()
        assert json.loads(follower.stdout.readline())["id"] == 6
        follower.send_signal(signal.SIGINT)
        assert follower.wait(10) == 130
        assert follower.stderr.read() == ""


def test_a_reader_that_goes_away_is_no_error(program: Program) -> None:
    with program.start("alerts", "--follow") as follower:
        assert follower.stdout is not None
        assert follower.stderr is not None
        for _ in range(5):
            follower.stdout.readline()
        follower.stdout.close()
        deadline = time.monotonic() + 15
        while follower.poll() is None and time.monotonic() < deadline:
            program.control.add_alert_from_outside()
            time.sleep(0.1)
        follower.kill()  # nothing is left to kill, unless the test fails
        assert follower.wait(5) == 141
        assert follower.stderr.read() == ""


def test_a_lost_stream_is_taken_up_where_it_was_lost(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    control = FakeControl(alerts=2)
    lost: list[str] = []
    with run_api(control, StreamLimits(longest_seconds=0.2)) as url:
        client = Client(Place(url, token_file, "the test"))
        alerts = client.follow_alerts({}, 0, lost.append)
        seen = [next(alerts).id for _ in range(2)]
        time.sleep(0.4)
        control.add_alert_from_outside()
        control.add_alert_from_outside()
        seen += [next(alerts).id for _ in range(2)]
        alerts.close()  # type: ignore[attr-defined]
    assert seen == [1, 2, 3, 4]
    assert lost


def test_the_reference_is_that_of_the_program() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == render_reference()


def test_every_command_with_json_tells_its_shape() -> None:
    from typer.main import get_command

    with_json = {
        name
        for name, command in find_commands("", get_command(build_app()))
        if any("--json" in one.opts for one in command.params)
    }
    assert with_json == set(JSON_SHAPES)


def test_the_default_size_of_a_lab_is_the_labs_own() -> None:
    from appliance.lab import DEFAULT_VMS

    assert lab_commands.DEFAULT_VMS == DEFAULT_VMS


def test_help_and_version_need_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert run_cli(["--help"]) == 0
    assert "policy" in capsys.readouterr().out
    assert run_cli(["version"]) == 0
    assert capsys.readouterr().out.startswith("hairpin ")


def test_a_vm_is_shut_off_listed_and_let_out_again(program: Program) -> None:
    none = program.run("quarantine", "list")
    assert (none.status, none.out) == (0, "no VM is in quarantine\n")
    begun = program.run("quarantine", "add", "web1", "--for", "15m", "--reason", "odd DNS")
    assert (begun.status, begun.err) == (0, "")
    assert begun.out.startswith("VM web1 is shut off after 0.011 s; until 20")
    shown = program.run("quarantine", "list").out
    assert all(text in shown for text in ("web1", "odd DNS", " 7 "))
    ended = program.run("quarantine", "remove", "web1", "--json")
    assert ended.document["quarantine"]["vm"] == "web1"
    assert program.run("quarantine", "remove", "web1").status == 1


@pytest.mark.parametrize(
    "argv",
    [
        ("add", "web1", "--for", "soon"),
        ("add", "web1", "--for", "0s"),
        ("add", "web1", "--for", "367d"),
        ("add", "no such vm"),
        ("add", "web1", "--reason", "two\nlines"),
        ("add", "web1", "--reason", "x" * 201),
        ("add",),
    ],
)
def test_a_wrong_quarantine_is_refused_before_anything_is_sent(
    program: Program, argv: tuple[str, ...]
) -> None:
    assert program.run("quarantine", *argv).status == 2
    assert program.control.quarantined == {}


def test_shunned_flows_are_listed_and_given_back(program: Program) -> None:
    shown = program.run("shun", "list").out
    assert all(text in shown for text in ("0123abcd", "web-to-app", "42", "tp_dst=80"))
    assert program.run("shun", "remove", "ffffffff").status == 1
    assert program.run("shun", "remove", "0123abcd").out == "1 flows given back to the engine\n"
    assert program.run("shun", "list").out == "no flow is shunned\n"
    assert program.run("shun", "remove", "--all", "--json").document == {"removed": 0}


@pytest.mark.parametrize("argv", [(), ("--all", "0123abcd"), ("no-id",), ("0123ABCD",)])
def test_what_to_give_back_is_said_in_one_way(program: Program, argv: tuple[str, ...]) -> None:
    assert program.run("shun", "remove", *argv).status == 2


def test_connections_that_take_a_shortcut_are_listed_with_what_went_uninspected(
    program: Program,
) -> None:
    shown = program.run("shortcut", "list").out
    for text in ("4567cdef", "1MB", "web1 10.77.0.1:40009", "app1 10.77.0.2:80", "12 s", "4200"):
        assert text in shown
    assert (
        "policy web-to-app, after 1MB: 1 of 50; 12 so far, 3 sent back; "
        "345 packets (67890 bytes) went uninspected\n"
    ) in shown


def test_connections_are_sent_back_one_by_one_by_policy_by_vm_or_all(program: Program) -> None:
    kept = list(program.control.shortcuts)
    for argv in (("4567cdef",), ("--policy", "web-to-app"), ("--vm", "web1"), ("--all",)):
        program.control.shortcuts = list(kept)
        ended = program.run("shortcut", "return", *argv)
        assert ended.out == "1 connections are inspected again after 0.012 s\n", argv
        assert program.control.shortcuts == []
    both = program.run("shortcut", "return", "--policy", "web-to-app", "--vm", "web1", "--json")
    assert both.document == {"returned": 0, "seconds": 0.012}
    gone = program.run("shortcut", "return", "ffffffff")
    assert (gone.status, "what to do:" in gone.err) == (1, True)
    assert program.run("shortcut", "return", "--policy", "nobodys").status == 1


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--all", "4567cdef"),
        ("--all", "--policy", "web-to-app"),
        ("4567cdef", "--vm", "web1"),
        ("no-id",),
        ("4567CDEF",),
        ("--policy", "../x"),
        ("--vm", ""),
        ("--policy", ""),
    ],
)
def test_what_to_send_back_is_said_in_one_way_and_nothing_is_sent_back_by_mistake(
    program: Program, argv: tuple[str, ...]
) -> None:
    ended = program.run("shortcut", "return", *argv)
    assert ended.status == 2, ended
    assert len(program.control.shortcuts) == 1


@pytest.mark.parametrize("name", ALONE)
def test_what_units_start_is_the_same_alone(name: str) -> None:
    from typer.main import get_command

    def describe(app: object) -> dict[str, list[list[str]]]:
        found = find_commands("", get_command(app))  # type: ignore[arg-type]
        return {
            path: [[*one.opts, *one.secondary_opts] for one in command.params]
            for path, command in found
            if path.split()[0] == name
        }

    alone = describe(build_app(name))
    assert alone
    assert alone == describe(build_app())


def test_what_units_start_reads_no_more_than_it_needs() -> None:
    """In a process of its own: others have everything by now."""
    script = (
        "import sys; from appliance.cli import run_cli; status = run_cli(['image', '--help']);"
        "sys.exit(status or 'aiohttp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.returncode == 0
