"""What the document reader takes, and what it says of everything else."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steering.documents import MAX_FAULTS, MAX_TEXT_BYTES, parse_text
from steering.errors import FieldError, WrongInput
from steering.model import (
    Deny,
    Direct,
    Family,
    Inspect,
    OnFailure,
    Peer,
    PolicySet,
    PortRange,
    Profile,
    Protocol,
    Service,
)
from steering.parse import parse_documents, parse_objects, render_documents
from tests.support.policies import build_vm_id, policy_sets

VM = {
    "apiVersion": "hairpin/v1",
    "kind": "VirtualMachine",
    "metadata": {"name": "web-1"},
    "spec": {"vmId": build_vm_id(1), "tags": {"tier": "web"}},
}
ZONE = {
    "apiVersion": "hairpin/v1",
    "kind": "Zone",
    "metadata": {"name": "web"},
    "spec": {"selector": {"matchTags": {"tier": "web"}}},
}
POLICY = {
    "apiVersion": "hairpin/v1",
    "kind": "SteeringPolicy",
    "metadata": {"name": "web-to-web"},
    "spec": {
        "priority": 100,
        "from": [{"zone": "web"}],
        "to": [{"zone": "web"}, {"vm": "web-1"}],
        "services": [{"protocol": "tcp", "ports": [80, "8000-8080"]}],
        "families": ["ipv4", "ipv6"],
        "action": {"inspect": {"profile": "prevent", "onFailure": "closed"}},
    },
}


def listed(*items: object) -> dict[str, Any]:
    return {"apiVersion": "hairpin/v1", "kind": "List", "items": list(items)}


def changed(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with another value at a dotted path; ``...`` takes the key away."""
    document = copy.deepcopy(document)
    *way, last = path.split(".")
    inner: Any = document
    for key in way:
        inner = inner[int(key) if isinstance(inner, list) else key]
    if value is ...:
        del inner[last]
    else:
        inner[int(last) if isinstance(inner, list) else last] = value
    return document


def find_faults(value: object) -> tuple[FieldError, ...]:
    parse: Callable[[Any], PolicySet] = parse_documents if isinstance(value, str) else parse_objects
    with pytest.raises(WrongInput) as caught:
        parse(value)
    return caught.value.faults


def test_a_stream_of_documents_is_read_in_order() -> None:
    text = yaml.safe_dump_all([VM, ZONE, POLICY], sort_keys=False)
    found = parse_documents(text)
    assert [record.name for record in found.machines] == ["web-1"]
    assert found.zones[0].match_tags == {"tier": "web"}
    policy = found.policies[0]
    assert policy.sources == (Peer(zone="web"),)
    assert policy.destinations == (Peer(zone="web"), Peer(vm="web-1"))
    assert policy.services == (Service(Protocol.TCP, (PortRange(80, 80), PortRange(8000, 8080))),)
    assert policy.action == Inspect(Profile.PREVENT, OnFailure.CLOSED)


def test_one_list_document_is_the_same_as_the_stream_in_yaml_and_json() -> None:
    wanted = parse_documents(yaml.safe_dump_all([VM, ZONE, POLICY]))
    everything = listed(VM, ZONE, POLICY)
    assert parse_documents(yaml.safe_dump(everything)) == wanted
    assert parse_documents(json.dumps(everything)) == wanted
    assert parse_objects(everything) == wanted


def test_what_is_left_out_means_every_ip_service_in_both_families() -> None:
    short = changed(changed(POLICY, "spec.services", ...), "spec.families", ...)
    policy = parse_objects(listed(VM, ZONE, short)).policies[0]
    assert policy.services == (Service(Protocol.ANY),)
    assert policy.families == (Family.IPV4, Family.IPV6)


@pytest.mark.parametrize(
    ("action", "wanted"),
    [
        ({"direct": {"reason": "backup, encrypted"}}, Direct("backup, encrypted")),
        ({"deny": {"reason": "no SMB here"}}, Deny("no SMB here")),
        ({"deny": {}}, Deny()),
    ],
)
def test_the_other_actions(action: object, wanted: object) -> None:
    found = parse_objects(listed(VM, ZONE, changed(POLICY, "spec.action", action)))
    assert found.policies[0].action == wanted


def test_a_peer_may_be_a_vm_id_that_no_document_names() -> None:
    strange = changed(POLICY, "spec.to", [{"vm": build_vm_id(99)}])
    assert parse_objects(listed(VM, ZONE, strange)).policies[0].destinations == (
        Peer(vm=build_vm_id(99)),
    )


def test_an_empty_list_withdraws_everything_but_an_empty_text_is_a_mistake() -> None:
    assert parse_objects(listed()) == PolicySet()
    for text in ("", "---\n---\n", "# nothing\n"):
        assert find_faults(text) == (FieldError("(text)", "no documents"),)


def test_empty_documents_in_a_stream_are_not_counted() -> None:
    text = "---\n" + yaml.safe_dump_all([VM, ZONE], explicit_start=True) + "---\n"
    assert len(parse_documents(text).zones) == 1


P = "items[2].spec"


@pytest.mark.parametrize(
    ("path", "value", "where", "reason"),
    [
        ("apiVersion", "v2", "items[2].apiVersion", "must be hairpin/v1, not 'v2'"),
        ("apiVersion", ..., "items[2].apiVersion", "is missing"),
        ("kind", "SteringPolicy", "items[2].kind", "did you mean SteeringPolicy?"),
        ("kind", ..., "items[2].kind", "is missing"),
        ("kind", ["Zone"], "items[2].kind", "not a list"),
        ("extra", 1, "items[2].extra", "unknown key"),
        ("metadata", ..., "items[2].metadata", "is missing"),
        ("metadata", "web", "items[2].metadata", "must be a mapping, not 'web'"),
        ("metadata.name", ..., "items[2].metadata.name", "is missing"),
        ("metadata.name", "Web_1", "items[2].metadata.name", "is not a name"),
        ("metadata.name", "a" * 64, "items[2].metadata.name", "is not a name"),
        ("metadata.name", "web\n", "items[2].metadata.name", "is not a name"),
        ("metadata.labels", {}, "items[2].metadata.labels", "unknown key"),
        ("spec", ..., P, "is missing"),
        ("spec", None, P, "must be a mapping, not nothing"),
        ("spec.prioriti", 1, f"{P}.prioriti", "unknown key; did you mean priority?"),
        ("spec.priority", ..., f"{P}.priority", "is missing"),
        ("spec.priority", 0, f"{P}.priority", "0 is not between 1 and 10000"),
        ("spec.priority", 10_001, f"{P}.priority", "is not between 1 and 10000"),
        ("spec.priority", "100", f"{P}.priority", "must be a whole number, not '100'"),
        ("spec.priority", True, f"{P}.priority", "must be a whole number, not true"),
        ("spec.priority", 1.5, f"{P}.priority", "must be a whole number, not 1.5"),
        ("spec.priority", 10**30, f"{P}.priority", "a huge number is not between"),
        ("spec.from", ..., f"{P}.from", "is missing"),
        ("spec.from", [], f"{P}.from", "must not be empty"),
        ("spec.from", {"zone": "web"}, f"{P}.from", "must be a list, not a mapping"),
        ("spec.from.0", {}, f"{P}.from[0]", "must have one of zone and vm"),
        ("spec.from.0", {"zone": "web", "vm": "web-1"}, f"{P}.from[0]", "one of zone and vm"),
        ("spec.from.0.zone", "wbe", f"{P}.from[0].zone", "no Zone is named wbe; did you mean web?"),
        ("spec.to.1.vm", "web-9", f"{P}.to[1].vm", "name or vmId web-9; did you mean web-1?"),
        ("spec.to.1", {"zone": "web"}, f"{P}.to[1]", "stands in to[0] already"),
        ("spec.services", [], f"{P}.services", "must not be empty"),
        ("spec.services.0.protocol", ..., f"{P}.services[0].protocol", "is missing"),
        ("spec.services.0.protocol", "tpc", f"{P}.services[0].protocol", "did you mean tcp?"),
        ("spec.services.0.protocol", "icmp", f"{P}.services[0].ports", "icmp has no ports"),
        ("spec.services.0.protocol", "any", f"{P}.services[0].ports", "any has no ports"),
        ("spec.services.0.ports", [], f"{P}.services[0].ports", "must not be empty"),
        ("spec.services.0.ports.0", 70000, f"{P}.services[0].ports[0]", "port 70000 is not"),
        ("spec.services.0.ports.0", "70000", f"{P}.services[0].ports[0]", "port 70000 is not"),
        ("spec.services.0.ports.0", -1, f"{P}.services[0].ports[0]", "port -1 is not"),
        ("spec.services.0.ports.0", "90-80", f"{P}.services[0].ports[0]", "90-80 is inverted"),
        ("spec.services.0.ports.0", "http", f"{P}.services[0].ports[0]", "must be a port or a"),
        ("spec.services.0.ports.0", False, f"{P}.services[0].ports[0]", "must be a port or a"),
        ("spec.services.0.ports.1", 80, f"{P}.services[0].ports[1]", "stands in ports[0] already"),
        ("spec.services.0.ports", [1] * 65, f"{P}.services[0].ports", "at most 64 are taken"),
        ("spec.families", [], f"{P}.families", "must not be empty"),
        ("spec.families.1", "ipv5", f"{P}.families[1]", "must be one of ipv4, ipv6"),
        ("spec.families.1", "ipv4", f"{P}.families[1]", "ipv4 stands here already"),
        ("spec.action", ..., f"{P}.action", "is missing"),
        ("spec.action", {}, f"{P}.action", "exactly one of inspect, direct and deny"),
        ("spec.action.deny", {}, f"{P}.action", "exactly one of inspect, direct and deny"),
        ("spec.action", {"drop": {}}, f"{P}.action.drop", "unknown key"),
        ("spec.action", {"direct": {}}, f"{P}.action.direct.reason", "is missing"),
        (
            "spec.action",
            {"direct": {"reason": " "}},
            f"{P}.action.direct.reason",
            "is not a reason",
        ),
        (
            "spec.action",
            {"deny": {"reason": "a\x1b[2J"}},
            f"{P}.action.deny.reason",
            "not a reason",
        ),
        ("spec.action", {"deny": {"reason": "\ud800"}}, f"{P}.action.deny.reason", "not a reason"),
        ("spec.action.inspect.profile", "block", f"{P}.action.inspect.profile", "prevent, detect"),
        ("spec.action.inspect.onFailure", ..., f"{P}.action.inspect.onFailure", "is missing"),
        ("spec.action.inspect.onFail", "x", f"{P}.action.inspect.onFail", "mean onFailure?"),
    ],
)
def test_a_faulty_policy_is_told_where_and_why(
    path: str, value: object, where: str, reason: str
) -> None:
    faults = find_faults(listed(VM, ZONE, changed(POLICY, path, value)))
    assert where in [fault.path for fault in faults]
    assert any(fault.path == where and reason in fault.reason for fault in faults), faults


@pytest.mark.parametrize(
    ("document", "path", "value", "where", "reason"),
    [
        (VM, "spec.vmId", ..., "items[0].spec.vmId", "is missing"),
        (VM, "spec.vmId", 7, "items[0].spec.vmId", "must be text, not 7: put it in quotes"),
        (VM, "spec.vmId", "a b", "items[0].spec.vmId", "is not a vm-id"),
        (VM, "spec.tags", [], "items[0].spec.tags", "must be a mapping, not a list"),
        (VM, "spec.tags", {"a b": "c"}, "items[0].spec.tags", "the key 'a b' is not a tag"),
        (VM, "spec.tags", {"public": True}, "items[0].spec.tags.public", "put it in quotes"),
        (VM, "spec.tags", {f"k{n}": "v" for n in range(33)}, "items[0].spec.tags", "at most 32"),
        (ZONE, "spec.selector", ..., "items[0].spec.selector", "is missing"),
        (ZONE, "spec.selector", {}, "items[0].spec.selector.matchTags", "is missing"),
        (ZONE, "spec.selector.matchTags", {}, "items[0].spec.selector.matchTags", "is empty"),
        (ZONE, "spec.selector.matchNames", [], "items[0].spec.selector.matchNames", "unknown key"),
    ],
)
def test_a_faulty_vm_or_zone_is_told_where_and_why(
    document: dict[str, Any], path: str, value: object, where: str, reason: str
) -> None:
    faults = find_faults(listed(changed(document, path, value)))
    assert any(fault.path == where and reason in fault.reason for fault in faults), faults


def test_every_fault_of_every_document_is_told_at_once() -> None:
    faults = find_faults(
        listed(
            changed(VM, "spec.tags", {"tier": 1}),
            changed(ZONE, "spec.selector.matchTags", {}),
            changed(changed(POLICY, "spec.priority", 0), "spec.services.0.ports.0", 70000),
            {"kind": "Zone"},
        )
    )
    assert [fault.path for fault in faults] == [
        "items[0].spec.tags.tier",
        "items[1].spec.selector.matchTags",
        "items[2].spec.priority",
        "items[2].spec.services[0].ports[0]",
        "items[3].apiVersion",
        "items[3].metadata",
        "items[3].spec",
    ]
    assert "(SteeringPolicy web-to-web)" in faults[2].reason


def test_the_list_itself_is_checked_together_with_its_items() -> None:
    faults = find_faults({**listed({"kind": "Zone"}), "apiVersion": "v1", "revision": 3})
    assert {"(list).apiVersion", "(list).revision", "items[0].spec"} <= {f.path for f in faults}
    assert find_faults({"apiVersion": "hairpin/v1", "kind": "List"})[0].path == "(list).items"


def test_duplicates_of_names_and_vm_ids_are_refused() -> None:
    twin = changed(VM, "metadata.name", "web-2")
    faults = find_faults(listed(VM, VM, twin, ZONE, ZONE, POLICY, POLICY))
    assert [(fault.path, fault.reason.split(" (")[0]) for fault in faults] == [
        ("items[1].metadata.name", "items[0] is a VirtualMachine of this name too"),
        ("items[1].spec.vmId", "items[0] has this vmId too"),
        ("items[2].spec.vmId", "items[0] has this vmId too"),
        ("items[4].metadata.name", "items[3] is a Zone of this name too"),
        ("items[6].metadata.name", "items[5] is a SteeringPolicy of this name too"),
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [("allow-34749", "allow-40390"), ("inspect-8786", "inspect-21553")],
    ids=["names", "fragments"],
)
def test_policies_that_the_switch_would_take_for_each_other_are_refused(
    first: str, second: str
) -> None:
    """Their names come to one number, or one's to that of the other's fragments."""
    policies = [changed(POLICY, "metadata.name", name) for name in (first, second)]
    (fault,) = find_faults(listed(VM, ZONE, *policies))
    assert fault.path == "items[3].metadata.name"
    assert "can't be told apart in the switch" in fault.reason
    assert {first, second} <= set(re.findall(r"[\w-]+", fault.reason))


def test_a_name_that_is_another_vms_id_is_refused() -> None:
    other = changed(changed(VM, "metadata.name", "other"), "spec.vmId", "web-1")
    assert "ambiguous" in find_faults(listed(VM, other))[0].reason
    own = changed(VM, "spec.vmId", "web-1")
    assert parse_objects(listed(own)).machines[0].vm_id == "web-1"


def test_scalars_are_those_of_yaml_1_2() -> None:
    text = "{a: yes, b: 22:22, c: 2026-01-01, d: 8, e: 1.5, f: ~, g: true, h: '8', i: !!str 8}"
    assert parse_text(text) == [
        {
            "a": "yes",
            "b": "22:22",
            "c": "2026-01-01",
            "d": 8,
            "e": 1.5,
            "f": None,
            "g": True,
            "h": "8",
            "i": "8",
        }
    ]
    # What YAML 1.1 takes for text is text, or what its writers leave bare would come back as a number.
    assert parse_text("[08, 1e5, +.5, 0x10, 0o7, 1_000]") == [
        ["08", "1e5", "+.5", "0x10", "0o7", "1_000"]
    ]
    assert parse_text("[0, -7, +7, .5, -1.5, 1.5e+3]") == [[0, -7, 7, 0.5, -1.5, 1500.0]]
    assert parse_text("1: a\nnull: b\n") == [{"1": "a", "null": "b"}]


def test_json_text_is_read_as_json() -> None:
    text = json.dumps(listed(changed(POLICY, "spec.action", {"deny": {"reason": "no \U0001f4a9"}})))
    assert "\\ud83d" in text  # an escape that is JSON but not YAML
    assert {fault.path for fault in find_faults(text)} == {
        "items[0].spec.from[0].zone",
        "items[0].spec.to[0].zone",
        "items[0].spec.to[1].vm",
    }


@pytest.mark.parametrize("render", [yaml.safe_dump, json.dumps])
def test_duplicate_keys_are_refused(render: Any) -> None:
    text = render(listed(changed(VM, "spec.tags", {"tier": "web", "tire": "app"})))
    faults = find_faults(text.replace("tire", "tier"))
    assert [(fault.path, fault.reason) for fault in faults] == [
        ("items[0].spec.tags.tier", "stands here more than once (VirtualMachine web-1)")
    ]


def test_a_list_within_a_stream_is_refused() -> None:
    faults = find_faults(yaml.safe_dump_all([ZONE, listed(VM)]))
    assert ("items[1].kind", "a List must be the only document") in [
        (fault.path, fault.reason) for fault in faults
    ]


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "path", "reason"),
    [
        (BOMB, "line 1, column 4", "anchors and aliases are not taken"),
        ("- *a", "line 1, column 3", "anchors and aliases are not taken"),
        ("a: !!python/object:os.system {}", "line 1, column 4", "is not taken"),
        ("a: !secret x", "line 1, column 4", "is not taken"),
        ("? [a]\n: b\n", "line 1, column 1", "a key of this mapping is not text"),
        ("a: [1\nb: 2", "line 2, column 2", "not YAML"),
        ("a: \x07", "(text)", "not YAML"),
        ("a: \ud800", "(text)", "not Unicode"),
        ("[" * 100_000, "line 1, column 17", "nested deeper than 16 levels"),
        ('{"a":' * 100_000, "(text)", "nested deeper than 16 levels"),
        ("#" * (MAX_TEXT_BYTES + 1), "(text)", "at most 4194304 are read"),
        ("--- a\n" * 20_001, "(text)", "more than 20000 documents"),
        ("- 1", "items[0]", "must be a mapping, not a list"),
        ("just text", "items[0]", "must be a mapping, not 'just text'"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_hostile_or_broken_text_is_refused_with_its_place(
    text: str, path: str, reason: str
) -> None:
    fault = find_faults(text)[0]
    assert fault.path == path
    assert reason in fault.reason


def test_faults_are_bounded_and_the_rest_is_counted() -> None:
    faults = find_faults(listed(*({"kind": "Zone"} for _ in range(1000))))
    assert len(faults) == MAX_FAULTS + 1
    assert faults[-1].reason == f"and {3000 - MAX_FAULTS} more faults"


def test_too_many_documents_of_a_kind_are_refused() -> None:
    zones = [changed(ZONE, "metadata.name", f"zone-{number}") for number in range(1001)]
    assert (
        find_faults(listed(*zones))[0].reason
        == "1001 documents of kind Zone; at most 1000 are taken"
    )


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    long = "1" + "0" * 5000
    text = json.dumps(POLICY).replace("100", long)
    assert "items[0].spec.priority" in [fault.path for fault in find_faults(text)]
    huge = changed(POLICY, "spec.priority", 10**5000)
    assert "a huge number is not" in str(find_faults(huge))


def test_hostile_values_are_not_shown_whole() -> None:
    loud = changed(VM, "spec.vmId", "x" * 100_000 + "\x1b[31m")
    fault = find_faults(listed(loud, {"\x1b[2J" * 1000: 1}))
    assert all(len(str(one)) < 700 and str(one).isprintable() for one in fault)


@given(policy_sets())
@settings(deadline=None)
def test_rendering_and_parsing_gives_the_same_set(policies: PolicySet) -> None:
    rendered = render_documents(policies)
    assert parse_objects(rendered) == policies
    assert parse_documents(json.dumps(rendered)) == policies
    items = rendered["items"]
    if isinstance(items, list) and items:
        assert parse_documents(yaml.safe_dump_all(items, allow_unicode=True)) == policies


def _list_places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    return [way] * bool(way) + [p for key in keys for p in _list_places(value[key], (*way, key))]


@given(st.text(st.sampled_from("0123456789.eE+-_xo:~ truefalsn"), min_size=1, max_size=8))
def test_text_that_a_writer_of_yaml_1_1_leaves_bare_stays_text(text: str) -> None:
    assert parse_text(yaml.safe_dump({"reason": text})) == [{"reason": text}]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.just([{}]),
)


@given(policy_sets(), st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_document_is_read_or_refused_but_never_left_out(
    policies: PolicySet, data: st.DataObject
) -> None:
    document: Any = render_documents(policies)
    places = _list_places(document)
    *way, last = data.draw(st.sampled_from(places))
    inner = document
    for key in way:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[last] = data.draw(JUNK)
    else:
        del inner[last]
    try:
        found = parse_objects(document)
    except WrongInput:
        return
    count = len(found.machines) + len(found.zones) + len(found.policies)
    assert count == len(document["items"])


def test_the_largest_sets_are_read_in_seconds() -> None:
    machines = [
        changed(
            changed(changed(VM, "metadata.name", f"vm-{n}"), "spec.vmId", build_vm_id(n)),
            "spec.tags",
            {"tier": f"t{n % 50}"},
        )
        for n in range(10_000)
    ]
    text = yaml.dump_all([*machines], Dumper=yaml.CSafeDumper)
    assert len(text) < MAX_TEXT_BYTES
    started = time.monotonic()
    assert len(parse_documents(text).machines) == 10_000
    assert time.monotonic() - started < 20  # 0.7 s on an idle core
