"""What Suricata says of a ruleset, as it says it."""

from __future__ import annotations

from appliance.rules.model import Rule
from appliance.rules.parse import parse_rule
from appliance.rules.trial import Fault, find_faulty, parse_trial, render_rules

# Words of Suricata 7.0.10, also with the time stamps of a log file.
REFUSED = """\
Notice: suricata: This is Suricata version 7.0.10 RELEASE running in SYSTEM mode
Info: suricata: Running suricata under test mode
Error: detect: previous sticky buffer has no matches
Error: detect: error parsing signature "alert http any any -> any any (sid:2;)" from file /x y/s.rules at line 2
[8579 - Suricata-Main] 2026-11-23 08:54:53 Error: detect-parse: no terminating ";" found
[8579 - Suricata-Main] Error: detect: error parsing signature "alert tcp any any -> any any (msg:"long
Info: detect: 1 rule files processed. 17 rules successfully loaded, 2 rules failed, 1
Error: suricata: Loading signatures failed.
"""


def rules(*lines: str) -> list[Rule]:
    return [rule for line in lines if isinstance(rule := parse_rule(line), Rule)]


def test_every_refused_rule_is_told_with_its_reason() -> None:
    trial = parse_trial(1, REFUSED)
    assert (trial.loaded, trial.failed, trial.skipped) == (17, 2, 1)
    text = "alert http any any -> any any (sid:2;)"
    assert trial.faults == (
        Fault(2, text, "previous sticky buffer has no matches"),
        Fault(None, 'alert tcp any any -> any any (msg:"long', 'no terminating ";" found'),
    )


def test_a_message_that_was_cut_is_matched_by_how_the_rule_begins() -> None:
    some = rules(
        'alert tcp any any -> any any (msg:"short"; sid:1;)',
        'alert tcp any any -> any any (msg:"long one"; sid:2;)',
    )
    assert find_faulty(some, parse_trial(1, REFUSED).faults[1:]) == {
        "1:2": 'no terminating ";" found'
    }


def test_a_line_number_out_of_range_blames_nobody() -> None:
    some = rules('alert tcp any any -> any any (msg:"short"; sid:1;)')
    assert find_faulty(some, [Fault(2, "x", "r"), Fault(0, "x", "r"), Fault(None, "", "r")]) == {}


def test_lines_of_the_file_are_places_in_the_ruleset() -> None:
    some = rules("alert tcp any any -> any any (sid:1;)", "alert tcp any any -> any any (sid:2;)")
    assert render_rules(some).splitlines() == [rule.text for rule in some]


def test_no_words_are_no_success() -> None:
    trial = parse_trial(0, "")
    assert (trial.loaded, trial.failed) == (0, 0)
