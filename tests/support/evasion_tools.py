"""Attacks that try to slip past inspection on the wire, with real tools, against a running lab.

`standing_evasions` puts up policies, servers and receivers; `run_all` is everything as one list, for the
fault campaign. The pairs: web-1 to app-1 (inspected: tcp/80 only), web-1 to app-2 (inspected: all of
IP), and web-1 to db-1 (named by no policy: it shows which tricks a target takes at all).
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance import lab as the_lab
from steering.errors import HairpinError
from tests.support.appliance import Appliance, build_base, build_policy, inspect
from tests.support.evasion_modes import DATAGRAMS, FAMILIES, REQUESTS, is_delivered
from tests.support.lab import build_name, wait_until
from tests.support.rule_pipelines import write_feed

ROOT = Path(__file__).resolve().parents[2]
ATTACKER, ALL_IP, HTTP_ONLY, CONTROL = "web-1", "app-2", "app-1", "db-1"
TARGETS = (HTTP_ONLY, ALL_IP, CONTROL)

HOSTILE_HEADER = "User-Agent: () { :; }; /bin/bash -c id"  # Shellshock, of the starter rules
BENIGN_HEADER = "User-Agent: curl"
# A rule of our own, for carriers that the starter rules know no exploit for.
MARK, NO_MARK = "HAIRPIN-EVASION-MARK", "HAIRPIN-EVASION-NONE"
MARK_SID = 9104850


def build_overrides(directory: Path) -> dict[str, Any]:
    """Settings for a lab that is to be attacked: a source with our rule, in ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    for above in (directory, *directory.parents):
        if above.is_relative_to("/tmp") and above != Path("/tmp"):
            above.chmod(0o755)  # the service reads it as a user of its own
    text = (
        f'alert ip any any -> any any (msg:"evasion mark"; content:"{MARK}"; fast_pattern; '
        f"classtype:attempted-admin; sid:{MARK_SID}; rev:1; "
        "metadata:signature_severity Critical;)"
    )
    feed = write_feed(directory / "evasion.tar.gz", text)
    feed.chmod(0o644)
    return {"rules": {"sources": [{"name": "evasion", "url": feed.as_uri()}]}}


def check_rule(appliance: Appliance) -> None:
    """Raises HairpinError unless our rule drops in the lane that prevents."""
    found = appliance.read("rules", "show", "--sid", str(MARK_SID))["items"]
    if "prevent" not in {one["lane"] for one in found}:
        raise HairpinError(
            f"rule {MARK_SID} is not in force",
            "bring the lab up with overrides=build_overrides(...), then `hairpin rules update`",
        )


@dataclass
class Stage:
    """An appliance with everything up: the attacks run from web-1."""

    appliance: Appliance
    directory: Path

    def address(self, vm: str, family: int) -> str:
        return self.appliance.address(vm, family)

    def describe(self, target: str, family: int, **more: Any) -> str:
        """The argument of the attacker's programs."""
        lab = self.appliance.lab
        told = {
            "source": [lab.vm(ATTACKER).mac, self.address(ATTACKER, family)],
            "target": [lab.vm(target).mac, self.address(target, family)],
            "accomplices": [lab.vm(name).mac for name in ("db-2", ALL_IP, HTTP_ONLY)],
            "spoofed": self.address("db-2", family),
            **more,
        }
        return json.dumps(told)

    def run_program(self, program: str, told: str) -> Any:
        argv = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", f"tests.support.{program}", told]
        done = self.appliance.run(ATTACKER, *argv, timeout=180)
        assert done.status == 0, done.stderr
        return json.loads(done.stdout)

    def request(
        self, target: str, family: int, header: str, modes: Iterable[str]
    ) -> dict[str, bool | None]:
        """HTTP in these modes: whether the server got the request; None where it shook no hands."""
        told = self.describe(target, family, header=header, modes=list(modes))
        sent = self.run_program("attacker", told)
        seen = self.appliance.read_requests(target)
        return {
            mode: f"{path} " in seen if state == "sent" or f"{path} " in seen else None
            for mode, (state, path) in sent.items()
        }

    def send(self, target: str, family: int, mark: str, modes: Iterable[str]) -> dict[str, str]:
        """Datagrams in these modes: how far each came: "socket", "wire" or "" """
        told = self.describe(target, family, mark=mark, modes=list(modes))
        sent = self.run_program("attacker_datagrams", told)
        return {mode: self.find_arrival(target, token) for mode, token in sent.items()}

    def find_arrival(self, target: str, token: str) -> str:
        lines = self.read_arrivals(target)
        return next((word for word in ("socket", "wire") if f"{word} {token}" in lines), "")

    def read_arrivals(self, target: str) -> set[str]:
        return set((self.directory / f"arrivals-{target}").read_text().splitlines())


@contextlib.contextmanager
def standing_evasions(appliance: Appliance) -> Iterator[Stage]:
    """Policies, web servers and receivers; taken away at the end. Needs our rule in force."""
    check_rule(appliance)
    stage = Stage(appliance, appliance.directory)
    # The attacker's kernel knows nothing of its connections, and would reset them.
    quiet = ("OUTPUT", "-p", "tcp", "--tcp-flags", "RST", "RST", "-j", "DROP")
    for program in ("iptables", "ip6tables"):
        appliance.run(ATTACKER, program, "-A", *quiet)
    try:
        for vm in TARGETS:
            # TCP Fast Open without a cookie, for every listener: data in a SYN is taken.
            appliance.run(vm, "sysctl", "-qw", "net.ipv4.tcp_fastopen=1539")
            start_receiver(stage, vm)
        appliance.start_web(*TARGETS)
        http = [{"protocol": "tcp", "ports": [80]}]
        appliance.apply(
            [
                *build_base(appliance.lab),
                build_policy(
                    "evasion-http", ATTACKER, HTTP_ONLY, inspect("prevent"), services=http
                ),
                build_policy("evasion-all", ATTACKER, ALL_IP, inspect("prevent")),
            ]
        )
        assert wait_until(lambda: appliance.is_forwarding("prevent"))
        yield stage
    finally:
        for program in ("iptables", "ip6tables"):
            appliance.run(ATTACKER, program, "-D", *quiet)
        for vm in TARGETS:
            appliance.run(vm, "sysctl", "-qw", "net.ipv4.tcp_fastopen=1")
        appliance.stop_all()


def start_receiver(stage: Stage, vm: str) -> None:
    file = stage.directory / f"arrivals-{vm}"
    file.unlink(missing_ok=True)
    argv = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.support.receiver", str(file)]
    stage.appliance.start(vm, *argv, role=f"receiver-{vm}")
    assert wait_until(lambda: file.exists() and "ready" in file.read_text())


def find_delivered(stage: Stage, family: int) -> dict[str, bool]:
    """Every trick of these programs with an exploit in it: whether the inspected targets got it."""
    found: dict[str, bool] = {}
    for target in (HTTP_ONLY, ALL_IP):
        got = stage.request(target, family, HOSTILE_HEADER, REQUESTS[family])
        found |= {f"http {mode} to {target}": bool(arrived) for mode, arrived in got.items()}
    arrivals = stage.send(ALL_IP, family, MARK, DATAGRAMS[family])
    return found | {
        f"datagram {mode}": is_delivered(mode, arrival) for mode, arrival in arrivals.items()
    }


def run_all(appliance: Appliance) -> list[tuple[str, str, bool]]:
    """Every attack once: (name, "ipv4" or "ipv6", whether its target got it). Needs `build_overrides`.

    Takes about two minutes; afterwards the appliance has no policies. Raises HairpinError.
    """
    with standing_evasions(appliance) as stage:
        return [
            (name, f"ipv{family}", delivered)
            for family in FAMILIES
            for name, delivered in find_delivered(stage, family).items()
        ]


@contextlib.contextmanager
def standing_lab() -> Iterator[Appliance]:
    """The documented lab with our rule in force; down again at the end."""
    name = build_name("e")
    # Not pytest's own: each session that starts closes that to other users again.
    with tempfile.TemporaryDirectory(prefix="hairpin-evasions-") as directory:
        try:
            overrides = build_overrides(Path(directory) / "rules")
            appliance = Appliance(the_lab.bring_up(name, 6, overrides=overrides), Path(directory))
            done = appliance.cli("rules", "update", "--json", timeout=300)
            assert done.status == 0, done.stdout + done.stderr
            assert wait_until(lambda: appliance.is_forwarding("prevent"))
            yield appliance
        finally:
            the_lab.take_down(name)


class SharedLab:
    """One `standing_lab` for modules that follow each other; it comes up with the first of them."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._appliance: Appliance | None = None
        self._stages = 0

    @contextlib.contextmanager
    def open_stage(self) -> Iterator[Stage]:
        """`standing_evasions` with files of its own."""
        if self._appliance is None:
            self._appliance = self._stack.enter_context(standing_lab())
        self._stages += 1
        directory = self._appliance.directory / f"stage-{self._stages}"
        directory.mkdir(mode=0o755)
        with standing_evasions(Appliance(self._appliance.lab, directory)) as stage:
            yield stage

    def close(self) -> None:
        self._appliance = None
        self._stack.close()
