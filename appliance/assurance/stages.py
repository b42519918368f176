"""Where a canary was lost: from what was seen of it on its way to a stage and a sentence. Pure.

The way: `hairpin inspect` sends it by a port of Hairpin's own -> the switch's tables steer it -> the
lane's group and leg, in the lane's VLAN -> the service host's bridge -> queue rule -> engine. A
*control* then goes by the other leg back to the port; a *hostile* one is dropped there, and its alert
goes through the EVE file into the store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from appliance.inspection.canary_client import PartReport, ProbeReport
from steering.canary import PARTS, Part


class Stage(StrEnum):
    """In the order in which a canary meets them."""

    SENDER = "sender"
    FLOW_TABLE = "flow table"
    VLAN = "vlan"
    BRIDGE = "bridge"
    QUEUE_RULE = "queue rule"
    ENGINE = "engine"
    RULESET = "ruleset"
    RETURN = "return"
    EVE = "eve"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What else is known of the lane while the probe was made.

    ``forwarding``: BFD passes. ``engine_runs``: supervised and answering. ``faults``: what `inspect`
    found wrong with bridge or rules in this time, kind by kind. ``entered_switch`` and ``steered``:
    the switch counted canaries at the port, and those it sent to the lane's group; None: not known.
    ``packets_wait``: in the lane's queue, for an engine that does not take them.
    """

    forwarding: bool = True
    engine_runs: bool = True
    bridge_fault: str = ""
    rules_fault: str = ""
    entered_switch: bool | None = None
    steered: bool | None = None
    packets_wait: bool = False
    in_eve: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """``stage`` is None when everything was as it must be. ``guessed``: nothing told the stage.

    ``shut_out``: the lane was down and no canary entered it, so that nothing was learned of its engine.
    """

    stage: Stage | None = None
    detail: str = ""
    guessed: bool = False
    shut_out: bool = False

    @property
    def passed(self) -> bool:
        return self.stage is None


def judge_probe(
    report: ProbeReport, arrived: Iterable[str], vlan: int, around: Surroundings
) -> Judgement:
    """What a probe proves. ``arrived`` are names of parts whose alerts are stored as blocked."""
    if report.fault:
        return Judgement(Stage.SENDER, report.fault)
    seen = {(one.family, one.answer, one.hostile): one for one in report.parts}
    # Controls first: a control shows how far the way is whole, a hostile packet what is done on it.
    for part in sorted(PARTS, key=lambda one: one.hostile):
        one = seen.get((part.family, part.answer, part.hostile))
        if one is None or not one.sent:
            return Judgement(Stage.SENDER, f"{_name(part)} was not sent")
        lost = _judge_way(part, one, report, vlan, around)
        if lost is not None:
            return lost
    return _judge_record(set(arrived), around)


def _judge_way(
    part: Part, one: PartReport, report: ProbeReport, vlan: int, around: Surroundings
) -> Judgement | None:
    name = _name(part)
    if not one.entered:
        return _judge_entry(name, around)
    if one.vlan != vlan:
        return Judgement(Stage.VLAN, f"{name} entered in VLAN {one.vlan}, not {vlan}")
    if part.hostile:
        if not one.left and not one.returned:
            return None
        if report.queued == 0 or around.rules_fault:
            return Judgement(
                Stage.QUEUE_RULE,
                f"{name} passed without being queued: {around.rules_fault}".rstrip(": "),
            )
        return Judgement(
            Stage.RULESET,
            f"the engine passed {name}: it does not run the ruleset in force",
        )
    if not one.left:
        return _judge_service_host(name, part, report, around)
    if not one.returned:
        return Judgement(Stage.RETURN, f"{name} left the lane and the switch did not deliver it")
    return None


def _judge_service_host(
    name: str, part: Part, report: ProbeReport, around: Surroundings
) -> Judgement:
    """A control ended there. The queue's count alone does not tell: BFD is queued all the time."""
    if around.rules_fault:
        return Judgement(Stage.QUEUE_RULE, f"{name} was not queued: {around.rules_fault}")
    if around.bridge_fault:
        return Judgement(Stage.BRIDGE, f"{name} ended in the service host: {around.bridge_fault}")
    if any(one.left for one in report.parts if not one.hostile and one.family != part.family):
        return Judgement(Stage.QUEUE_RULE, f"{name} was not queued, but the other family was")
    if report.queued == 0:
        return Judgement(Stage.BRIDGE, f"{name} ended in the service host, and nothing was queued")
    return Judgement(Stage.ENGINE, f"{name} was queued and did not come out again")


def _judge_entry(name: str, around: Surroundings) -> Judgement:
    """It never reached the service host."""
    if not around.forwarding:
        return replace(_judge_down(around), shut_out=True)
    if around.entered_switch is False:
        return Judgement(Stage.SENDER, f"{name} was sent and the switch's port did not count it")
    where = "its tables did not steer it" if around.steered is False else "it reached no leg"
    return Judgement(Stage.FLOW_TABLE, f"{name} entered the switch, but {where}")


def _judge_down(around: Surroundings) -> Judgement:
    if around.rules_fault:
        return Judgement(Stage.QUEUE_RULE, f"the lane is down: {around.rules_fault}")
    if around.bridge_fault:
        return Judgement(Stage.BRIDGE, f"the lane is down: {around.bridge_fault}")
    if not around.engine_runs:
        return Judgement(Stage.ENGINE, "the lane is down: its engine does not run")
    if around.packets_wait:
        return Judgement(Stage.ENGINE, "the lane is down: packets wait and no engine takes them")
    return Judgement(Stage.BRIDGE, "the lane is down: BFD does not pass through it", True)


def _judge_record(arrived: set[str], around: Surroundings) -> Judgement:
    missing = sorted({part.name for part in PARTS if part.hostile} - arrived)
    if not missing:
        return Judgement()
    what = ", ".join(missing)
    if around.in_eve:
        return Judgement(Stage.STORE, f"the alerts of {what} stand in EVE and not in the store")
    return Judgement(Stage.EVE, f"{what} dropped, but no alert was written to EVE")


def _name(part: Part) -> str:
    return f"the {'hostile packet' if part.hostile else 'control'} {part.name}"
