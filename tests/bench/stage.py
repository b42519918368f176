"""The bench's lab: one switch, one sender, and a VM behind each of the ways that are compared."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath

from appliance import lab as the_lab
from appliance.lab.demo_stage import read_tails
from appliance.lab.processes import read_tail
from steering.run import run
from tests.bench.peers import Peers, build_peer_rules, count_rules, standing
from tests.bench.rows import Path
from tests.bench.traffic import PORTS, SOURCE, BenchError, Idle, measure_idle, start_servers
from tests.support.appliance import Appliance, build_base, build_policy, inspect
from tests.support.lab import wait_until

SHARED = FilePath(os.environ.get("HAIRPIN_SHARED", FilePath(__file__).parents[3] / "shared"))
FEED = SHARED / "data/rules/emerging.rules.tar.gz"
TARGETS = {
    Path.HAIRPIN: "app-1",
    Path.DIRECT: "db-1",
    Path.STOCK: "web-2",
    Path.AF_PACKET: "app-2",
}
SHORTCUT_TARGET = "db-2"


class Stage:
    """A lab with the product and both peers. Loading gives all three engines the same rules."""

    def __init__(self, appliance: Appliance, peers: Peers, say: Callable[[str], None]) -> None:
        self.appliance = appliance
        self.peers = peers
        self.say = say
        self.idle = Idle(0.0)
        self.rules = 0

    def load_starter(self) -> None:
        """The starter rules, which the product has in force from its start."""
        self._load_peers()

    def load_feed(self) -> None:
        """The starter rules and the whole feed."""
        self.say("loading the feed into the product")
        done = self.appliance.cli("rules", "update", "--json", timeout=200)
        if done.status != 0:
            raise BenchError(
                f"rules update: {done.stderr[-300:]} {done.stdout}\n{self._read_ends()}"
            )
        self._load_peers()

    def _read_ends(self) -> str:
        """What the product's processes and engines wrote last: the lab with their logs is taken down."""
        lab = self.appliance.lab
        engines = sorted(lab.settings.run_dir.glob("lanes/*/engine.log"))
        ends = [f"--- the end of {log}\n{read_tail(log, 40)}" for log in engines]
        return "\n".join([read_tails(lab), *ends])

    def check_engine(self, path: Path) -> None:
        """Raises BenchError when a peer's engine is no more: no figure of that path says anything then."""
        for one, peer in zip((Path.STOCK, Path.AF_PACKET), self.peers, strict=True):
            if one is path and (status := peer.find_end()) is not None:
                raise BenchError(f"{path}: the engine ended by itself, status {status}")

    def _load_peers(self) -> None:
        settings = self.appliance.lab.settings
        text = settings.ruleset(settings.build_lanes()[0]).read_text()
        self.rules = count_rules(text)
        theirs = build_peer_rules(text)
        for peer in self.peers:
            self.say(f"loading {count_rules(theirs)} rules into {type(peer).__name__}")
            peer.load(theirs)
        if not wait_until(lambda: self.appliance.is_forwarding("prevent"), 60):
            raise BenchError("the lane does not come up")
        self.idle = measure_idle()


@contextlib.contextmanager
def open_stage(say: Callable[[str], None], *, feed: bool) -> Iterator[Stage]:
    """The stage with the starter rules; with ``feed`` the feed's are a source of the next update."""
    directory = FilePath(tempfile.mkdtemp(prefix="hairpin-bench-"))
    directory.chmod(0o755)
    name = f"be{os.getpid()}"
    overrides = {}
    if feed:
        copied = directory / FEED.name
        shutil.copyfile(FEED, copied)
        copied.chmod(0o644)
        overrides["rules"] = {"sources": [{"name": "feed", "url": copied.as_uri()}]}
    try:
        say("bringing up the lab")
        lab = the_lab.bring_up(name, 6, overrides=overrides)
        appliance = Appliance(lab, directory / "servers")
        # Flow records cost both ways the same and more than either: a mirror is one more frame out for each.
        run(lab.vsctl_argv(["clear", "Bridge", "br-int", "mirrors"]))
        for vm in (SOURCE, *TARGETS.values(), SHORTCUT_TARGET):
            run(lab.netns_argv(vm, ["sysctl", "-q", "-w", *PORTS]))
        start_servers(appliance, *TARGETS.values(), SHORTCUT_TARGET)
        policy = build_policy("bench", SOURCE, TARGETS[Path.HAIRPIN], inspect("prevent"))
        action = inspect("prevent")
        action["inspect"]["shortcut"] = {"after": "1MB", "maxFlows": 1_000}
        shortcut = build_policy("bench-shortcut", SOURCE, SHORTCUT_TARGET, action)
        appliance.apply([*build_base(lab), policy, shortcut])
        targets = (TARGETS[Path.STOCK], TARGETS[Path.AF_PACKET])
        with standing(lab, directory / "peers", SOURCE, targets) as peers:
            stage = Stage(appliance, peers, say)
            stage.load_starter()
            yield stage
    finally:
        the_lab.take_down(name)
        shutil.rmtree(directory, ignore_errors=True)
