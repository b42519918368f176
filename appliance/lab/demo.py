"""`make demo`: exploits between two VMs, hairpinned through a real engine, dropped and recorded.

The last line on stdout is `demo: PASS n/n` (exit status 0) or `demo: FAIL n/m` (1); progress and
faults go to stderr. Ctrl-C, SIGTERM and SIGHUP take everything down and end with status 130; what
a `kill -9` leaves, the next run takes down first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from appliance.commands.output import OutputClosed, clean, print_line, print_note, print_table
from appliance.lab.demo_failure import run_failure
from appliance.lab.demo_report import COLUMNS, Check, build_rows, is_passed, render_summary
from appliance.lab.demo_stage import (
    Stage,
    find_differences,
    find_remains,
    read_machine,
    read_tails,
    set_stage,
    wait_until,
)
from appliance.lab.demo_steps import (
    run_benign,
    run_blind,
    run_exploits,
    run_opening,
    run_policy,
)
from appliance.lab.lifecycle import bring_up, take_down
from appliance.lab.plan import LabState
from appliance.logs import configure_logs
from steering.errors import HairpinError

LAB = "demo"
CLAIM = "\0hairpin-demo"  # an abstract socket: who has bound it has the stage
INTERRUPTED = 130

Step = Callable[[Stage], Iterator[Check]]
POLICY_STEPS: tuple[tuple[str, Step], ...] = (
    ("", run_opening),
    ("a", run_benign),
    ("b", run_exploits),
    ("c", run_blind),
    ("d", run_policy),
)
STEPS = (*POLICY_STEPS, ("e", run_failure))
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What one is called (in its last line, and its lab without the hyphen), and what it consists of.

    ``play`` shows the steps in the lab that ``make`` brought up; ``last`` is the step of the taking down.
    """

    name: str
    make: Callable[[str, Say], LabState]
    play: Callable[[LabState, Say, list[Check]], None]
    last: str = "f"

    @property
    def lab(self) -> str:
        return self.name.replace("-", "")


DEMO = Demonstration(
    LAB,
    lambda name, say: bring_up(name, progress=say),
    lambda state, say, checks: play(state, say, checks),
)


@contextlib.contextmanager
def interrupted_once() -> Iterator[None]:
    """Make SIGINT, SIGTERM and SIGHUP one KeyboardInterrupt: a second must not stop the clean-up."""
    came: list[int] = []
    owner = os.getpid()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(0)  # a fork of pyroute2, which is ended by SIGTERM
        if not came:
            came.append(number)
            raise KeyboardInterrupt(signal.Signals(number).name)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hold_stage(name: str = LAB) -> Iterator[None]:
    """Keep a second demonstration off the first one's lab; the kernel lets go with the process.

    Raises HairpinError when one is running.
    """
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            claim.bind(CLAIM if name == LAB else f"{CLAIM}-{name}")
        except OSError as fault:
            raise HairpinError(
                f"another `make {name}` is running", "wait until it ended"
            ) from fault
        yield


def run_steps(stage: Stage, steps: Sequence[tuple[str, Step]], checks: list[Check]) -> None:
    """Run every step and append what it shows; one that breaks off is a failed check, and the next is run."""
    for name, step in steps:
        try:
            checks.extend(step(stage))
        except HairpinError as fault:
            print_note(f"step ({name or 'opening'}) broke off: {clean(fault.reason)}")
            reason = (fault.reason.splitlines() or [""])[0]
            checks.append(build_broken(name, reason))
        except Exception as defect:
            # Of the product or of this demonstration: told in full, and no reason to show less.
            traceback.print_exc()
            checks.append(build_broken(name, f"{type(defect).__name__}: {defect}"))


def build_broken(step: str, reason: str) -> Check:
    return Check(step, "the rest of this step", "done", f"broke off: {reason}", False)


def check_taken_down(before: dict[str, str], lab: str = LAB, step: str = "f") -> Check:
    """Nothing of the lab is left, and the machine's own network is as it was."""

    def look() -> list[str]:
        return [*find_remains(lab), *find_differences(before, read_machine())]

    # A process that was just ended may still be in its parent's hands for a moment.
    wait_until(lambda: not look(), 5.0)
    left = look()
    return Check(
        step,
        "hairpin lab down",
        "no trace",
        f"left: {', '.join(left)}"
        if left
        else "no namespace, process, mount, file, link or sysctl",
        not left,
    )


def run_demo(demo: Demonstration = DEMO) -> int:
    """The whole demonstration; its exit status."""
    began = time.monotonic()

    def say(line: str) -> None:
        print_note(f"[{time.monotonic() - began:5.1f} s] {clean(line)}")

    checks: list[Check] = []
    interrupted = False
    before = read_machine()
    try:
        # What is left of one that was killed, also if it still stands whole.
        take_down(demo.lab, progress=say)
        state = demo.make(demo.lab, say)
        demo.play(state, say, checks)
    except KeyboardInterrupt as came:
        interrupted = True
        say(f"interrupted ({came or 'Ctrl-C'})")
        checks.append(Check("", "the demonstration", "ends by itself", "interrupted", False))
    except HairpinError as fault:
        print_note(f"error: {fault.reason}\n  what to do: {fault.mend or 'see `hairpin doctor`'}")
        reason = (fault.reason.splitlines() or [""])[0]
        checks.append(Check("", "the lab", "comes up", reason, False))
    finally:
        take_down(demo.lab, progress=say)
    checks.append(check_taken_down(before, demo.lab, demo.last))
    say("done")
    print_table(COLUMNS, build_rows(checks), "")
    print_line(render_summary(checks, demo.name))
    return INTERRUPTED if interrupted else 0 if is_passed(checks) else 1


def play(
    state: LabState, say: Say, checks: list[Check], steps: Sequence[tuple[str, Step]] = STEPS
) -> None:
    """Start the servers and run the scenario; the logs' ends are told if anything is wrong."""
    try:
        say("starting nginx and Redis in the VMs")
        run_steps(set_stage(state, say), steps, checks)
    finally:
        if not is_passed(checks):
            print_note(read_tails(state))


def main(demo: Demonstration = DEMO) -> int:
    try:
        configure_logs("warning")
        with interrupted_once(), hold_stage(demo.name):
            return run_demo(demo)
    except HairpinError as fault:
        print_note(f"error: {fault.reason}\n  what to do: {fault.mend}")
        print_line(render_summary([], demo.name))
        return 1
    except KeyboardInterrupt:
        # It came in the moment before the taking down began.
        take_down(demo.lab, progress=print_note)
        print_line(render_summary([], demo.name))
        return INTERRUPTED
    except OutputClosed:
        return 141


if __name__ == "__main__":
    sys.exit(main())
