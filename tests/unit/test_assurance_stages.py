"""Where a canary was lost: each stage by what is seen of a probe that ends there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.assurance.stages import Judgement, Stage, Surroundings, judge_probe
from appliance.inspection.canary_client import PartReport, ProbeReport
from steering.canary import PARTS

VLAN = 101
ARRIVED = tuple(part.name for part in PARTS if part.hostile)


def build_report(queued: int = 8, **changes: object) -> ProbeReport:
    """A probe that passed, but for ``changes``, which all controls (``left``) or hostile

    packets (``hostile_left``) show.
    """

    def build(part: object, hostile: bool) -> PartReport:
        seen: dict[str, object] = {
            "sent": True, "entered": True, "vlan": VLAN, "left": not hostile, "returned": not hostile,
        }  # fmt: skip
        for key, value in changes.items():
            name = key.removeprefix("hostile_")
            if hostile is key.startswith("hostile_") or key in ("sent", "entered", "vlan"):
                seen[name] = value
        return PartReport.model_validate(
            {"family": part.family, "answer": part.answer, "hostile": hostile, **seen}  # type: ignore[attr-defined]
        )

    parts = tuple(build(part, part.hostile) for part in PARTS)
    return ProbeReport(lane="prevent", probe="0" * 32, queued=queued, parts=parts)


FINE = Surroundings()
DOWN = Surroundings(forwarding=False)
ENDED = {"left": False, "returned": False}

CASES = [
    (ProbeReport(lane="prevent", probe="", fault="no device canary"), FINE, Stage.SENDER),
    (build_report(sent=False), FINE, Stage.SENDER),
    (build_report(entered=False), replace(FINE, entered_switch=False), Stage.SENDER),
    (build_report(entered=False), replace(FINE, entered_switch=True, steered=False), Stage.FLOW_TABLE),
    (build_report(entered=False), FINE, Stage.FLOW_TABLE),
    (build_report(vlan=102), FINE, Stage.VLAN),
    (build_report(entered=False), replace(DOWN, bridge_fault="lane1 was missing"), Stage.BRIDGE),
    (build_report(entered=False), DOWN, Stage.BRIDGE),
    (build_report(entered=False), replace(DOWN, rules_fault="1 rule missing"), Stage.QUEUE_RULE),
    (build_report(entered=False), replace(DOWN, engine_runs=False), Stage.ENGINE),
    (build_report(entered=False), replace(DOWN, packets_wait=True), Stage.ENGINE),
    (build_report(0, **ENDED), FINE, Stage.BRIDGE),
    (build_report(0, **ENDED), replace(FINE, rules_fault="1 rule missing"), Stage.QUEUE_RULE),
    (build_report(8, **ENDED), FINE, Stage.ENGINE),
    (build_report(0, hostile_left=True, hostile_returned=True), FINE, Stage.QUEUE_RULE),
    (build_report(8, hostile_left=True, hostile_returned=True), FINE, Stage.RULESET),
    (build_report(returned=False), FINE, Stage.RETURN),
]  # fmt: skip


@pytest.mark.parametrize(("report", "around", "stage"), CASES)
def test_the_stage_is_named(report: ProbeReport, around: Surroundings, stage: Stage) -> None:
    judgement = judge_probe(report, ARRIVED, VLAN, around)
    assert (judgement.stage, judgement.passed) == (stage, False)
    assert judgement.detail


def test_what_was_dropped_must_be_recorded() -> None:
    report = build_report()
    assert judge_probe(report, ARRIVED, VLAN, FINE) == Judgement()
    assert judge_probe(report, ARRIVED[1:], VLAN, FINE).stage is Stage.EVE
    lost = judge_probe(report, (), VLAN, replace(FINE, in_eve=True))
    assert lost.stage is Stage.STORE
    assert "ipv4-opener" in lost.detail


def test_one_family_that_passes_is_enough() -> None:
    """As when only ip6tables lost its rule."""
    report = build_report()
    parts = tuple(
        one.model_copy(update={"left": True, "returned": True})
        if one.hostile and one.family == "ipv6"
        else one
        for one in report.parts
    )
    judgement = judge_probe(report.model_copy(update={"parts": parts}), ARRIVED, VLAN, FINE)
    assert judgement.stage is Stage.RULESET
    assert "ipv6" in judgement.detail
