"""The demonstration's verdict and what it reads from its tools, without a lab."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from appliance.lab import demo
from appliance.lab.demo_policies import (
    EXPLOITS,
    LOG4SHELL,
    VERSIONS,
    Attempt,
    build_attempt_argv,
    build_documents,
    find_policy,
)
from appliance.lab.demo_probe import (
    AnswerKind,
    count_sent,
    find_first_arrival,
    find_passed,
    parse_capture,
    read_curl,
    read_redis,
)
from appliance.lab.demo_report import Check, build_rows, is_passed, render_seconds, render_summary
from appliance.lab.demo_stage import Stage, find_differences
from appliance.lab.demo_steps import is_alert_of
from appliance.lab.plan import build_state, build_vms
from steering.coverage import build_coverage
from steering.decide import resolve_machines
from steering.errors import HairpinError
from steering.model import Port
from steering.parse import parse_documents
from steering.run import Finished

GOOD = Check("a", "benign HTTP", "HTTP 200", "HTTP 200", True)
BAD = replace(GOOD, seen="no answer", ok=False)


def test_the_last_line_counts_what_was_right_and_passes_only_if_all_was() -> None:
    assert render_summary([GOOD, GOOD]) == "demo: PASS 2/2"
    assert render_summary([GOOD, BAD, GOOD]) == "demo: FAIL 2/3"


def test_nothing_checked_is_a_failure() -> None:
    assert render_summary([]) == "demo: FAIL 0/0"
    assert not is_passed([])


def test_a_row_tells_whether_it_was_right() -> None:
    assert [row[-1] for row in build_rows([GOOD, BAD])] == ["ok", "fail"]
    assert render_seconds(0.1449) == "0.14 s"
    assert render_seconds(None) == "never"


def build_stage() -> Stage:
    state = build_state("demo", 6, serve=True, overrides={}, random=bytes(10), api_port=1, now=0.0)
    return Stage(state, lambda _line: None)


def test_a_step_that_breaks_off_fails_and_the_next_one_is_still_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(_stage: Stage) -> Iterator[Check]:
        yield GOOD
        raise HairpinError("curl is not there\nmore of it")

    def defective(_stage: Stage) -> Iterator[Check]:
        yield GOOD
        raise KeyError("items")

    def fine(_stage: Stage) -> Iterator[Check]:
        yield GOOD

    checks: list[Check] = []
    demo.run_steps(build_stage(), (("a", refused), ("b", defective), ("c", fine)), checks)
    assert [one.ok for one in checks] == [True, False, True, False, True]
    assert checks[1].seen == "broke off: curl is not there"
    assert "KeyError" in checks[3].seen
    assert render_summary(checks) == "demo: FAIL 3/5"
    told = capsys.readouterr()
    assert "more of it" in told.err
    assert "Traceback" in told.err
    assert told.out == ""


def run_main_with(
    monkeypatch: pytest.MonkeyPatch, play: Any, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[str]]:
    """The program around the scenario; the lab is a fake, so that a step can fail at will."""
    taken: list[str] = []
    # A demonstration may run on this machine meanwhile.
    monkeypatch.setattr(demo, "CLAIM", f"\0hairpin-demo-test-{os.getpid()}")
    monkeypatch.setattr(demo, "take_down", lambda name, progress: taken.append(name))
    monkeypatch.setattr(demo, "bring_up", lambda name, progress: build_stage().state)
    monkeypatch.setattr(demo, "play", play)
    monkeypatch.setattr(demo, "find_remains", lambda name: [])
    monkeypatch.setattr(demo, "configure_logs", lambda level: None)
    status = demo.main()
    assert taken == ["demo", "demo"]  # what an earlier run left, and at the end
    return status, capsys.readouterr().out.splitlines()


def test_a_failed_check_makes_the_last_line_and_the_status_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = run_main_with(
        monkeypatch, lambda state, say, checks: checks.extend([GOOD, BAD]), capsys
    )
    assert (status, out[-1]) == (1, "demo: FAIL 2/3")
    assert [line.split()[-1] for line in out[1:-1]] == ["ok", "fail", "ok"]


def test_all_right_makes_it_a_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = run_main_with(monkeypatch, lambda state, say, checks: checks.append(GOOD), capsys)
    assert (status, out[-1]) == (0, "demo: PASS 2/2")


def test_an_interruption_takes_down_and_is_no_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def play(state: object, say: object, checks: list[Check]) -> None:
        checks.append(GOOD)
        raise KeyboardInterrupt

    status, out = run_main_with(monkeypatch, play, capsys)
    assert (status, out[-1]) == (130, "demo: FAIL 2/3")


def test_a_second_demonstration_does_not_take_down_the_first_ones_lab(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    # A demonstration may run on this machine meanwhile.
    monkeypatch.setattr(demo, "CLAIM", f"\0hairpin-demo-test-{os.getpid()}")
    monkeypatch.setattr(demo, "take_down", lambda name, progress: taken.append(name))
    monkeypatch.setattr(demo, "configure_logs", lambda level: None)
    with demo.hold_stage():
        assert demo.main() == 1
    assert taken == []
    assert capsys.readouterr().out == "demo: FAIL 0/0\n"


# The documents


@pytest.mark.parametrize("with_added", [False, True])
def test_the_documents_leave_one_blind_spot_until_the_last_policy(with_added: bool) -> None:
    vms = build_vms("demo", 6)
    found = parse_documents(build_documents(vms, with_added=with_added))
    ports = [
        Port(vm.interface, vm.ofport, vm.mac, vm.iface_id, vm.vm_id, "br-int", None) for vm in vms
    ]
    pairs = {
        (one.source.name, one.destination.name): str(one.status)
        for one in build_coverage(found, resolve_machines(found, ports)).pairs
    }
    assert pairs["web-1", "app-1"] == pairs["app-1", "web-1"] == pairs["app-1", "db-1"]
    assert pairs["app-1", "db-1"] == "inspected"
    assert pairs["db-1", "db-2"] == "direct"
    assert pairs["web-2", "db-1"] == ("inspected" if with_added else "blind")


# What the tools print


@pytest.mark.parametrize(
    ("status", "out", "kind"),
    [
        (0, "200 0.001", AnswerKind.ANSWERED),
        (28, "000 0.001200", AnswerKind.SILENT),
        (28, "000 0.000000", AnswerKind.UNREACHED),
        (7, "000 0.000000", AnswerKind.UNREACHED),
        (52, "000 0.001", AnswerKind.FAILED),
        (56, "000 0.001", AnswerKind.FAILED),
    ],
)
def test_only_a_connection_without_an_answer_counts_as_blocked(
    status: int, out: str, kind: AnswerKind
) -> None:
    assert read_curl(Finished(status, out, "")).kind is kind


def test_only_http_200_is_a_good_answer() -> None:
    assert read_curl(Finished(0, "200 0.1", "")).is_200
    assert not read_curl(Finished(0, "403 0.1", "")).is_200


@pytest.mark.parametrize(
    ("ended", "kind"),
    [
        (Finished(0, "ERR Error running script: nil value (global 'package')", ""), "answered"),
        (Finished(0, "uid=0(root)", ""), "answered"),
        (Finished(124, "", ""), "silent"),
        (Finished(1, "", "Could not connect to Redis at fd77::2:6379: refused"), "unreached"),
        (Finished(127, "", ""), "failed"),
    ],
)
def test_an_answer_of_redis_is_told_from_silence(ended: Finished, kind: str) -> None:
    assert read_redis(ended).kind == kind


CAPTURE = """\
tcpdump: verbose output suppressed, use -v[v]... for full protocol decode
listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes
100.000000 IP 10.77.0.1 > 10.77.0.2: ICMP echo request, id 4, seq 1, length 64
100.010000 IP 10.77.0.1 > 10.77.0.2: ICMP echo request, id 4, seq 2, length 64
100.010100 IP 10.77.0.2 > 10.77.0.1: ICMP echo reply, id 4, seq 2, length 64
100.0200"""


def test_requests_are_read_from_a_capture_whose_last_line_is_not_yet_whole() -> None:
    assert parse_capture(CAPTURE) == {1: 100.0, 2: 100.01}


def test_a_packet_passed_an_outage_if_it_was_sent_and_arrived_in_it() -> None:
    sent = {1: 9.99, 2: 10.01, 3: 10.5, 4: 10.99, 5: 11.5}
    arrived = {1: 10.01, 3: 10.51, 4: 11.01, 5: 11.51}
    # 1 was under way when the engine died, 2 was lost, 4 was taken by the engine that came back.
    assert find_passed(sent, arrived, 10.0, 11.0) == [3]
    assert count_sent(sent, 10.0, 11.0) == 3
    assert find_first_arrival(sent, arrived, 10.0) == 10.51
    assert find_first_arrival(sent, arrived, 12.0) is None


def test_changed_settings_and_new_links_of_a_lab_are_found() -> None:
    before = {"sysctl a": "0", "sysctl b": "0", "link eth0": "there"}
    after = {"sysctl a": "1", "sysctl c": "1", "link eth0": "there", "link vnet01": "there"}
    assert find_differences(before, after) == ["sysctl a", "link vnet01"]
    assert find_differences(before, before) == []


# Exploits and their alerts


def test_every_exploit_is_another_cve_and_every_request_has_a_token_of_its_own() -> None:
    assert len({one.cve for one in EXPLOITS}) == len(EXPLOITS) == 4
    attempts = [
        Attempt(exploit, *pair, version)
        for exploit in (None, *EXPLOITS)
        for pair in (("web-1", "app-1"), ("app-1", "web-1"))
        for version in VERSIONS
    ]
    assert len({one.token for one in attempts}) == len(attempts)
    for one in attempts:
        argv = build_attempt_argv(one, "fd77::2", 3)
        assert any(one.token in part for part in argv)
        assert ("--noproxy" in argv) != one.is_redis


def build_alert() -> dict[str, Any]:
    return {
        "source": {"vm": {"name": "web-1"}, "address": "10.77.0.1"},
        "destination": {"vm": {"name": "app-1"}, "address": "10.77.0.2"},
        "signature": {"cves": ["CVE-2021-44228"]},
        "verdict": "blocked",
        "policy": "web-to-app",
    }


def test_an_alert_is_that_of_an_exploit_only_if_all_of_it_is_right() -> None:
    attempt = Attempt(LOG4SHELL, "web-1", "app-1", "IPv4")
    assert is_alert_of(build_alert(), attempt)
    wrong: list[dict[str, Any]] = [
        {"source": {"vm": None, "address": "10.77.0.1"}},
        {"source": {"vm": {"name": "web-2"}, "address": "10.77.0.4"}},
        {"destination": {"vm": {"name": "app-1"}, "address": "fd77::2"}},
        {"signature": {"cves": ["CVE-2014-6271"]}},
        {"verdict": "allowed"},
        {"policy": "app-to-web"},
        {"policy": None},
    ]
    for one in wrong:
        assert not is_alert_of({**build_alert(), **one}, attempt), one


def test_policies_are_named_by_the_zones_of_the_pair() -> None:
    assert find_policy("web-2", "db-1") == "web-to-db"
