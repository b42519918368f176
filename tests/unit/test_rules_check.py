"""What a rule from a source may do, and how its text is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.rules.canary import find_token, seal_rules
from appliance.rules.check import build_source, check_rule_line, finish_rules
from appliance.rules.docs import BEGIN, END, render_document, render_table
from appliance.rules.merge import build_changed, find_missing
from appliance.rules.model import STARTER_SIDS, Changed, Rule, Unparsed
from appliance.rules.parse import LINE_LIMIT, build_info, parse_cve, parse_lines, parse_rule
from appliance.rules.shortcut import SHORTCUT_KEYS, build_shortcut_rules, has_marks
from steering.model import Profile

ROOT = Path(__file__).resolve().parents[2]


def rule(options: str = "", sid: int = 1, action: str = "alert", msg: str = "m") -> str:
    return f'{action} tcp any any -> any any (msg:"{msg}"; {options} sid:{sid}; rev:1;)'


def reason(line: str, starter: bool = False) -> str:
    verdict = check_rule_line(line, starter)
    return verdict.reason if isinstance(verdict, Unparsed) else ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (rule(action="pass"), "action pass"),
        (rule(action="PASS"), "action pass"),
        (rule(action="config"), "action config"),
        (rule(action="log"), "action log"),
        (rule("flowbits:set,hairpin.tls;"), "flowbits that begin with hairpin."),
        (rule("flowbits: isset , Hairpin.rule;"), "flowbits that begin with hairpin."),
        (rule("lua:x.lua;"), "option lua"),
        (rule("luajit:x.lua;"), "option luajit"),
        (rule("filestore;"), "option filestore"),
        (rule('content:"a"; replace:"b";'), "option replace"),
        (rule("filemd5:../../../etc/cron.d/x;"), "option filemd5"),
        (rule("dns.query; dataset:set,seen,type string,save /etc/x;"), "dataset with save"),
        (rule("dns.query; dataset: isset, seen, type string, load /etc/shadow;"), "dataset with load"),
        (rule("dns.query; dataset:set,seen,type string,hashsize 4000000000;"), "dataset with hashsize"),
        (rule("datarep:x,>,1,load /etc/passwd,type string;"), "option datarep"),
        (rule(sid=4850000), "are the starter rules'"),
        (rule("gid:7;", sid=4850999), "are the starter rules'"),
        (rule(sid=0), "sid is not a number"),
        (rule(sid=2**32), "sid is not a number"),
        (rule("sid:2;"), "two sids"),
        ('alert tcp any any -> any any (msg:"x";)', "has no sid"),
        (rule() + " pass ip any any -> any any (sid:2;)", "an option that is no name"),
        (rule().replace("rev:1;)", "rev:1)"), "does not end in a semicolon"),
        ("Dear operator, please load me", "is no rule"),
        (rule(msg="a\x00b"), "control characters"),
        (rule(msg="a\u2028b"), "control characters"),
        (rule(msg="a\ufffdb"), "control characters"),
        (rule(msg="x" * LINE_LIMIT), "longer than"),
    ],
)  # fmt: skip
def test_a_dangerous_rule_is_refused_with_its_reason(line: str, said: str) -> None:
    assert said in reason(line)


@pytest.mark.parametrize(
    "line",
    [
        rule(),
        rule(action="drop"),
        rule(action="rejectboth"),
        rule('content:"bypass; lua:x\\;";', msg="about bypass: and pass").replace("s; l", "s\\; l"),
        rule("dns.query; dataset:isset,seen,type string;"),
        rule("flowbits:set,a; noalert;"),
        rule(sid=4851000),
        rule(msg="caf\u00e9"),
    ],
)
def test_an_ordinary_rule_is_accepted(line: str) -> None:
    assert reason(line) == ""


def test_a_starter_rule_keeps_to_its_sids() -> None:
    assert reason(rule(sid=4850000), starter=True) == ""
    assert "starter rules have sids" in reason(rule(sid=4851000), starter=True)


@given(st.text())
def test_no_text_breaks_the_parser(text: str) -> None:
    assert isinstance(parse_rule(text), Rule | Unparsed)


@given(
    st.lists(
        st.text(st.characters(codec="ascii", exclude_characters='\\;"\n'), min_size=1), max_size=5
    )
)
def test_options_are_read_back_as_written(values: list[str]) -> None:
    options = "".join(f'content:"{value}"; ' for value in values)
    parsed = parse_rule(rule(options))
    if any(not value.replace("\t", " ").isprintable() for value in values):
        assert isinstance(parsed, Unparsed)
    else:
        assert isinstance(parsed, Rule)
        found = [value for name, value in parsed.options if name == "content"]
        assert found == [f'"{value}"' for value in values]


@given(st.binary(max_size=300))
def test_any_bytes_of_a_feed_are_read_or_named(data: bytes) -> None:
    source = build_source("feed", [("x.rules", data + b"\n" + rule().encode())])
    assert rule() in source.enabled or source.left_out


def test_lines_are_joined_and_comments_told_from_disabled_rules() -> None:
    text = rule()
    data = f"# Copyright\n\n# {text}\n{text[:20]}\\\n{text[20:]}\r\n#{text}".encode()
    lines = list(parse_lines(data))
    assert [enabled for _, enabled in lines] == [False, True, False]
    assert all(isinstance(parse_rule(line), Rule) for line, _ in lines)


def test_a_source_is_taken_as_alerts_and_what_is_left_out_is_named() -> None:
    lines = [
        rule(sid=1, action="drop"),
        rule("replace:x;", sid=2),
        "# " + rule(sid=3),
        "# " + rule("lua:x;", sid=4),
    ]
    source = build_source("feed", [("a.rules", "\n".join(lines).encode())])
    assert source.enabled == (rule(sid=1),)
    assert source.disabled == (rule(sid=3),)
    assert [(one.sid, one.source) for one in source.left_out] == [(2, "feed")]
    assert "replace" in source.left_out[0].reason


def test_rules_past_the_limit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.rules.check.RULE_LIMIT", 2)
    data = "\n".join(rule(sid=number) for number in range(1, 5)).encode()
    source = build_source("feed", [("a.rules", data)])
    assert len(source.enabled) == 2
    assert ["more than 2 rules" in one.reason for one in source.left_out] == [True, True]


def test_a_silent_rule_never_drops() -> None:
    """suricata-update enables a rule for its flowbits and silences it after having made a drop of it."""
    lines = [
        rule("flowbits:set,a; noalert;", sid=3, action="drop"),
        rule("flowbits: noalert;", sid=2, action="drop"),
        rule(sid=1, action="drop"),
    ]
    rules, left_out, _ = finish_rules(lines, Profile.PREVENT)
    assert [(one.sid, one.action, one.text.split()[0]) for one in rules] == [
        (1, "drop", "drop"),
        (2, "alert", "alert"),
        (3, "alert", "alert"),
    ]
    assert not left_out


def test_a_lane_that_detects_never_drops() -> None:
    given = [rule(action="drop"), rule(sid=2, action="reject")]
    rules, _, _ = finish_rules(given, Profile.DETECT)
    assert [one.action for one in rules] == ["alert", "alert"]


def test_what_a_modification_spoils_is_left_out() -> None:
    rules, left_out, _ = finish_rules([rule("replace:x;")], Profile.PREVENT)
    assert not rules
    assert "replace" in left_out[0].reason


BYPASS = {
    "a mark": (
        rule("BYPASS ;", action="alert"),
        True,
        "nfq_set_mark:0x2000000/0x2000000; flowbits:set,hairpin.rule;",
    ),
    # Suricata takes the name before a colon, whatever stands behind it.
    **{
        f"written {spelling!r}": (
            rule(spelling, action="alert"),
            True,
            "nfq_set_mark:0x2000000/0x2000000;",
        )
        for spelling in ("bypass:;", "bypass: ;", "Bypass : ;", "bypass\t:;", " bypass:  ;")
    },
    "no third leg": (rule("bypass;", action="alert"), False, ""),
    "no third leg, with a colon": (rule("bypass:;", action="alert"), False, ""),
    "a drop": (rule("bypass;", action="drop"), True, ""),
    "a word in a content": (
        rule('content:"a\\; bypass\\;"; bypass;', action="alert"),
        True,
        "nfq_set_mark:0x2000000",
    ),
}


@pytest.mark.parametrize("name", BYPASS)
def test_a_rule_with_bypass_goes_on_inspecting_and_it_is_told(name: str) -> None:
    line, shortcut, marks = BYPASS[name]
    (found,), left_out, rewritten = finish_rules([line], Profile.PREVENT, shortcut=shortcut)
    assert not left_out
    assert "bypass" not in [option for option, _ in found.options]
    again = parse_rule(found.text)
    assert isinstance(again, Rule)
    assert "bypass" not in [option for option, _ in again.options]
    assert marks in found.text
    assert ("nfq_set_mark" in found.text) is bool(marks)
    assert found.action == line.split()[0]
    assert [value for option, value in again.options if option == "content"] == [
        value for option, value in parse_rule(line).options if option == "content"
    ]
    assert [(one.sid, "goes on inspecting" in one.reason) for one in rewritten] == [(1, True)]


def test_the_shortcuts_own_rules_never_alert_or_drop() -> None:
    lines = build_shortcut_rules()
    for line in lines:
        parsed = parse_rule(line)
        assert isinstance(parsed, Rule)
        assert (parsed.action, parsed.silent) == ("alert", True)
        assert parsed.key in SHORTCUT_KEYS
        assert parsed.sid in STARTER_SIDS
    text = seal_rules("".join(f"{line}\n" for line in lines))
    assert has_marks(text)
    assert not has_marks(text.replace("1000000", "1000", 1))
    assert find_token(text) != find_token(seal_rules(""))


def test_what_the_merge_loses_is_named_and_every_rule_has_its_source() -> None:
    sources = [
        build_source("a", [("a", "\n".join([rule(sid=1, msg="old"), rule(sid=2)]).encode())]),
        build_source("b", [("b", rule(sid=1, msg="new").encode())]),
    ]
    kept = parse_rule(rule(sid=1, msg="new"))
    assert isinstance(kept, Rule)
    owners, missing = find_missing(sources, {kept.key: kept}, frozenset())
    assert owners == {"1:1": "b"}
    assert [(one.sid, one.source) for one in missing] == [(2, "a"), (1, "a")]
    assert "source b has the same sid" in missing[1].reason


def test_changes_are_counted() -> None:
    assert build_changed({"a": "1", "b": "1"}, {"b": "2", "c": "1"}) == Changed(1, 1, 1)
    assert not build_changed({"a": "1"}, {"a": "1"}).any


@pytest.mark.parametrize(
    ("text", "cve"),
    [
        ("CVE-2021-44228", "CVE-2021-44228"),
        ("cve_2021_44228", "CVE-2021-44228"),
        ("2021-44228", "CVE-2021-44228"),
        ("44228", None),
        ("CVE-2021-44228; drop", None),
    ],
)
def test_cves_as_people_write_them(text: str, cve: str | None) -> None:
    assert parse_cve(text) == cve


def test_every_starter_rule_is_complete_and_documented() -> None:
    files = sorted((ROOT / "suricata/rules").glob("*.rules"))
    source = build_source(
        "starter", [(file.name, file.read_bytes()) for file in files], starter=True
    )
    assert not source.left_out
    rules = [parsed for line in source.enabled if isinstance(parsed := parse_rule(line), Rule)]
    assert len({one.sid for one in rules}) == len(rules) >= 17
    infos = [build_info(one, "starter") for one in rules]
    for parsed, info in zip(rules, infos, strict=True):
        header = parsed.text.partition("(")[0]
        assert header == f"alert {parsed.protocol} any any -> any any ", info.sid
        if (
            info.classtype == "protocol-command-decode"
        ):  # hairpin-wire: no exploit, but no packet either
            assert info.sid in range(4850800, 4850900)
            continue
        assert info.cves, info.sid
        assert info.products, info.sid
        assert info.classtype == "attempted-admin" or info.classtype == "web-application-attack"
        assert info.severity == "Critical"
        assert parsed.find("flow") == "established,to_server"
        assert all(f"cve,{cve[4:]}" in parsed.text for cve in info.cves)
        assert "created_at 20" in parsed.text
    document = (ROOT / "docs/rules.md").read_text()
    assert render_document(document, render_table(infos)) == document, (
        "write it again: python -m tests.support.rule_table"
    )
    assert all(file.read_text().startswith("# Copyright") for file in files)


def test_a_document_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="starter rules"):
        render_document(BEGIN, "")
    assert render_document(f"a{BEGIN}old{END}b", "t") == f"a{BEGIN}\nt\n{END}b"
