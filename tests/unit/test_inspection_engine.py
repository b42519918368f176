"""The engine's configuration, commands and judgement: everything that is decided without it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from appliance.inspection import engine, heartbeat
from appliance.inspection.config import (
    ADDRESS_GROUPS,
    EngineConfig,
    build_engine_config,
    render_engine_config,
)
from appliance.inspection.faults import KEPT, FaultBook
from appliance.inspection.files import find_rotated, read_log, remove_unread, rotate_eve, trim_log
from appliance.inspection.process import parse_stat
from appliance.inspection.publish import (
    EngineState,
    Fault,
    InspectionState,
    LaneState,
    read_inspection_state,
    write_inspection_state,
)
from appliance.inspection.socket import (
    EngineRefused,
    FailedRule,
    ReloadReport,
    check_reload,
    parse_failed_rules,
    parse_reload_time,
    parse_reply,
    parse_ruleset_stats,
)
from appliance.paths import find_engine_data
from appliance.settings import parse_settings
from steering.errors import HairpinError, WrongInput
from steering.model import Lane, Leg, Profile

LANE = Lane(1, Profile.PREVENT, 100, (0, 1), Leg("leg0", "eth1"), Leg("leg1", "eth2"))
CONFIG = EngineConfig(
    lane=LANE,
    directory=Path("/run/hairpin/lanes/prevent"),
    ruleset=Path("/var/lib/hairpin/rules/prevent/current/suricata.rules"),
    socket=Path("/run/hairpin/lanes/prevent/command.socket"),
)
SETTINGS = parse_settings(
    """
    lanes:
      - profile: prevent
        vlan: 100
        queues: [0]
        legA: {interface: leg0, device: eth1}
        legB: {interface: leg1, device: eth2}
      - profile: detect
        vlan: 101
        queues: [1]
        legA: {interface: leg2, device: eth3}
        legB: {interface: leg3, device: eth4}
    """
)


def render(config=CONFIG):
    return yaml.safe_load(render_engine_config(config))


# --- configuration ---------------------------------------------------------------------------------


def test_packets_are_never_let_by_when_the_engine_cannot_keep_up():
    rendered = render()
    assert rendered["runmode"] == "workers"
    assert rendered["nfq"] == {"mode": "accept", "batchcount": 20, "fail-open": False}


def test_every_exception_has_a_policy_of_its_own():
    rendered = render()
    assert rendered["exception-policy"] == "drop-packet"
    assert rendered["stream"]["midstream"] is True
    assert rendered["stream"]["midstream-policy"] == "ignore"
    assert {
        rendered["flow"]["memcap-policy"],
        rendered["defrag"]["memcap-policy"],
        rendered["stream"]["memcap-policy"],
        rendered["stream"]["reassembly"]["memcap-policy"],
    } == {"drop-packet"}
    assert rendered["app-layer"]["error-policy"] == "drop-flow"
    assert rendered["stream"]["reassembly"]["depth"] == 0


def test_a_lane_that_only_records_drops_no_flow_that_it_cannot_read():
    detect = render(replace(CONFIG, lane=replace(LANE, profile=Profile.DETECT)))
    assert detect["app-layer"]["error-policy"] == "ignore"


def test_attacks_are_seen_from_either_side():
    groups = render()["vars"]["address-groups"]
    assert set(groups) == set(ADDRESS_GROUPS)
    assert set(groups.values()) == {"any"}


def test_events_go_to_one_regular_file_with_what_an_alert_needs():
    (output,) = render()["outputs"]
    eve = output["eve-log"]
    assert (eve["filetype"], eve["filename"], eve["community-id"]) == ("regular", "eve.json", True)
    kinds = {name: options for entry in eve["types"] for name, options in entry.items()}
    assert set(kinds) == {"alert", "drop"}
    alert = kinds["alert"]
    assert alert["verdict"] is alert["payload"] is alert["packet"] is True
    assert alert["metadata"]["rule"]["metadata"] is True


def test_rules_of_a_feed_may_not_run_code_or_write_files():
    rendered = render()
    assert rendered["security"]["lua"]["allow-rules"] is False
    assert rendered["datasets"]["rules"]["allow-write"] is False


def test_hyperscan_is_asked_for_by_name_unless_it_is_not_required():
    assert (render()["mpm-algo"], render()["spm-algo"]) == ("hs", "hs")
    assert render(replace(CONFIG, hyperscan=False))["mpm-algo"] == "auto"


def test_each_lane_has_files_of_its_own():
    first, second = (build_engine_config(SETTINGS, lane) for lane in SETTINGS.build_lanes())
    assert {first.directory, first.ruleset, first.socket}.isdisjoint(
        {second.directory, second.ruleset, second.socket}
    )
    assert render(first)["rule-files"] == [str(first.ruleset)]


@pytest.mark.parametrize("path", ["relative", "/a b", '/a"b', "/a\nb", "/a: b", "/a#b", "/ä"])
def test_a_path_that_would_say_more_than_a_path_is_refused(path):
    with pytest.raises(WrongInput, match="ruleset"):
        render_engine_config(replace(CONFIG, ruleset=Path(path)))


def test_every_bad_path_is_told_at_once_and_a_socket_path_must_fit():
    with pytest.raises(WrongInput) as refused:
        render_engine_config(replace(CONFIG, directory=Path("/a b"), socket=Path("/" + "x" * 107)))
    assert [fault.path for fault in refused.value.faults] == ["directory", "socket"]


@given(st.text(max_size=40))
def test_a_rendered_file_never_says_anything_but_the_path(text):
    ruleset = Path("/" + text)
    try:
        rendered = render_engine_config(replace(CONFIG, ruleset=ruleset))
    except WrongInput:
        return
    assert yaml.safe_load(rendered)["rule-files"] == [str(ruleset)]


def test_engine_data_is_found_in_the_checkout():
    assert (find_engine_data() / "rules").is_dir()


# --- the installed engine --------------------------------------------------------------------------

BUILD_INFO = """This is Suricata version 7.0.10 RELEASE
Features: NFQ PCAP_SET_BUFF AF_PACKET LIBCAP_NG
  Hyperscan support:                       yes
"""
CPU_INFO = "processor\t: 0\nflags\t\t: fpu sse2 ssse3 sse4_1\n"


def test_an_engine_that_will_do():
    facts = engine.parse_engine_facts(BUILD_INFO, CPU_INFO)
    assert (facts.version, facts.text, facts.hyperscan) == ((7, 0, 10), "7.0.10", True)
    assert engine.check_engine_facts(facts, require_hyperscan=True) == ()


@pytest.mark.parametrize(
    ("build_info", "cpu_info", "reason"),
    [
        (BUILD_INFO.replace("7.0.10", "6.0.20"), CPU_INFO, "Suricata 6.0.20 is older than 7.0.3"),
        (BUILD_INFO.replace("NFQ ", ""), CPU_INFO, "built without NFQUEUE"),
        (BUILD_INFO.replace(" yes", " no"), CPU_INFO, "built without Hyperscan"),
        (BUILD_INFO, CPU_INFO.replace("ssse3 ", ""), "shows no SSSE3"),
    ],
)
def test_an_engine_that_will_not_do(build_info, cpu_info, reason):
    facts = engine.parse_engine_facts(build_info, cpu_info)
    ((told, mend),) = engine.check_engine_facts(facts, require_hyperscan=True)
    assert reason in told
    assert mend


def test_hyperscan_may_be_done_without_only_when_told_so():
    facts = engine.parse_engine_facts(BUILD_INFO.replace(" yes", " no"), CPU_INFO)
    assert engine.check_engine_facts(facts, require_hyperscan=False) == ()


def test_something_that_is_no_suricata():
    with pytest.raises(HairpinError, match="names no version"):
        engine.parse_engine_facts("hello", CPU_INFO)


def test_an_engine_starts_as_its_user_with_one_capability():
    argv = engine.render_start(Path("/usr/bin/suricata"), "hairpin-engine", LANE, Path("/c.yaml"))
    assert " ".join(argv) == (
        "setpriv --reuid=hairpin-engine --regid=hairpin-engine --init-groups"
        " --inh-caps=-all,+net_admin --ambient-caps=-all,+net_admin"
        " --bounding-set=-all,+net_admin --no-new-privs --"
        " /usr/bin/suricata -c /c.yaml -v -q 0 -q 1"
    )
    assert engine.render_urgency(-10) == ("nice", "-n", "-10")
    assert engine.render_urgency(0) == ()


def test_a_test_passes_only_with_rules():
    loaded = "Info: detect: 1 rule files processed. 8 rules successfully loaded, 2 rules failed, 0"
    report = engine.parse_test(0, loaded)
    assert (report.passed, report.rules_loaded, report.rules_failed) == (True, 8, 2)
    assert not engine.parse_test(1, loaded).passed
    assert not engine.parse_test(0, loaded.replace("8 rules", "0 rules")).passed
    assert not engine.parse_test(0, "").passed
    assert engine.parse_test(1, "Info: x\nError: y: bad").complaint == "Error: y: bad"


# --- the command socket ----------------------------------------------------------------------------

RELOADED = ReloadReport("10:00", "10:01", rules_loaded=8, rules_failed=0, failed=())


def test_a_good_reload_is_believed():
    assert check_reload(RELOADED, floor=8) == ()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"reload_time_after": "10:00"}, "the engine's reload time did not change"),
        ({"rules_loaded": 7}, "7 rules loaded, fewer than the floor of 8"),
        (
            {"rules_failed": 1, "failed": (FailedRule(5, "", ""),)},
            "1 rules failed that loaded before (sid 5)",
        ),
        ({"rules_failed": 2}, "2 rules failed, of which the engine names 0"),
    ],
)
def test_a_bad_reload_that_answered_done_is_not_believed(change, fault):
    assert check_reload(replace(RELOADED, **change), floor=8) == (fault,)


def test_rules_known_to_fail_are_forgiven():
    report = replace(RELOADED, rules_failed=1, failed=(FailedRule(5, "", ""),))
    assert check_reload(report, floor=8, known_failed={5}) == ()


def test_answers_of_a_real_engine():
    assert parse_reply(b'{"message":3,"return":"OK"}\n', "uptime") == 3
    stats = parse_ruleset_stats(
        [{"id": 0, "rules_loaded": 2, "rules_failed": 1, "rules_skipped": 0}]
    )
    assert (stats.rules_loaded, stats.rules_failed) == (2, 1)
    assert (
        parse_reload_time([{"id": 0, "last_reload": "2026-11-23T08:57:25.607960+0000"}])
        == "2026-11-23T08:57:25.607960+0000"
    )
    rule = 'drop tcp any any -> any any (msg:"x"; sid:77; nosuch;)'
    failed = [{"tenant_id": 0, "rule": rule, "filename": "f", "line": 3, "error": "unknown"}]
    assert parse_failed_rules(failed) == (FailedRule(77, rule, "unknown"),)


@pytest.mark.parametrize(
    "line",
    [
        b'{"message":"Unknown command","return":"NOK"}\n',
        b"[]\n",
        b"nonsense\n",
        b"\xff\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_a_refusal_or_nonsense_is_told_as_such(line):
    with pytest.raises(EngineRefused):
        parse_reply(line, "uptime")


@given(st.recursive(st.none() | st.text() | st.integers(), lambda inner: st.lists(inner)))
def test_no_answer_surprises(message):
    for parse in (parse_ruleset_stats, parse_failed_rules, parse_reload_time):
        try:
            parse(message)
        except EngineRefused:
            continue
        assert message == []


# --- hung or alive ---------------------------------------------------------------------------------


def beats(*rows):
    return [heartbeat.Beat(at, answered, waiting, cpu) for at, answered, waiting, cpu in rows]


def test_an_engine_that_answers_is_alive_however_idle():
    assert heartbeat.find_hang(beats(*((at, True, 0, 0.0) for at in range(60)))) is None


def test_an_engine_that_is_silent_and_idle_is_hung_after_three_seconds():
    silent = [(0, True, 0, 1.0), *((at, False, 0, 1.0) for at in range(1, 5))]
    assert heartbeat.find_hang(beats(*silent[:4])) is None
    assert "did not answer for 3.0 s" in (heartbeat.find_hang(beats(*silent)) or "")


def test_an_engine_that_loads_rules_is_silent_but_works():
    loading = [(at, False, 0, at * 0.9) for at in range(170)]
    assert heartbeat.find_hang(beats(*loading)) is None
    endless = [(at, False, 0, at * 0.9) for at in range(182)]
    assert "did not answer for 181 s" in (heartbeat.find_hang(beats(*endless)) or "")


def test_packets_that_wait_for_an_idle_engine_are_a_hang_even_when_it_answers():
    stuck = [(at, True, 5, 1.0) for at in range(5)]
    assert "left packets waiting" in (heartbeat.find_hang(beats(*stuck)) or "")
    busy = [(at, True, 5, at * 1.0) for at in range(50)]
    assert heartbeat.find_hang(beats(*busy)) is None


def test_one_answer_ends_the_silence():
    mixed = [(0, False, 0, 0.0), (2, False, 0, 0.0), (3, True, 0, 0.0), (5, False, 0, 0.0)]
    assert heartbeat.find_hang(beats(*mixed)) is None
    assert heartbeat.find_hang([]) is None


def test_the_first_restart_is_immediate_and_repeated_ones_slow_down():
    delays = [heartbeat.find_restart_delay([1000.0] * count, 1000.0) for count in range(1, 10)]
    assert delays == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert heartbeat.find_restart_delay([900.0] * 9, 1000.0) == 0.0


# --- what is published and kept --------------------------------------------------------------------


def test_a_published_state_is_read_back(tmp_path):
    path = tmp_path / "inspection.json"
    state = InspectionState(
        updated=5.0,
        pid=7,
        dialect="iptables",
        lanes=(
            LaneState(
                number=1,
                name="prevent",
                state=EngineState.RUNNING,
                pid=8,
                faults=(Fault(reason="r", mend="m", since=1.0),),
            ),
        ),
    )
    write_inspection_state(path, state)
    assert read_inspection_state(path) == state
    assert path.stat().st_mode & 0o777 == 0o644
    assert [left.name for left in tmp_path.iterdir()] == ["inspection.json"]


@pytest.mark.parametrize("content", ["", "{}", '{"updated": "x"}', "[" * 5000, "x" * (2**20 + 1)])
def test_a_state_that_cannot_be_understood_is_none(tmp_path, content):
    path = tmp_path / "inspection.json"
    assert read_inspection_state(path) is None
    path.write_text(content)
    assert read_inspection_state(path) is None


def test_a_fault_keeps_its_beginning_and_is_told_a_while_after_it_was_mended():
    book = FaultBook()
    book.note("devices", "gone", "attach it", 10.0)
    book.note("devices", "still gone", "attach it", 20.0)
    assert book.build(20.0) == (Fault(reason="still gone", mend="attach it", since=10.0),)
    book.mend("devices", 30.0)
    book.mend("devices", 40.0)
    assert book.build(30.0)[0].mended == 30.0
    assert book.build(31.0 + KEPT) == ()
    book.note("devices", "gone again", "", 50.0)
    assert book.build(50.0) == (Fault(reason="gone again", since=50.0),)


def test_eve_files_are_renamed_at_their_limit_and_the_oldest_unread_go(tmp_path):
    eve = tmp_path / "eve.json"
    assert not rotate_eve(eve, 10)
    for round_ in range(6):
        eve.write_text(f"{round_}" * 10)
        assert rotate_eve(eve, 10)
        assert not eve.exists()
    eve.write_text("short")
    assert not rotate_eve(eve, 10)
    assert [path.read_text()[0] for path in find_rotated(eve)] == list("012345")
    assert len(remove_unread(eve, kept=4)) == 2
    assert [path.read_text()[0] for path in find_rotated(eve)] == list("2345")
    assert remove_unread(eve, kept=4) == ()
    assert eve.exists()


def test_an_engine_that_gave_up_hyperscan_says_so_in_its_log():
    told = "Warning: mpm: mpm-algo hs is not supported on this CPU, falling back to ac"
    assert engine.find_matcher_fault(f"Info: x\n{told}\nInfo: y") == told
    assert engine.find_matcher_fault("Info: threads: Threads created") is None


def test_an_engine_log_is_emptied_under_a_writer_that_appends(tmp_path):
    log = tmp_path / "engine.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"a" * 100)
        trim_log(log, 100)
        assert log.stat().st_size == 100
        writer.write(b"b")
        trim_log(log, 100)
        writer.write(b"after")
    assert log.read_bytes() == b"after"
    assert (tmp_path / "engine.log.1").stat().st_size == 101
    assert read_log(log, 2) == "ter"
    assert read_log(log, 99) == "after"


def test_a_log_that_became_a_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("x" * 100)
    (tmp_path / "engine.log").symlink_to(victim)
    trim_log(tmp_path / "engine.log", 10)
    assert victim.stat().st_size == 100


def test_a_process_is_known_by_its_start_whatever_it_calls_itself():
    state, cpu, ticks = parse_stat(
        "42 (Suri) R 1 (x) S 1 42 42 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 5 0 987654 1 2"
    )
    assert (state, ticks) == ("S", 987654)
    assert cpu == pytest.approx(300 / os.sysconf("SC_CLK_TCK"))
    with pytest.raises(ValueError, match="proc"):
        parse_stat("42 (x) S 1")
