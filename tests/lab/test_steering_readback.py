"""Random policies on the real switch: OVS writes every compiled line back as it was compiled."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings

from appliance.lab import LabState
from steering.compile import compile_program
from steering.decide import resolve_machines
from steering.diff import build_bundle
from steering.flows import Program
from steering.model import PolicySet
from steering.switch.openflow import OpenFlowSwitch
from tests.support.worlds import LANES, build_port, policy_sets

pytestmark = pytest.mark.lab

PORTS = tuple(build_port(number, tag=number % 2 * 7 or None) for number in range(1, 7))


def test_any_program_reads_back_to_the_letter_and_leaves_again(bare_lab: LabState) -> None:
    switch = OpenFlowSwitch(bare_lab.openflow)

    async def go_to(program: Program) -> None:
        await switch.send_bundle(build_bundle(program, await switch.read_present()))
        left = build_bundle(program, await switch.read_present())
        assert not left, "\n".join(change.text for change in left.changes[:5])

    @settings(
        max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(policy_sets())
    def check(policies: PolicySet) -> None:
        # From whatever the example before left: each step is a change between two random programs.
        asyncio.run(go_to(compile_program(policies, resolve_machines(policies, PORTS), LANES)))

    try:
        check()
    finally:
        asyncio.run(go_to(Program()))
