"""The canary's rule: sealed behind a ruleset, and found again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.rules.canary import find_token, seal_rules
from appliance.rules.model import STARTER_SIDS
from appliance.rules.parse import parse_rule
from steering.canary import SID, build_rule

RULE = 'alert tcp any any -> any any (msg:"a"; sid:1; rev:1;)\n'


def test_the_rule_as_the_engine_reads_it() -> None:
    assert build_rule("0123456789abcdef") == (
        "drop udp [198.18.72.80,fd48:5049:5250::80] any -> [198.18.72.81,fd48:5049:5250::81] 4850 "
        '(msg:"HAIRPIN canary"; content:"hairpin-canary 0123456789abcdef "; startswith; fast_pattern; '
        "classtype:not-suspicious; sid:4850999; rev:1;)"
    )
    assert parse_rule(build_rule("0123456789abcdef")).sid == SID
    assert SID in STARTER_SIDS, "so that no feed can bring a rule with its number"


@given(st.text(alphabet="abc\n", max_size=40))
def test_another_ruleset_has_another_token(text: str) -> None:
    sealed = seal_rules(f"{text}\n")
    assert find_token(sealed) is not None
    assert find_token(seal_rules(f"{text}x\n")) != find_token(sealed)
    assert find_token(seal_rules(f"{text}\n")) == find_token(sealed)


def test_a_ruleset_that_was_cut_has_none() -> None:
    sealed = seal_rules(RULE)
    assert find_token(sealed[:-3]) is None
    assert find_token(RULE) is None
    assert find_token("") is None
