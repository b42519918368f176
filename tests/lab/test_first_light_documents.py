"""Documents through the command line and the API: what is wrong changes nothing, and says so at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from appliance.lab import LabState
from tests.support.appliance import (
    Appliance,
    build_base,
    build_machine,
    build_policy,
    inspect,
)

pytestmark = pytest.mark.lab

FOREIGN = "cookie=0xabc,table=0,priority=7,ip,nw_dst=192.0.2.77,actions=drop"
DIRECT = {"direct": {"reason": "trusted"}}


def build_documents(lab: LabState) -> list[dict[str, Any]]:
    return [*build_base(lab), build_policy("web-to-app", "web", "app", inspect("prevent"))]


@pytest.fixture(scope="module")
def appliance(lab: LabState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    appliance = Appliance(lab, tmp_path_factory.mktemp("documents"))
    try:
        appliance.ofctl("add-flow", FOREIGN)
        appliance.apply(build_documents(lab))
        yield appliance
        assert count_foreign(appliance) == 1, "a foreign flow was touched"
    finally:
        appliance.ofctl("del-flows", "cookie=0xabc/-1")
        appliance.stop_all()


def count_foreign(appliance: Appliance) -> int:
    return appliance.ofctl("dump-flows", "cookie=0xabc/-1").count("nw_dst=192.0.2.77")


def read_all(appliance: Appliance) -> tuple[object, ...]:
    """Revision, documents and flows: what a refused change must leave as it was."""
    answer = appliance.api("/policies")
    return (
        answer.headers["etag"],
        answer.headers["hairpin-revision"],
        answer.document,
        appliance.read_switch(),
    )


def write_faulty(lab: LabState) -> str:
    """Several faults in one file, of every kind that the text alone shows."""
    documents = build_documents(lab)
    documents[8]["spec"]["selektor"] = {}
    policy = documents[9]["spec"]
    policy["prioritty"] = 5
    policy["to"] = [{"zone": "ap"}]
    policy["services"] = [{"protocol": "tcp", "ports": [70000]}]
    return yaml.safe_dump_all(documents)


def write_stranger(lab: LabState) -> str:
    stranger = build_machine(lab, "web-1")
    stranger["metadata"] = {"name": "stranger"}
    stranger["spec"]["vmId"] = "00000000-0000-4000-8000-000000000001"
    return yaml.safe_dump_all([*build_documents(lab), stranger])


def write_contradiction(lab: LabState) -> str:
    other = build_policy("web-to-app-2", "web", "app", DIRECT)
    return yaml.safe_dump_all([*build_documents(lab), other])


WRONG: dict[str, tuple[Callable[[LabState], str], tuple[str, ...]]] = {
    "several faults": (
        write_faulty,
        (
            "items[8].spec.selektor: unknown key",
            "items[9].spec.prioritty: unknown key; did you mean priority?",
            "items[9].spec.to[0].zone: no Zone is named ap; did you mean app?",
            "items[9].spec.services[0].ports[0]: port 70000 is not between 0 and 65535",
        ),
    ),
    "a VM in no bridge": (write_stranger, ("00000000-0000-4000-8000-000000000001", "vmId")),
    "a contradiction": (
        write_contradiction,
        ("items[10].spec.priority: SteeringPolicy web-to-app-2 contradicts web-to-app",),
    ),
    "broken YAML": (lambda _lab: "a: [1, 2\nb: }", ("line 2",)),
    "no documents": (lambda _lab: "just a text", ("items[0]",)),
}


@pytest.mark.parametrize("command", ["check", "plan", "apply"])
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_told_at_once_and_changes_nothing(
    appliance: Appliance, what: str, command: str
) -> None:
    write, told = WRONG[what]
    path = appliance.directory / "wrong.yaml"
    path.write_text(write(appliance.lab))
    before = read_all(appliance)
    done = appliance.cli("policy", command, str(path))
    assert done.status == 2, done
    assert done.stdout == ""
    for fault in told:
        assert fault in done.stderr
    assert "Traceback" not in done.stderr
    assert read_all(appliance) == before
    document = json.loads(appliance.cli("policy", command, str(path), "--json").stderr)
    assert 400 <= document["status"] < 500
    assert document["errors"]


@pytest.mark.parametrize("command", ["check", "plan", "apply"])
def test_a_file_that_is_not_there(appliance: Appliance, tmp_path: Path, command: str) -> None:
    done = appliance.cli("policy", command, str(tmp_path / "absent.yaml"))
    assert done.status == 2
    assert "absent.yaml: No such file" in done.stderr


def test_a_change_that_was_overtaken_is_refused(appliance: Appliance) -> None:
    stale = appliance.api("/policies").headers["etag"]
    more = build_policy("app-to-db", "app", "db", inspect("detect", "open"))
    assert appliance.put([*build_documents(appliance.lab), more]).status == 200
    before = read_all(appliance)
    for query in ("", "?dry_run=true"):
        answer = appliance.put([], query, If_Match=stale)
        assert answer.status == 412
        assert answer.document["mend"]
    assert read_all(appliance) == before
    fresh = appliance.api("/policies").headers["etag"]
    assert appliance.put(build_documents(appliance.lab), If_Match=fresh).status == 200
    listed = {"apiVersion": "hairpin/v1", "kind": "List", "items": []}
    assert appliance.api("/policies", "PUT", listed).status == 428


def test_a_plan_tells_what_applying_does_and_changes_nothing(appliance: Appliance) -> None:
    before = read_all(appliance)
    more = [*build_documents(appliance.lab), build_policy("web-to-db", "web", "db", DIRECT)]
    path = str(appliance.write(more))
    planned = appliance.read("policy", "plan", path)
    assert planned["applied"] is False
    assert planned["summary"]["added"] > 0
    assert read_all(appliance) == before
    checked = appliance.read("policy", "check", path)
    assert checked["checkedAgainstSwitch"]
    assert read_all(appliance) == before
    applied = appliance.apply(more)
    assert (applied["summary"], applied["changes"]) == (planned["summary"], planned["changes"])
    pairs = {(pair["source"]["name"], pair["destination"]["name"]) for pair in applied["pairs"]}
    assert ("web-1", "db-1") in pairs
    # Taking it back restores the switch, and applying the same again changes nothing.
    appliance.apply(build_documents(appliance.lab))
    assert appliance.read_switch() == before[3]
    assert appliance.apply(build_documents(appliance.lab))["changes"] == []


def test_an_empty_list_takes_everything_back_but_foreign_flows(appliance: Appliance) -> None:
    listed = appliance.directory / "empty.json"
    listed.write_text(json.dumps({"apiVersion": "hairpin/v1", "kind": "List", "items": []}))
    done = appliance.cli("policy", "apply", str(listed))
    assert done.status == 0, done.stderr
    assert [flow for flow in appliance.find_policy_flows() if "cookie=0x485003" in flow] == []
    assert count_foreign(appliance) == 1
    assert appliance.read("policy", "show")["items"] == []
    coverage = appliance.read("coverage")["summary"]
    assert coverage["blind"] == coverage["pairs"] == 30
    appliance.apply(build_documents(appliance.lab))


def test_coverage_shows_what_is_inspected_and_what_is_blind(appliance: Appliance) -> None:
    summary = appliance.read("coverage")["summary"]
    assert (summary["machines"], summary["pairs"]) == (6, 30)
    assert summary["inspected"] == 4
    blind = appliance.read("coverage", "--vm", "web-1", "--status", "blind")["items"]
    assert {pair["destination"]["name"] for pair in blind if pair["source"]["name"] == "web-1"} == {
        "web-2",
        "db-1",
        "db-2",
    }


def test_a_zone_is_one_edit_away(appliance: Appliance) -> None:
    """A VM that gets another tag changes zones, by the API, and is treated accordingly."""
    vm = appliance.lab.vm("db-1")
    edit = {"tags": {"tier": "app"}}
    answer = appliance.api(f"/vms/{vm.vm_id}", "PUT", edit, If_Match="*")
    assert answer.status == 200, answer
    assert appliance.read("explain", "web-1", "db-1")["policy"] == "web-to-app"
    appliance.apply(build_documents(appliance.lab))
    assert appliance.read("explain", "web-1", "db-1")["policy"] is None
