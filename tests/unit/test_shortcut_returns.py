"""What stored alerts send back to inspection, and what a new ruleset or engine does; values in, values out."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.alerts.model import Alert, Endpoint, Signature, Verdict
from appliance.api.queries import ShortcutFilter
from appliance.assurance.canary import CanaryWatch
from appliance.assurance.connections import End, TakenConnection
from appliance.inspection.publish import EngineState, InspectionState, LaneState
from appliance.management import rulework
from appliance.management.rulework import RuleWork
from appliance.management.shortcut import (
    MOST_LINES,
    ShortcutWork,
    find_lane_policies,
    find_returns,
    find_shortcuts,
)
from appliance.rules.pipeline import RulePipeline
from appliance.settings import Settings
from steering.errors import HairpinError
from steering.model import Direct, Family, PolicySet, Profile, Trigger
from steering.shortcut import Connection, Return
from tests.support.shortcut_world import build_policies
from tests.support.waiting import wait_until

POLICIES = build_policies()  # `backup` returns on alerts, `quiet` does not
PLAIN = replace(
    POLICIES, policies=tuple(replace(one, action=Direct("trusted")) for one in POLICIES.policies)
)


def build_alert(
    *,
    verdict: Verdict = Verdict.ALLOWED,
    source: str | None = "vm-1",
    destination: str | None = "vm-2",
    policy: str | None = "backup",
    **more: Any,
) -> Alert:
    values: dict[str, Any] = {
        "id": 1, "at": 0.0, "stored_at": 0.0, "lane": "prevent", "profile": "prevent",
        "verdict": verdict, "source": Endpoint("10.0.0.1", 40_000, source),
        "destination": Endpoint("10.0.0.2", 873, destination), "protocol": "TCP",
        "family": Family.IPV4, "direction": None, "opener": None, "signature": Signature(7),
        "cves": (), "affected_products": (), "policy": policy, "revision": 1, "app_proto": None,
        "payload": "", "payload_printable": "", "http": None, "community_id": None, "flow_id": None,
        "reasons": (), "raw": "{}",
    }  # fmt: skip
    return Alert(**{**values, **more})


BLOCKED = Connection("backup", Family.IPV4, "10.0.0.1", 40_000, "10.0.0.2", 873)


def test_an_alert_sends_back_both_vms_where_policies_say_so() -> None:
    assert find_returns([build_alert()], POLICIES) == Return(
        vm_ids=frozenset({"vm-1", "vm-2"}), of_policies=frozenset({"backup"})
    )
    # Where all policies say so, no line of the switch need name them.
    back = replace(POLICIES, policies=POLICIES.policies[:1])
    assert find_returns([build_alert()], back) == Return(vm_ids=frozenset({"vm-1", "vm-2"}))


def test_alerts_of_udp_and_of_other_policies_concern_their_vms_as_well() -> None:
    for alert in (build_alert(protocol="UDP"), build_alert(policy="web"), build_alert(family=None)):
        wanted = find_returns([alert], POLICIES)
        assert wanted is not None
        assert wanted.vm_ids == {"vm-1", "vm-2"}
        assert not wanted.connections


def test_a_blocked_packet_sends_back_its_connection_whatever_the_policy_says() -> None:
    quiet = replace(POLICIES, policies=POLICIES.policies[1:])
    alert = build_alert(verdict=Verdict.BLOCKED, policy="quiet")
    assert find_returns([alert], quiet) == Return(
        connections=frozenset({replace(BLOCKED, policy="quiet")})
    )
    assert find_returns([replace(alert, verdict=Verdict.ALLOWED)], quiet) is None
    both = find_returns([build_alert(verdict=Verdict.BLOCKED)], POLICIES)
    assert both is not None
    assert both.connections == {BLOCKED}
    assert both.vm_ids == {"vm-1", "vm-2"}


def test_of_a_blocked_packet_without_a_policy_all_of_them_hold_back() -> None:
    wanted = find_returns([build_alert(verdict=Verdict.BLOCKED, policy=None)], POLICIES)
    assert wanted is not None
    assert {one.policy for one in wanted.connections} == {"backup", "quiet"}


def test_where_an_end_is_of_no_known_vm_rather_too_much_is_sent_back() -> None:
    wanted = find_returns([build_alert(destination=None, policy=None)], POLICIES)
    assert wanted is not None
    assert (wanted.policies, wanted.vm_ids) == ({"backup"}, {"vm-1"})
    wanted = find_returns([build_alert(source=None, destination=None, policy="quiet")], POLICIES)
    assert wanted is None, "that policy's connections stay, and the VMs are not known"


def test_without_a_policy_that_lets_go_nothing_is_sent_back() -> None:
    alerts = [build_alert(verdict=Verdict.BLOCKED)]
    assert find_returns(alerts, PLAIN) is None
    assert find_returns(alerts, PolicySet()) is None
    assert find_returns([], POLICIES) is None


def test_many_at_once_send_back_their_policies_as_a_whole() -> None:
    alerts = [build_alert(source=f"vm-{number}") for number in range(MOST_LINES + 1)]
    assert find_returns(alerts, POLICIES) == Return(policies=frozenset({"backup"}))
    alerts = [
        build_alert(verdict=Verdict.BLOCKED, source=f"vm-{number}") for number in range(MOST_LINES)
    ]
    assert find_returns(alerts, POLICIES) == Return(policies=frozenset({"backup", "quiet"}))


names = st.sampled_from([None, "vm-1", "vm-2", "vm-3"])
alerts_ = st.lists(
    st.builds(
        lambda verdict, source, destination, policy, protocol: build_alert(
            verdict=verdict,
            source=source,
            destination=destination,
            policy=policy,
            protocol=protocol,
        ),
        st.sampled_from(Verdict),
        names,
        names,
        st.sampled_from([None, "backup", "quiet", "gone"]),
        st.sampled_from(["TCP", "UDP"]),
    ),
    max_size=6,
)


@given(alerts_, st.sampled_from([POLICIES, PLAIN, PolicySet()]))
def test_nothing_ever_turns_into_everything(alerts: list[Alert], policies: PolicySet) -> None:
    """A `Return` that names nothing is one of all: that is an operator's word, and never an alert's."""
    wanted = find_returns(alerts, policies)
    if wanted is not None:
        assert not wanted.is_all
        assert find_shortcuts(policies)
        assert wanted.of_policies <= {"backup"}
        assert not wanted.of_policies or wanted.vm_ids
    if any(alert.verdict is Verdict.BLOCKED and alert.protocol == "TCP" for alert in alerts):
        assert (wanted is not None) == bool(find_shortcuts(policies))


def test_whose_connections_a_lanes_engine_lets_go() -> None:
    assert find_lane_policies(POLICIES, "prevent") == {"backup", "quiet"}
    assert find_lane_policies(POLICIES, "detect") == frozenset()
    assert find_lane_policies(PLAIN, "prevent") == frozenset()


LANE = {
    "profile": "prevent",
    "vlan": 3001,
    "legA": {"interface": "hp-prev-a", "device": "a"},
    "legB": {"interface": "hp-prev-b", "device": "b"},
    "queues": [0],
}
SETTINGS = Settings.model_validate({"lanes": [LANE]})


def build_rules(told: list[str], *, running: bool) -> RuleWork:
    """Its engine can't be reached: a real one refuses when it is told to, which takes a lab."""
    state = EngineState.RUNNING if running else EngineState.FAILED
    lanes = (LaneState(number=1, name="prevent", state=state),)
    published = InspectionState(updated=1.0, pid=1, lanes=lanes)

    async def record(kind: str, severity: str, message: str) -> None:
        raise AssertionError(message)

    class Canary:
        def hold(self, lane: object) -> Canary:
            return self

        def is_forwarding(self, lane: object) -> bool:
            return True

        async def __aenter__(self) -> None:
            told.append("held")

        async def __aexit__(self, *failure: object) -> None:
            told.append("let go")

    canary = cast(CanaryWatch, Canary())
    work = RuleWork(SETTINGS, cast(RulePipeline, None), lambda: published, record, canary)
    work.on_reload = told.append
    return work


async def test_a_reload_that_was_asked_for_is_told_once_it_is_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(socket: Path) -> None:
        raise HairpinError("not now", "")

    monkeypatch.setattr(rulework, "reload_rules", refuse)
    told: list[str] = []
    verdict = await build_rules(told, running=True)._reload(Profile.PREVENT, Path("rules"))
    assert not verdict.accepted
    assert told == ["held", "let go", "prevent"], "refused too: what the engine has is not known"


async def test_an_engine_that_is_not_running_is_not_told_of_here() -> None:
    told: list[str] = []
    verdict = await build_rules(told, running=False)._reload(Profile.PREVENT, Path("rules"))
    assert verdict.accepted
    assert told == [], "when it starts it is another engine"


class OneTaken:
    """A fake switch and watch: one connection takes its shortcut until it is sent back. On a real switch the
    look and the return are two commands, of which either may be the first.
    """

    def __init__(self) -> None:
        self.connections: tuple[TakenConnection, ...] = ()
        self.done: list[str] = []

    async def peek(self) -> tuple[TakenConnection, ...]:
        await asyncio.sleep(0)
        self.done.append("look")
        ends = End("vm-1", "a", "10.0.0.1", 40_000), End("vm-2", "b", "10.0.0.2", 873)
        one = TakenConnection(
            "1", "backup", Trigger.ONE_MEGABYTE, Family.IPV4, *ends, 0.0, 0.0, frozenset("1")
        )
        return () if "return" in self.done else (one,)

    async def return_shortcuts(self, wanted: Return) -> float:
        self.done.append("return")
        return 0.001

    def note_returned(self, connections: object) -> None:
        """Nobody asks."""

    async def write(self, job: object) -> None:
        """The store, which keeps the event: nobody asks."""


def build_work(fake: OneTaken) -> ShortcutWork:
    parts = cast(Any, fake)
    return ShortcutWork(
        parts, parts, parts, parts, lambda: POLICIES, lambda: None, lambda lane: "r1"
    )


async def test_an_operator_is_told_of_a_connection_that_no_look_has_seen_before() -> None:
    fake = OneTaken()
    report = await build_work(fake).return_filtered(ShortcutFilter(policy="backup"))
    assert (report.returned, fake.done) == (1, ["look", "return"])


async def test_a_quarantine_waits_for_no_look() -> None:
    fake = OneTaken()
    work = build_work(fake)
    work.return_vm("vm-1", "a")
    running = asyncio.create_task(work.run_returns())
    await wait_until(lambda: len(fake.done) == 2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert fake.done == ["return", "look"]
