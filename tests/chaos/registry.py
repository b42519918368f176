"""The rows of the fault campaign: what each is called, which goal it has, how long it may take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.chaos.stage import Stage

CLOSED_GOAL = "0 packets pass uninspected"
OPEN_GOAL = "traffic passes again within 200 ms; inspection back within 1 s of the engine's return"
CONTROL_GOAL = "0 packets lost, 0 flows different afterwards, reconciled within 2 s"
TCP_GOAL = "100 % of connections survive; 100 % of later attacks in them blocked"
RULES_GOAL = "0 s below the floor; last good set back within 5 s"
EVENTS_GOAL = "0 lost, 0 doubled in the store, `PRAGMA integrity_check` ok every time"
OVERLOAD_GOAL = "balance closes: sent = inspected + dropped + passed by policy, nothing unexplained"
EVASION_GOAL = "0 of N attacks delivered"
FRAMES_GOAL = "each delivered exactly once to every VM, none doubled"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``missed`` has what is not as the goal says, each with its figure."""

    name: str
    mode: str
    goal: str
    figures: dict[str, Any]
    missed: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        return not self.missed

    def document(self) -> dict[str, Any]:
        """As `build/chaos.json` has it; what was missed stands in the figures."""
        figures = {**self.figures, **({"missed": list(self.missed)} if self.missed else {})}
        return {
            "name": self.name,
            "mode": self.mode,
            "figures": figures,
            "goal": self.goal,
            "met": self.met,
        }


@dataclass(frozen=True, slots=True)
class Fault:
    """One function of the registry. ``seconds`` is its time limit; ``quick``: in `make chaos-quick`."""

    name: str
    measure: Callable[[Stage], Iterable[Row]]
    seconds: float
    quick: bool
    theme: str
    text: str = field(default="")


_faults: dict[str, Fault] = {}


def fault(
    name: str, *, seconds: float = 60.0, quick: bool = False
) -> Callable[[Callable[[Stage], Iterable[Row]]], Callable[[Stage], Iterable[Row]]]:
    """Register a function that injects a fault and tells the rows that it measured."""

    def register(
        measure: Callable[[Stage], Iterable[Row]],
    ) -> Callable[[Stage], Iterable[Row]]:
        if name in _faults:
            raise ValueError(f"two rows are called {name}")
        text = (measure.__doc__ or "").strip().splitlines()[0]
        theme = measure.__module__.rpartition(".")[2].removeprefix("rows_")
        _faults[name] = Fault(name, measure, seconds, quick, theme, text)
        return measure

    return register


def find_faults() -> tuple[Fault, ...]:
    """All of them, in the order of their files."""
    return tuple(_faults.values())


def check(*claims: tuple[bool, str]) -> tuple[str, ...]:
    """The texts of those claims that do not hold."""
    return tuple(text for holds, text in claims if not holds)
