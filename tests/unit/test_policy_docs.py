"""Every example of docs/policy.md is what it says: taken, or refused with exactly these faults."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from steering.errors import WrongInput
from steering.fields import (
    KINDS,
    MAX_ADDRESSES,
    MAX_MACHINES,
    MAX_PEERS,
    MAX_POLICIES,
    MAX_SERVICES,
    MAX_TAGS,
    MAX_ZONES,
    SHORTCUT_FLOWS,
)
from steering.model import Family, OnFailure, Profile, Protocol, Trigger
from steering.parse import parse_documents, parse_objects, render_documents

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
BLOCKS = re.findall(r"^```([a-z ]*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
TAKEN = [text for language, text in BLOCKS if language in ("yaml", "json")]
REFUSED = [
    (text, faults)
    for (language, text), (_, faults) in pairwise(BLOCKS)
    if language == "yaml refused"
]


@pytest.mark.parametrize("text", TAKEN)
def test_an_example_is_taken(text: str) -> None:
    policies = parse_documents(text)
    assert parse_objects(render_documents(policies)) == policies


@pytest.mark.parametrize(("text", "faults"), REFUSED)
def test_an_example_is_refused_in_these_words(text: str, faults: str) -> None:
    with pytest.raises(WrongInput) as caught:
        parse_documents(text)
    assert [str(fault) for fault in caught.value.faults] == faults.splitlines()


def test_every_block_is_an_example_and_all_words_and_bounds_are_named() -> None:
    assert {language for language, _ in BLOCKS} == {"yaml", "json", "yaml refused", "text"}
    assert len(TAKEN) >= 5
    assert len(REFUSED) == 2
    for word in (*KINDS, *Protocol, *Family, *Profile, *OnFailure, *Trigger):
        assert f"`{word}`" in PAGE
    for phrase in (
        f"{MAX_MACHINES:,} VMs",
        f"{MAX_ZONES:,} zones",
        f"{MAX_POLICIES:,} policies",
        f"1 to {MAX_PEERS} peers",
        f"1 to {MAX_SERVICES} of",
        f"up to {MAX_TAGS} keys",
        f"up to {MAX_ADDRESSES} addresses",
        f"`maxFlows` ({SHORTCUT_FLOWS[0]} to {SHORTCUT_FLOWS[1]:,})",
    ):
        assert phrase in PAGE
