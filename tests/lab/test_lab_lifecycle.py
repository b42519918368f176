"""A lab leaves nothing behind: not after down, not after Ctrl-C, not after kill -9 at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from appliance import lab as the_lab
from steering.errors import CommandFailed, HairpinError, WrongInput
from steering.run import run
from tests.support.lab import NO_TRACES, build_name, find_traces, reaches

pytestmark = pytest.mark.lab

# Says each step on its output before it is done, and stops there for the test to do its worst.
UP = """
import sys
from appliance.lab import bring_up
import structlog, logging
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
def say(line):
    print(line, flush=True)
try:
    bring_up(sys.argv[1], 2, serve=False, progress=say)
except KeyboardInterrupt:
    sys.exit(130)
print("up", flush=True)
"""
STEPS = ["making", "connecting", "starting", "checking"]


def start_up(name: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", UP, name]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)


def read_sysctls() -> str:
    names = ["net.ipv4.ip_forward", "net.ipv6.conf.all.disable_ipv6", "net.ipv6.conf.all.accept_ra"]
    names += ["net.ipv6.conf.default.disable_ipv6", "net.ipv6.conf.default.accept_dad"]
    return run(["sysctl", *names]).stdout


def test_up_and_down_leave_nothing_and_a_second_up_is_refused() -> None:
    name = build_name("c")
    sysctls = read_sysctls()
    said: list[str] = []
    try:
        state = the_lab.bring_up(name, 2, serve=False, progress=said.append)
        with pytest.raises(HairpinError, match="is up already") as refused:
            the_lab.bring_up(name, 2, serve=False)
        assert "lab down" in refused.value.mend
        assert reaches(state, "web-1", state.vm("app-1").address4)
        traces = find_traces(name)
        assert len(traces.namespaces) == 5
        assert traces.root_links == ()
        assert oct(os.stat(state.client_file).st_mode & 0o777) == "0o600"
        assert oct(os.stat(state.token_file).st_mode & 0o777) == "0o600"
    finally:
        assert the_lab.take_down(name) is True
    assert [line.split()[0] for line in said] == STEPS
    assert find_traces(name) == NO_TRACES
    assert read_sysctls() == sysctls
    assert the_lab.take_down(name) is False


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_up_is_cleaned_by_down(step: str) -> None:
    name = build_name("k")
    with start_up(name) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(step):
                break
        child.kill()
    try:
        assert find_traces(name) != NO_TRACES
    finally:
        the_lab.take_down(name)
    assert find_traces(name) == NO_TRACES


def test_a_killed_up_is_cleaned_by_the_next_up() -> None:
    name = build_name("n")
    with start_up(name) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("checking"):
                break
        child.kill()
    said: list[str] = []
    try:
        state = the_lab.bring_up(name, 2, serve=False, progress=said.append)
        assert "taking down" in said[0]
        assert the_lab.read_status(name).whole
        assert len(find_traces(name).processes) == len(state.processes) == 2
    finally:
        the_lab.take_down(name)
    assert find_traces(name) == NO_TRACES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_up_cleans_up_after_itself(number: signal.Signals) -> None:
    name = build_name("i")
    try:
        with start_up(name) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("connecting"):
                    break
            # As a terminal does it: to the whole group, forks and commands too, and impatiently.
            os.killpg(child.pid, number)
            os.killpg(child.pid, number)
            assert child.wait(20) == 130
        assert find_traces(name) == NO_TRACES
    finally:
        the_lab.take_down(name)


def test_a_lab_without_its_state_file_is_still_taken_down() -> None:
    name = build_name("s")
    try:
        state = the_lab.bring_up(name, 2, serve=False)
        (state.directory / "lab.json").write_text("{torn")
    finally:
        assert the_lab.take_down(name) is True
    assert find_traces(name) == NO_TRACES


def test_two_labs_stand_side_by_side_and_one_goes_alone() -> None:
    first, second = build_name("x"), build_name("y")
    try:
        the_lab.bring_up(first, 2, serve=False)
        state = the_lab.bring_up(second, 2, serve=False)
        the_lab.take_down(first)
        assert find_traces(first) == NO_TRACES
        assert the_lab.read_status(second).whole
        assert reaches(state, "web-1", state.vm("app-1").address6)
    finally:
        the_lab.take_down(first)
        the_lab.take_down(second)
    assert find_traces(second) == NO_TRACES


def test_a_lab_that_can_not_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = build_name("f")
    # A fake fault: no real switch refuses a flow that this lab adds.
    monkeypatch.setattr("appliance.lab.plan.PLAIN_FLOW", "no flow")
    monkeypatch.setattr("appliance.lab.hypervisor.PLAIN_FLOW", "no flow")
    with pytest.raises(CommandFailed):
        the_lab.bring_up(name, 2, serve=False)
    assert find_traces(name) == NO_TRACES


def test_wrong_values_make_nothing() -> None:
    name = build_name("w")
    for vms in (1, 65):
        with pytest.raises(WrongInput, match="not between 2 and 64"):
            the_lab.bring_up(name, vms, serve=False)
    with pytest.raises(WrongInput, match="nonsense"):
        the_lab.bring_up(name, 2, serve=False, overrides={"nonsense": 1})
    with pytest.raises(WrongInput, match="name"):
        the_lab.take_down("../etc")
    assert find_traces(name) == NO_TRACES
