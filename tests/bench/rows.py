"""What a row of the benchmark is, and the arithmetic of it. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Path(StrEnum):
    """The ways between two VMs that are compared: the product, the plain switch, and two peers."""

    HAIRPIN = "hairpin"
    DIRECT = "direct"
    STOCK = "stock NFQUEUE"
    AF_PACKET = "AF_PACKET IPS"

    @property
    def inspects(self) -> bool:
        return self is not Path.DIRECT


NOTHING = 1e-9
"""The figure of a peer that moved nothing; 0 is for one that delivered the token exploit."""

PEERS = (Path.STOCK, Path.AF_PACKET)


@dataclass(frozen=True, slots=True)
class Round:
    """One figure of every path, taken in the same minute; ``cpu``: busy seconds per gigabyte.

    A path on which the token exploit was delivered has the figure 0: a fast blind path scores nothing.
    """

    values: Mapping[Path, float]
    cpu: Mapping[Path, float] = field(default_factory=dict)


def find_median(rounds: Sequence[Round], path: Path) -> float:
    return statistics.median(one.values[path] for one in rounds)


def find_spread(rounds: Sequence[Round], path: Path) -> tuple[float, float]:
    """The least and the greatest."""
    values = [one.values[path] for one in rounds]
    return min(values), max(values)


def find_ratio(rounds: Sequence[Round], path: Path, base: Path) -> float:
    """The median of the rounds' own ratios: both figures of one are of the same minute.

    0 where ``base`` has a round of 0: nothing can be said of it.
    """
    if any(one.values[base] <= NOTHING for one in rounds):
        return 0.0
    return statistics.median(one.values[path] / one.values[base] for one in rounds)


def find_cpu_ratio(rounds: Sequence[Round], path: Path, base: Path) -> float:
    if any(one.cpu[base] == 0 for one in rounds):
        return 0.0  # nothing was moved in one of them: nothing can be said
    return statistics.median(one.cpu[path] / one.cpu[base] for one in rounds)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``value`` is the product's, ``peers`` have theirs by name.

    ``ratio``: what the goal is about, each by its name; ``missed``: what is not as the goal says.
    ``rounds``: every raw figure.
    """

    name: str
    value: float
    unit: str
    goal: str
    peers: Mapping[str, float] = field(default_factory=dict)
    ratio: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    rounds: Sequence[Mapping[str, Any]] = ()
    missed: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        return not self.missed

    def document(self) -> dict[str, Any]:
        """As `build/bench.json` has it."""
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "unit": self.unit,
            "peers": {name: round(value, 4) for name, value in self.peers.items()},
            "ratio": {name: round(value, 4) for name, value in self.ratio.items()},
            "spread": {name: list(both) for name, both in self.spread.items()},
            "goal": self.goal,
            "met": self.met,
            "missed": list(self.missed),
            "rounds": list(self.rounds),
        }


def check(*claims: tuple[bool, str]) -> tuple[str, ...]:
    """The texts of those claims that do not hold."""
    return tuple(text for holds, text in claims if not holds)


def build_row(
    name: str,
    unit: str,
    goal: str,
    rounds: Sequence[Round],
    judge: Callable[[Mapping[str, float]], tuple[str, ...]],
    *,
    larger: bool = True,
) -> Row:
    """A row of figures by path. ``judge`` gets the ratios, by ``hairpin / PATH``; ``larger`` is better."""
    ratio = {
        f"hairpin / {path}": find_ratio(rounds, Path.HAIRPIN, path)
        for path in (Path.DIRECT, *PEERS)
    }
    blind = [path for path in Path if path.inspects and find_spread(rounds, path)[0] == 0]
    told = tuple(f"{path} delivered the token exploit" for path in blind if larger)
    return Row(
        name=name,
        value=find_median(rounds, Path.HAIRPIN),
        unit=unit,
        goal=goal,
        peers={path.value: find_median(rounds, path) for path in (Path.DIRECT, *PEERS)},
        ratio=ratio,
        spread={path.value: find_spread(rounds, path) for path in Path},
        rounds=[
            {
                **{path.value: value for path, value in one.values.items()},
                **({"cpu": {path.value: v for path, v in one.cpu.items()}} if one.cpu else {}),
            }
            for one in rounds
        ],
        missed=(*told, *judge(ratio)),
    )
