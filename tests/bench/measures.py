"""The rows: each measures all paths in turn, round after round, and judges its goal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from steering.errors import HairpinError
from tests.bench.policy import measure_flows, measure_policy
from tests.bench.rows import (
    NOTHING,
    PEERS,
    Path,
    Round,
    Row,
    build_row,
    check,
    find_cpu_ratio,
    find_median,
)
from tests.bench.shortcut import measure_mix, measure_shortcut
from tests.bench.stage import TARGETS, Stage
from tests.bench.store import measure_alerts, measure_ingest
from tests.bench.traffic import (
    Transfer,
    find_quantile,
    is_blocked,
    measure_connections,
    measure_round_trips,
    measure_transfer,
)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: rounds, seconds of each transfer, pings, changes of policy, elephants."""

    rounds: int
    seconds: float
    pings: int
    changes: int
    elephants: int


WHOLE = Effort(rounds=7, seconds=2.5, pings=600, changes=100, elephants=40)
QUICK = Effort(rounds=1, seconds=1.0, pings=100, changes=2, elephants=5)

Measure = Callable[[Stage, Effort], Iterable[Row]]


def _score(stage: Stage, path: Path, value: float) -> float:
    """The figure, or 0 where the token exploit was delivered."""
    blind = path.inspects and not is_blocked(stage.appliance, TARGETS[path])
    if blind:
        stage.say(f"    {path} delivered the token exploit")
    return 0.0 if blind else value


def _move(stage: Stage, path: Path, vm: str, seconds: float) -> Transfer:
    """A transfer; of a peer by which none comes to an end, nothing. Ours and the direct one must."""
    try:
        return measure_transfer(stage.appliance, vm, seconds, stage.idle)
    except HairpinError as fault:
        if path not in PEERS:
            raise
        stage.check_engine(path)
        stage.say(f"    {path} moved nothing: {fault.reason}")
        return Transfer(rate=NOTHING, cpu=0.0, retransmits=0)


def measure_flow(stage: Stage, effort: Effort, name: str, least: Mapping[Path, float]) -> list[Row]:
    """One TCP flow, every byte inspected; and the processor time of it."""
    rounds = []
    for number in range(effort.rounds):
        values: dict[Path, float] = {}
        cpu: dict[Path, float] = {}
        for path, vm in TARGETS.items():
            moved = _move(stage, path, vm, effort.seconds)
            values[path], cpu[path] = _score(stage, path, moved.rate), moved.cpu
        rounds.append(Round(values, cpu))
        told = ", ".join(f"{path} {value:.2f}" for path, value in values.items())
        stage.say(f"    round {number + 1}: {told} Gbit/s")
    goal = ", ".join(f"at least {value:g} of {path}" for path, value in least.items())

    def judge(ratio: Mapping[str, float]) -> tuple[str, ...]:
        return check(
            *(
                (ratio[f"hairpin / {path}"] >= value, f"{ratio[f'hairpin / {path}']:.2f} of {path}")
                for path, value in least.items()
            )
        )

    flow = build_row(name, "Gbit/s", goal, rounds, judge)
    ratio = {
        f"hairpin / {path}": find_cpu_ratio(rounds, Path.HAIRPIN, path)
        for path in Path
        if path is not Path.HAIRPIN
    }
    by_cpu = [Round(one.cpu) for one in rounds]
    cost = Row(
        name=f"{name}: CPU",
        value=find_median(by_cpu, Path.HAIRPIN),
        unit="s/GB",
        goal="at most 1/3 of either peer",
        peers={path.value: find_median(by_cpu, path) for path in Path if path is not Path.HAIRPIN},
        ratio=ratio,
        rounds=[{path.value: value for path, value in one.values.items()} for one in by_cpu],
        missed=check(
            *(
                (
                    0 < ratio[f"hairpin / {path}"] <= 1 / 3,
                    f"{ratio[f'hairpin / {path}']:.2f} of {path}",
                )
                for path in PEERS
            )
        ),
    )
    return [flow, cost]


def measure_latency(stage: Stage, effort: Effort) -> list[Row]:
    """Round-trip times of an idle path; what inspection adds is compared with AF_PACKET's."""
    trips: dict[Path, list[list[float]]] = {path: [] for path in Path}
    for _ in range(effort.rounds):
        for path, vm in TARGETS.items():
            trips[path].append(measure_round_trips(stage.appliance, vm, effort.pings))
    rows = []
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        rounds = [
            Round({path: find_quantile(trips[path][number], share) for path in Path})
            for number in range(effort.rounds)
        ]
        added = {
            path: find_median(rounds, path) - find_median(rounds, Path.DIRECT)
            for path in Path
            if path.inspects
        }
        row = build_row(
            f"added round-trip time, idle, {name}",
            "ms",
            "at most AF_PACKET IPS's",
            rounds,
            lambda _ratio, added=added: check(  # type: ignore[misc]
                (
                    added[Path.HAIRPIN] <= added[Path.AF_PACKET],
                    f"{added[Path.HAIRPIN]:.3f} ms added, AF_PACKET IPS {added[Path.AF_PACKET]:.3f} ms",
                )
            ),
            larger=False,
        )
        rows.append(
            Row(
                name=row.name,
                value=added[Path.HAIRPIN],
                unit=row.unit,
                goal=row.goal,
                peers={
                    **{f"{path} added": value for path, value in added.items()},
                    "direct": find_median(rounds, Path.DIRECT),
                },
                rounds=row.rounds,
                missed=row.missed,
            )
        )
    return rows


def measure_rate(stage: Stage, effort: Effort) -> list[Row]:
    """New connections a second, each with one request."""
    rounds = []
    for number in range(effort.rounds):
        values = {
            path: _score(stage, path, measure_connections(stage.appliance, vm, effort.seconds))
            for path, vm in TARGETS.items()
        }
        rounds.append(Round(values))
        told = ", ".join(f"{path} {value:.0f}" for path, value in values.items())
        stage.say(f"    round {number + 1}: {told} connections/s")

    def judge(ratio: Mapping[str, float]) -> tuple[str, ...]:
        least = {Path.DIRECT: 0.5, Path.STOCK: 1.5, Path.AF_PACKET: 1.5}
        return check(
            *(
                (ratio[f"hairpin / {path}"] >= value, f"{ratio[f'hairpin / {path}']:.2f} of {path}")
                for path, value in least.items()
            )
        )

    goal = "at least 0.5 of direct and 1.5 of either peer"
    return [build_row("new connections", "1/s", goal, rounds, judge)]


ONE_FLOW = {Path.DIRECT: 0.75, Path.STOCK: 4.0, Path.AF_PACKET: 4.0}
ONE_FLOW_FEED = {Path.DIRECT: 0.5, Path.STOCK: 3.0, Path.AF_PACKET: 3.0}


Alone = Callable[[Callable[[str], None], int], Iterable[Row]]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are measured together. ``feed``: with the whole feed loaded; ``alone``: on no stage, or

    one of its own, told how to speak and how many rounds; then ``measure`` is None.
    """

    name: str
    text: str
    measure: Measure | None = None
    feed: bool = False
    alone: Alone | None = None


GROUPS = (
    Group(
        "flow",
        "one TCP flow, every byte inspected, starter rules; CPU per GB",
        lambda stage, effort: measure_flow(stage, effort, "one TCP flow", ONE_FLOW),
    ),
    Group("latency", "added round-trip time, idle", measure_latency),
    Group("connections", "new connections per second", measure_rate),
    Group(
        "feed",
        "one TCP flow with the 19,946 rules of the feed",
        lambda stage, effort: measure_flow(
            stage, effort, "one TCP flow, 19,946 rules", ONE_FLOW_FEED
        ),
        feed=True,
    ),
    Group(
        "shortcut",
        "one TCP flow of which all but 1 MB takes the shortcut",
        lambda stage, effort: measure_shortcut(stage, effort.rounds, effort.seconds, effort.pings),
    ),
    Group(
        "mix",
        "mice and elephants over new connections, shortcut on",
        lambda stage, effort: measure_mix(stage, effort.rounds, effort.elephants),
    ),
    Group("flows", "flows for a 200 x 200 policy", alone=measure_flows),
    Group("policy", "policy change to first packet steered", alone=measure_policy),
    Group("ingest", "EVE events into the store", alone=measure_ingest),
    Group("alerts", "10 million alerts: questions and retention", alone=measure_alerts),
)
