"""What is known of the installed engine: version and matcher; the commands that start and test it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from appliance.inspection.config import VERSION_FLOOR
from steering.errors import HairpinError
from steering.model import Lane
from steering.run import run_async


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """The installed engine. `version` is (major, minor, patch), `text` as it names itself."""

    version: tuple[int, int, int]
    text: str
    nfqueue: bool
    hyperscan_built: bool
    hyperscan_runs: bool

    @property
    def hyperscan(self) -> bool:
        return self.hyperscan_built and self.hyperscan_runs


def parse_engine_facts(build_info: str, cpu_info: str) -> EngineFacts:
    """From `suricata --build-info` and /proc/cpuinfo. Raises HairpinError when there is no version.

    Hyperscan needs a processor with SSSE3 (Hyperscan Developer's Reference, "Getting Started").
    """
    found = re.search(r"Suricata version ((\d+)\.(\d+)\.(\d+)\S*)", build_info)
    if found is None:
        raise HairpinError("`suricata --build-info` names no version", "install Suricata 7")
    flags = re.search(r"^flags\s*:(.*)$", cpu_info, re.MULTILINE)
    features = re.search(r"^Features:(.*)$", build_info, re.MULTILINE)
    return EngineFacts(
        version=(int(found[2]), int(found[3]), int(found[4])),
        text=found[1],
        nfqueue="NFQ" in (features[1].split() if features else ()),
        hyperscan_built=re.search(r"^\s*Hyperscan support:\s*yes", build_info, re.MULTILINE)
        is not None,
        hyperscan_runs=flags is not None and "ssse3" in flags[1].split(),
    )


def check_engine_facts(
    facts: EngineFacts, *, require_hyperscan: bool
) -> tuple[tuple[str, str], ...]:
    """What forbids this engine, each as (reason, mend); empty when it will do."""
    faults: list[tuple[str, str]] = []
    if facts.version < VERSION_FLOOR:
        floor = ".".join(map(str, VERSION_FLOOR))
        faults.append((f"Suricata {facts.text} is older than {floor}", f"install {floor} or later"))
    if not facts.nfqueue:
        faults.append(("this Suricata was built without NFQUEUE", "install one built with NFQ"))
    if require_hyperscan and not facts.hyperscan_built:
        faults.append(
            (
                "this Suricata was built without Hyperscan",
                "install one with it, or unset requireHyperscan",
            )
        )
    elif require_hyperscan and not facts.hyperscan_runs:
        faults.append(
            (
                "the processor shows no SSSE3, so Hyperscan can't run",
                "give the VM a CPU model with SSSE3, or unset requireHyperscan",
            )
        )
    return tuple(faults)


def find_matcher_fault(log: str) -> str | None:
    """The line of an engine's log in which it gave up Hyperscan, if it did."""
    for line in log.splitlines():
        lowered = line.lower()
        if ("hyperscan" in lowered or "mpm-algo" in lowered) and (
            "fall" in lowered or "not support" in lowered or "unavailable" in lowered
        ):
            return line.strip()[:300]
    return None


def render_urgency(nice: int) -> tuple[str, ...]:
    """What comes before a command to make it urgent, before privileges are given up.

    Where that is not allowed, nice(1) says so and goes on.
    """
    return ("nice", "-n", str(nice)) if nice else ()


def render_privileges(user: str) -> tuple[str, ...]:
    """The start of a command that runs as `user` with CAP_NET_ADMIN alone, and never more (setpriv(1)).

    Binding a queue and answering for its packets need CAP_NET_ADMIN (nfnetlink_queue); nothing else
    the engine does here needs a capability.
    """
    return (
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        "--init-groups",
        "--inh-caps=-all,+net_admin",
        "--ambient-caps=-all,+net_admin",
        "--bounding-set=-all,+net_admin",
        "--no-new-privs",
        "--",
    )


def render_start(
    binary: Path,
    user: str,
    lane: Lane,
    config: Path,
    library: Path | None = None,
    *,
    super_packets: bool = True,
    shortcut: Path | None = None,
) -> tuple[str, ...]:
    """The command of a lane's engine: one `-q` for each of its queues; ``library`` is preloaded.

    It takes super-packets if ``super_packets``; ``shortcut`` is the state file by which it lets connections go.

    ld.so(8) ignores LD_PRELOAD where a program gains privileges as it starts. Ambient capabilities are
    none of those, so the engine has it.
    """
    queues = tuple(part for queue in lane.queues for part in ("-q", str(queue)))
    preload: tuple[str, ...] = ()
    if library is not None:
        preload = ("env", f"LD_PRELOAD={library}")
        preload += () if super_packets else ("HAIRPIN_NO_SUPER_PACKETS=1",)
        preload += () if shortcut is None else (f"HAIRPIN_SHORTCUT={shortcut}",)
    return (*render_privileges(user), *preload, str(binary), "-c", str(config), "-v", *queues)


def render_test(binary: Path, user: str, config: Path, scratch: Path) -> tuple[str, ...]:
    """The command that tests configuration and rules; `scratch` takes what it would log."""
    return (
        *render_privileges(user),
        str(binary),
        "-T",
        "-c",
        str(config),
        "-v",
        "-l",
        str(scratch),
    )


@dataclass(frozen=True, slots=True)
class TestReport:
    """What `suricata -T` said. `passed` needs a status of 0 and at least one rule."""

    status: int
    rules_loaded: int
    rules_failed: int
    complaint: str

    @property
    def passed(self) -> bool:
        return self.status == 0 and self.rules_loaded > 0


def parse_test(status: int, output: str) -> TestReport:
    """From the status and the whole output of `suricata -T -v`."""
    found = re.search(r"(\d+) rules successfully loaded, (\d+) rules failed", output)
    complaints = [line for line in output.splitlines() if re.match(r"(Error|E):", line.strip())]
    return TestReport(
        status=status,
        rules_loaded=int(found[1]) if found else 0,
        rules_failed=int(found[2]) if found else 0,
        complaint="; ".join(complaints[:3])[:600] or output.strip()[-300:],
    )


async def read_engine_facts(binary: Path) -> EngineFacts:
    """Ask the installed engine. Raises CommandFailed when it can't be run."""
    asked = await run_async([str(binary), "--build-info"], timeout=20.0)
    return parse_engine_facts(asked.stdout, Path("/proc/cpuinfo").read_text())
