"""Documents read in pieces are what they are read at once, whatever was read before and whatever is wrong."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.api.problems import Refused
from appliance.api.requests import check_documents, parse_json
from steering.documents import MAX_TEXT_BYTES
from steering.errors import WrongInput
from steering.model import PolicySet
from steering.parse import parse_documents, render_documents
from steering.pieces import split_list
from steering.reread import SOON_CHARACTERS, SOON_UNKNOWN, DocumentReader
from tests.support.policies import build_vm_id, policy_sets


def build_machine(number: int) -> dict[str, Any]:
    return {
        "apiVersion": "hairpin/v1",
        "kind": "VirtualMachine",
        "metadata": {"name": f"vm{number}"},
        "spec": {"vmId": build_vm_id(number), "tags": {"tier": "ab"[number % 2]}},
    }


def build_zone(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "hairpin/v1",
        "kind": "Zone",
        "metadata": {"name": name},
        "spec": {"selector": {"matchTags": {"tier": name}}},
    }


def build_policy(name: str, source: str = "a", **action: Any) -> dict[str, Any]:
    return {
        "apiVersion": "hairpin/v1",
        "kind": "SteeringPolicy",
        "metadata": {"name": name},
        "spec": {
            "priority": 100,
            "from": [{"zone": source}],
            "to": [{"zone": "b"}],
            "action": action or {"direct": {"reason": "a test"}},
        },
    }


BASE = [*map(build_machine, range(6)), build_zone("a"), build_zone("b"), build_policy("p")]


def listed(items: list[Any]) -> str:
    return json.dumps({"apiVersion": "hairpin/v1", "kind": "List", "items": items})


def read(reader: DocumentReader, text: str) -> PolicySet | str:
    try:
        return reader.read(text)
    except WrongInput as fault:
        return str(fault.faults)


def read_at_once(text: str) -> PolicySet | str:
    try:
        return parse_documents(text)
    except WrongInput as fault:
        return str(fault.faults)


def with_item(number: int, **changes: Any) -> list[Any]:
    items: list[Any] = copy.deepcopy(BASE)
    items[number].update(changes)
    return items


WRONG = {
    "a name twice": [*BASE, build_machine(1)],
    "a vm-id twice": with_item(1, spec={"vmId": build_vm_id(0)}),
    "a zone twice": [*BASE, build_zone("a")],
    "a policy twice": [*BASE, build_policy("p")],
    "a zone that is gone": [one for one in BASE if one["metadata"]["name"] != "a"],
    "a contradiction": [*BASE, build_policy("q", deny={})],
    "a name that is a vm-id": with_item(1, metadata={"name": build_vm_id(2)}),
    "an unknown key": with_item(2, more=1),
    "an unknown kind": with_item(2, kind="Zones"),
    "another version": with_item(2, apiVersion="hairpin/v2"),
    "no name": with_item(2, metadata={}),
    "no mapping": [*BASE, 7, None, "x", []],
    "a list in it": [*BASE, {"apiVersion": "hairpin/v1", "kind": "List", "items": []}],
    "half of a surrogate pair": with_item(2, metadata={"name": "\ud800"}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_told_as_it_is_at_once(wrong: str) -> None:
    reader, text = DocumentReader(), listed(WRONG[wrong])
    at_once = read_at_once(text)
    assert isinstance(at_once, str), "it must be wrong"
    assert read(reader, text) == at_once
    assert read(reader, listed(BASE)) == parse_documents(listed(BASE))
    assert read(reader, text) == at_once, "now most of it is known"
    assert reader.read_soon(text) is None


TEXTS = [
    '{"apiVersion":"hairpin/v1","kind":"List","items":[]}',
    ' {\n "items" : [ ] , "kind":"List","apiVersion":"hairpin/v1"} \n',
    '{"kind":"List","items":[],"apiVersion":"hairpin/v1"}',
    '{"kind":"List","items":[],"kind":"List","apiVersion":"hairpin/v1"}',
    '{"kind":"List","items":[],"items":[],"apiVersion":"hairpin/v1"}',
    '{"kind":"List","items":[7],"x":[],"apiVersion":"hairpin/v1"}',
    '{"kind":"List","items":[{"a":1,"a":2}],"apiVersion":"hairpin/v1"}',
    '{"kind":"List","items":[{"a":NaN}],"apiVersion":"hairpin/v1"}',
    '{"kind":"List","items":[{"a":01}],"apiVersion":"hairpin/v1"}',
    '{"kind":"List","items":[{]},],"apiVersion":"hairpin/v1"}',
    '{"kind":"List","items":[1 2],"apiVersion":"hairpin/v1"}',
    '{"kind":"List","items":[],"apiVersion":"hairpin/v2"}',
    '{"kind":"Lists","items":[],"apiVersion":"hairpin/v1"}',
    '{"items":[],"apiVersion":"hairpin/v1"}',
    '{"kind":"List","items":[]}]}',
    '{"kind":"List","items":[],"apiVersion":"hairpin/v1"}{}',
    '{"kind":"List","items":[' + "[" * 5_000 + "]" * 5_000 + "]}",
    "\ufeff" + '{"apiVersion":"hairpin/v1","kind":"List","items":[]}',
    '{"apiVersion":"hairpin/v1","kind":"List","items":["\udc00"]}',
    "apiVersion: hairpin/v1\nkind: List\nitems: []\n",
    "",
    "[]",
    "{",
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_read_as_it_is_at_once(text: str) -> None:
    assert read(DocumentReader(), text) == read_at_once(text)


def parse_strictly(text: str) -> tuple[Any, str]:
    try:
        return parse_json(text), ""
    except Refused as fault:
        return None, fault.reason


@pytest.mark.parametrize("text", [*TEXTS, *map(listed, WRONG.values()), listed(BASE)])
def test_what_the_api_takes_for_json_is_json_and_means_the_same(text: str) -> None:
    value, reason = parse_strictly(text)
    for _ in range(2):
        try:
            taken, refused = json.loads(check_documents(text)), ""
        except Refused as fault:
            taken, refused = None, fault.reason
        assert (taken, refused) == (value, reason)


@given(st.lists(policy_sets(), min_size=2, max_size=4))
@settings(max_examples=40, deadline=None)
def test_one_after_another_is_each_by_itself(sets: list[PolicySet]) -> None:
    reader = DocumentReader()
    for policies in [*sets, sets[0]]:
        text = json.dumps(render_documents(policies))
        assert reader.read(text) == parse_documents(text) == policies
        soon = reader.read_soon(text)
        assert soon == policies
        assert soon.machines is reader.read(text).machines


def test_vms_and_zones_stay_the_same_objects_while_policies_change() -> None:
    reader = DocumentReader()
    before = reader.read(listed(BASE))
    after = reader.read_soon(listed([*BASE[:-1], build_policy("p", deny={})]))
    assert after is not None
    assert after.policies != before.policies
    assert after.machines is before.machines
    assert after.zones is before.zones
    moved = reader.read(listed([*BASE[1:-1], BASE[0], BASE[-1]]))
    assert moved.machines == (*before.machines[1:], before.machines[0])


def test_much_that_is_new_is_not_read_soon() -> None:
    reader = DocumentReader()
    many = listed([build_machine(number) for number in range(SOON_UNKNOWN + 1)])
    assert reader.read_soon(many) is None
    assert reader.read_soon(listed([build_machine(n) for n in range(SOON_UNKNOWN)])) is not None
    reader.read(many)
    assert reader.read_soon(many) == parse_documents(many)
    assert reader.read_soon(many + " " * SOON_CHARACTERS) is None


def test_too_much_text_is_refused_though_its_documents_are_known() -> None:
    reader = DocumentReader()
    reader.read(listed(BASE))
    text = listed(BASE) + " " * MAX_TEXT_BYTES
    with pytest.raises(WrongInput, match="at most"):
        reader.read(text)


def test_a_list_is_split_into_the_texts_of_its_items() -> None:
    parts = split_list('{"kind":"List", "items": [ {"a": [1]} , "]}" ], "apiVersion":"x"}')
    assert parts is not None
    assert parts.items == (b'{"a": [1]}', b'"]}"')
    assert json.loads(parts.rest) == {"kind": "List", "items": [], "apiVersion": "x"}
