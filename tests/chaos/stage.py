"""The lab that faults are injected into, with its policies, its traffic and its clocks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from appliance import lab as the_lab
from appliance.inspection.publish import read_inspection_state
from appliance.lab import processes
from appliance.lab.plan import ROOT
from appliance.rules.shortcut import build_shortcut_rules
from steering.errors import HairpinError
from steering.run import Finished, run
from tests.chaos import traffic
from tests.chaos.meter import (
    BENIGN,
    COUNTED,
    HOSTILE,
    Tally,
    Traffic,
    compare_numbers,
    cut_start,
    parse_streams,
)
from tests.support.appliance import Appliance, build_base, build_policy, inspect
from tests.support.lab import find_stale, wait_until

LOGS = Path(__file__).resolve().parents[2] / "build/chaos-logs"
SENDER = "web-1"
TARGETS = {"closed": "app-1", "open": "app-2", "direct": "db-1"}
"""Mode -> the VM that `web-1` speaks with; `direct` is steered by no policy: the machine's own noise."""
MODES = ("closed", "open")

HOSTILE_TEXT, COUNTED_TEXT, TCP_TEXT = "HOSTILE-CHAOS", "COUNTED-CHAOS", "TCP-CHAOS"
HOSTILE_SID, COUNTED_SID, TCP_SID = 4870001, 4870002, 4870003
# The lane that prevents drops by what suricata/update/prevent says: class, severity.
DROPPED = "classtype:attempted-admin; metadata:signature_severity Critical"
# The threshold holds the alerts down and not the drops (Suricata: a limited rule still acts).
RULES = f"""\
drop udp any any -> any any (msg:"chaos hostile"; content:"{HOSTILE_TEXT}"; {DROPPED}; \
threshold:type limit, track by_src, count 1, seconds 600; sid:{HOSTILE_SID}; rev:1;)
drop udp any any -> any any (msg:"chaos counted"; content:"{COUNTED_TEXT}"; {DROPPED}; \
sid:{COUNTED_SID}; rev:1;)
drop tcp any any -> any any (msg:"chaos tcp"; content:"{TCP_TEXT}"; {DROPPED}; sid:{TCP_SID}; rev:1;)
"""
EVE_LIMIT_BYTES = 3 * 2**20
ROLES = ("inspect", "serve", "observe")
PORTS = {BENIGN: 6001, HOSTILE: 6002, COUNTED: 6003}
RATE = 200
DRAIN_SECONDS = 1.0
LANE_EDGE = 0.3  # BFD needs as long to see a lane go, and the group to take it back


class Failed(Exception):
    """What a row needs did not come; the row can't be measured. Its text says what."""


def expect(holds: object, what: str) -> None:
    """Raises Failed unless it holds."""
    if not holds:
        raise Failed(what)


def build_policies(lab: the_lab.LabState) -> list[dict[str, Any]]:
    return [
        *build_base(lab),
        build_policy("closed", SENDER, TARGETS["closed"], inspect("prevent", "closed")),
        build_policy("open", SENDER, TARGETS["open"], inspect("prevent", "open")),
    ]


def parse_number(payload: str) -> int:
    """The number of a packet of `traffic.py`, from its payload; -1 when it has none."""
    found = re.match(r"\S+ (\d+) ", payload)
    return int(found[1]) if found else -1


def take_down_stale() -> None:
    """The labs of campaigns that were killed."""
    names = sorted(os.listdir(ROOT)) if ROOT.exists() else []
    renamed = [f"t{name[2:]}" for name in names if re.fullmatch(r"ch\d+[a-z]?", name)]
    for name in find_stale(renamed, lambda pid: Path(f"/proc/{pid}").exists()):
        the_lab.take_down(f"ch{name[1:]}")


class Stage:
    """One lab for many rows. ``say`` takes a line of progress."""

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        suffix: str = "",
        overrides: dict[str, Any] | None = None,
        before_serve: Callable[[the_lab.LabState], None] | None = None,
    ) -> None:
        self.say = say
        self.name = f"ch{os.getpid()}{suffix}"
        self.directory = Path(tempfile.mkdtemp(prefix="hairpin-chaos-"))
        self.directory.chmod(0o755)
        self.rules = self.directory / "chaos.rules"
        self.rules.write_text(RULES)
        self._overrides = overrides or {}
        self._before_serve = before_serve
        self.appliance: Appliance
        self.floor = 1

    # Its life

    def open(self) -> None:
        """Bring the lab up, with the chaos rules in force and the policies applied."""
        sources = [{"name": "chaos", "url": self.rules.as_uri()}]
        overrides: dict[str, Any] = {
            "rules": {"sources": sources},
            "inspection": {"eveLimitBytes": EVE_LIMIT_BYTES},
            **self._overrides,
        }
        lab = the_lab.bring_up(self.name, serve=False, overrides=overrides)
        if self._before_serve is not None:
            self._before_serve(lab)
        for role in ROLES:
            lab = the_lab.start_service(lab, role)
        self.appliance = Appliance(lab, self.directory / "servers")
        expect(wait_until(self.appliance.is_ready, 30), "the API did not come up")
        self.appliance.apply(build_policies(lab))
        self._raise_floor()
        self.update_rules()
        self.wait_ok()

    def close(self) -> None:
        """Take the lab down; its logs are kept, below `build/`, until the next campaign."""
        with contextlib.suppress(OSError):
            logs = ROOT / self.name
            kept = LOGS / time.strftime("%H%M%S")
            shutil.copytree(logs / "log", kept, dirs_exist_ok=True)
            for log in logs.glob("run/lanes/*/engine.log"):
                shutil.copy(log, kept / f"engine-{log.parent.name}.log")
        the_lab.take_down(self.name)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _raise_floor(self) -> None:
        """Make the floor one more than the rules without ours, so that a lane without them is below."""
        expect(wait_until(lambda: self.read_rules() > 0, 40), "the engine has no rules")
        self.floor = self.read_rules() + 1
        settings = yaml.safe_load(self.lab.settings_file.read_text())
        # The floor is about the sources' rules; the engine counts those of shortcuts, too.
        settings["rules"]["floor"] = self.floor - len(build_shortcut_rules(by_rule=False))
        self.lab.settings_file.write_text(yaml.safe_dump(settings, sort_keys=False))
        self.kill("serve")
        self.start("serve")
        expect(wait_until(self.appliance.is_ready, 30), "serve did not come up with the floor")

    def read_rules(self, lane: str = "prevent") -> int:
        """The rules of the lane's engine as `hairpin inspect` tells; 0 when none runs."""
        state = read_inspection_state(self.lab.run_dir / "inspection.json")
        lanes = state.lanes if state is not None else ()
        found = next((one for one in lanes if one.name == lane), None)
        return found.rules_loaded if found is not None and found.inspecting else 0

    @property
    def lab(self) -> the_lab.LabState:
        return self.appliance.lab

    def refresh(self) -> the_lab.LabState:
        """The lab's present state, after something else changed it."""
        self.appliance.lab = the_lab.read_lab(self.name)
        return self.appliance.lab

    def update_rules(self) -> dict[str, Any]:
        """`hairpin rules update`, and wait until the engine has the chaos rules."""
        done = self.appliance.cli("rules", "update", "--json", timeout=120)
        expect(done.status == 0, f"rules update: {done.stderr[-300:]} {done.stdout[-300:]}")
        found = self.appliance.read("rules", "show", "--sid", str(HOSTILE_SID))["items"]
        expect(found, "the chaos rules are not in force")
        document: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
        return document

    def read_health(self) -> str:
        """`ok`, `degraded`, `failing`, or "" when nobody answers."""
        try:
            answer = self.appliance.api("/health")
        except OSError:
            return ""
        return str(answer.document["status"]) if answer.document else ""

    def wait_ok(self, seconds: float = 45.0) -> None:
        if not wait_until(lambda: self.read_health() == "ok", seconds):
            shown: object = "nobody answers"
            with contextlib.suppress(OSError):
                problems = self.appliance.api("/health").document["problems"]
                shown = "; ".join(one["reason"] for one in problems)
            raise Failed(f"health is not ok after {seconds:.0f} s: {shown}")

    def recover(self) -> None:
        """Everything runs again and is healthy; raises Failed when the lab has to be made anew."""
        lab = self.refresh()
        for record in lab.processes:
            if record.role in ROLES and not processes.is_running(record.pid, record.started):
                self.appliance.lab = the_lab.start_service(self.refresh(), record.role)
        self.wait_ok()

    # Faults

    def kill(self, role: str, number: int = signal.SIGKILL) -> float:
        """Signal a process of the lab; the moment it was sent."""
        struck = time.monotonic()
        the_lab.kill_process(self.lab, role, number)
        return struck

    def start(self, role: str) -> None:
        """Start one of Hairpin's processes again."""
        self.appliance.lab = the_lab.start_service(self.refresh(), role)

    def run_in(self, namespace: str, *argv: str, check: bool = True) -> Finished:
        """A command in one of the lab's namespaces (its full name)."""
        return run(["ip", "netns", "exec", namespace, *argv], check=check)

    def is_forwarding(self) -> bool:
        """Whether BFD passes through both legs of the lane that prevents."""
        argv = ["-f", "json", "--columns=name,bfd_status", "list", "Interface"]
        shown = run(self.lab.vsctl_argv(argv), check=False).stdout
        lane = self.lab.lanes[0]
        found = {}
        with contextlib.suppress(ValueError):
            for name, (_, status) in json.loads(shown)["data"]:
                found[name] = dict(status).get("forwarding") == "true"
        return found.get(lane.leg_a, False) and found.get(lane.leg_b, False)

    def wait_forwarding(self, seconds: float = 30.0) -> float:
        """The moment from which BFD passes again. Raises Failed."""
        expect(wait_until(self.is_forwarding, seconds), "BFD does not pass through the lane again")
        return time.monotonic()

    def find_events(self, kind: str, since: float, subject: str = "") -> list[dict[str, Any]]:
        """Events of that kind after ``since`` (monotonic), oldest first."""
        found = self.appliance.find_events(kind, since - time.monotonic() + time.time())
        return [one for one in reversed(found) if subject in one["subject"]]

    def count_told(self, struck: float, lane: str = "prevent") -> int | None:
        """Packets that passed uninspected since ``struck``, by the lane's events; None: not told."""
        told = [
            one["details"]["packets"]
            for one in self.find_events("lane.down", struck - 0.5, f"lane {lane}")
            if "packets" in one["details"]
        ]
        # What was counted when no failure was known is told by itself.
        late = self.find_events("lane.bypassed", struck - 0.5, f"lane {lane}")
        return sum(told) + sum(one["details"]["packets"] for one in late) if told else None

    def wait_told(self, struck: float, seen: int, edge: int) -> int | None:
        """As `count_told`; waits for the switch's last word, which comes late."""

        def agrees() -> bool:
            told = self.count_told(struck)
            return told is not None and abs(told - seen) <= edge

        wait_until(agrees, 8)
        return self.count_told(struck)

    def find_down(self, since: float, lane: str = "prevent") -> list[tuple[float, float]]:
        """From when to when (monotonic) the lane was down, by its events since then."""
        offset = time.monotonic() - time.time()
        found = []
        for event in self.find_events("lane.down", since, f"lane {lane}"):
            begun = datetime.fromisoformat(event["time"]).timestamp()
            ended = event["details"].get("endedAt")
            until = datetime.fromisoformat(ended).timestamp() if ended else time.time()
            found.append((begun + offset, until + offset))
        return found

    def find_detected(self, kind: str, struck: float, subject: str = "") -> float | None:
        """Seconds from ``struck`` to the first event of that kind; None when there is none."""
        events = self.find_events(kind, struck - 0.5, subject)
        if not events:
            return None
        at = datetime.fromisoformat(events[0]["time"]).timestamp()
        return round(at - (struck - time.monotonic() + time.time()), 3)

    def read_alerts(self, sid: int, after: int) -> list[dict[str, Any]]:
        """Every stored alert of a signature with an id above ``after``, oldest first."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            page = self.appliance.api(f"/alerts?limit=1000&sid={sid}{cursor}").document
            found += [one for one in page["items"] if one["id"] > after]
            if not page["next"] or (page["items"] and page["items"][-1]["id"] <= after):
                return found[::-1]
            cursor = f"&cursor={page['next']}"

    def wait_counted(self, traffic: Traffic, after: int, seconds: float = 30.0) -> Tally:
        """The counted packets compared with the alerts stored since ``after``; waits for them."""
        expected = {
            n for one in traffic.streams if one.kind == COUNTED for n in range(len(one.sent))
        }
        found: list[int] = []

        def are_there() -> bool:
            alerts = self.read_alerts(COUNTED_SID, after)
            found[:] = [parse_number(alert["payload"]) for alert in alerts]
            return expected <= set(found)

        wait_until(are_there, seconds)
        time.sleep(1.0)  # what is stored twice comes twice
        are_there()
        return compare_numbers(expected, found)

    def wait_switch(self, wanted: object, since: float, seconds: float = 20.0) -> float:
        """Seconds from ``since`` until our flows and groups are as wanted. Raises Failed."""

        def is_there() -> bool:
            try:
                return self.appliance.read_switch() == wanted
            except HairpinError:
                return False

        expect(wait_until(is_there, seconds), "the flows are not as they were")
        return time.monotonic() - since

    # Traffic

    @contextlib.contextmanager
    def traffic(
        self,
        *,
        rate: int = RATE,
        modes: Sequence[str] = (*MODES, "direct"),
        settle: float = 1.0,
        counted: int = 0,
    ) -> Iterator[Meter]:
        """Streams in both directions of each pair meanwhile; afterwards `Meter.traffic` tells.

        ``counted``: packets/s of one more stream, each packet of which should make an alert.
        """
        meter = Meter(self, rate, modes, counted)
        meter.start()
        try:
            meter.wait_flowing()
            time.sleep(settle)
            yield meter
        finally:
            meter.end()


class Meter:
    """The streams of one measurement: started, ended, and read."""

    def __init__(self, stage: Stage, rate: int, modes: Sequence[str], counted: int = 0) -> None:
        self.stage = stage
        self.plan: dict[str, tuple[str, str]] = {}
        self._directory = Path(tempfile.mkdtemp(dir=stage.directory))
        self._told: dict[str, dict[str, Any]] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self.traffic: Traffic
        self.began = 0.0
        for mode in modes:
            kinds = (BENIGN,) if mode == "direct" else (BENIGN, HOSTILE)
            for kind in kinds:
                ends = (SENDER, TARGETS[mode])
                for source, target in (ends, ends[::-1]):
                    self._add(mode, kind, source, target, 4, rate)
                if mode != "direct":
                    self._add(mode, kind, SENDER, TARGETS[mode], 6, rate // 4)

        if counted:
            self._add("closed", COUNTED, SENDER, TARGETS["closed"], 4, counted)

    def _add(self, mode: str, kind: str, source: str, target: str, family: int, rate: int) -> None:
        name = f"{mode}/{kind}/{source}/{target}/{family}"
        self.plan[name] = (mode, kind)
        port = PORTS[kind] + 10 * (list(TARGETS).index(mode))
        for vm in (source, target):
            told = self._told.setdefault(
                vm,
                {
                    "out": str(self._directory / f"{vm}.json"),
                    "drain": DRAIN_SECONDS,
                    "streams": [],
                    "ports": [],
                },
            )
            if [family, port] not in told["ports"]:
                told["ports"].append([family, port])
        texts = {HOSTILE: HOSTILE_TEXT, COUNTED: COUNTED_TEXT}
        text = texts.get(kind, "just a benign datagram of some length")
        self._told[source]["streams"].append(
            {
                "name": name,
                "port": port,
                "family": family,
                "peer": self.stage.appliance.address(target, family),
                "rate": rate,
                "text": text,
            }
        )

    def start(self) -> None:
        # The receivers first: what comes to a closed port is lost, and answered by ICMP.
        for vm in sorted(self._told, key=lambda vm: vm == SENDER):
            argv = [sys.executable, "-S", traffic.__file__, json.dumps(self._told[vm])]
            self._children.append(subprocess.Popen(self.stage.lab.netns_argv(vm, argv)))

    def wait_flowing(self) -> None:
        for child in self._children:
            expect(child.poll() is None, f"a sender ended with {child.poll()}")
        time.sleep(0.7)
        self.began = time.monotonic()

    def end(self) -> None:
        for child in self._children:
            child.terminate()
        documents = []
        for child in self._children:
            try:
                child.wait(DRAIN_SECONDS + 20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for vm in self._told:
            path = self._directory / f"{vm}.json"
            expect(path.exists(), f"the meter in {vm} told nothing")
            documents.append(json.loads(path.read_text()))
        streams = parse_streams(documents, self.plan)
        # The first packets meet receivers that still start, and addresses not yet resolved.
        last = min(one.sent[-1] for one in streams if one.sent)
        self.traffic = cut_start(Traffic(streams, self.began, last))


class EngineWatch:
    """Reads an engine's log meanwhile, to know when the next engine inspects."""

    STARTED = b"Engine started"

    def __init__(self, stage: Stage, profile: str = "prevent") -> None:
        self._log = stage.lab.run_dir / "lanes" / profile / "engine.log"
        self._seen = self._log.read_bytes().count(self.STARTED)

    def wait_started(self, seconds: float = 30.0) -> float:
        """The moment (monotonic, to 10 ms) at which another engine said so. Raises Failed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if self._log.read_bytes().count(self.STARTED) > self._seen:
                    return time.monotonic()
            time.sleep(0.01)
        raise Failed("no engine started again")


def build_stage_error(fault: BaseException) -> str:
    """What to write in a row that could not be measured."""
    if isinstance(fault, HairpinError):
        return f"{fault.reason} ({fault.mend})" if fault.mend else fault.reason
    return f"{type(fault).__name__}: {fault}"
