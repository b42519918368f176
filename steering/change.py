"""What a change of the switch is planned as, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass

from steering.diff import Bundle
from steering.errors import SwitchError
from steering.flows import Program
from steering.model import Observed


@dataclass(frozen=True, slots=True)
class Plan:
    """What applying would do: the program wanted, and the bundle that leads there."""

    program: Program
    bundle: Bundle
    observed: Observed


@dataclass(frozen=True, slots=True)
class Applied:
    """What was done. ``seconds`` from the call to the verified read-back."""

    bundle: Bundle
    seconds: float


@dataclass(frozen=True, slots=True)
class SwitchStatus:
    """``reachable`` False: ``reason`` says why, since ``since``."""

    reachable: bool
    reason: str
    since: float
    fail_mode: str
    ovs_version: str
    datapath_type: str
    problems: tuple[str, ...]


def build_mismatch(left: Bundle, done: str) -> SwitchError:
    """What was read back is not what was sent; ``done``: and what was done about it."""
    return SwitchError(
        f"the switch reads back other than it was told in {len(left.changes)} places, "
        f"first: {left.changes[0].kind} {left.changes[0].text}",
        f"{done}; check for another controller",
    )
