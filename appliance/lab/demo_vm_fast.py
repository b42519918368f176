"""Step (f) of the demonstration with a VM: the nftables dialect, super-packets and the shortcut, on virtio."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from appliance.inspection.superpackets import USUAL_PACKET
from appliance.lab.demo_policies import LOG4SHELL, Attempt, build_documents
from appliance.lab.demo_probe import AnswerKind
from appliance.lab.demo_report import Check
from appliance.lab.demo_stage import Stage, wait_until
from appliance.lab.vm_lab import find_largest, read_metrics
from steering.run import Finished, run

BULK_BYTES = 20_000_000
BULK_SECONDS = 120
COUNTED_SECONDS = 60.0
"""An engine is asked for its counters now and then only."""
INSPECTED = ("web-1", "app-1")
LET_GO = ("web-2", "app-1")
POLICY = "web-2-bulk"
AFTER_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Transfer:
    """What came of a download; ``rate`` in bit/s."""

    status: int
    size: int
    rate: float

    def __str__(self) -> str:
        return f"{self.size / 1e6:.0f} MB at {self.rate / 1e6:.0f} Mbit/s"


def read_transfer(ended: Finished) -> Transfer:
    """From what curl was told to write: status, bytes, bytes a second."""
    found = re.fullmatch(r"(\d+) (\d+) (\d+(?:\.\d+)?)", ended.stdout.strip())
    if found is None:
        return Transfer(0, 0, 0.0)
    return Transfer(int(found[1]), int(found[2]), 8 * float(found[3]))


def render_shortcut_policy() -> str:
    """One more document: between two VMs, let go after a megabyte."""
    document = {
        "apiVersion": "hairpin/v1",
        "kind": "SteeringPolicy",
        "metadata": {"name": POLICY},
        "spec": {
            "priority": 200,
            "from": [{"vm": LET_GO[0]}],
            "to": [{"vm": LET_GO[1]}],
            "action": {
                "inspect": {
                    "profile": "prevent",
                    "onFailure": "closed",
                    "shortcut": {"after": "1MB", "maxFlows": 10},
                }
            },
        },
    }
    return yaml.safe_dump(document, sort_keys=False)


def download(stage: Stage, source: str, target: str) -> Transfer:
    argv = ["curl", "-q", "-sS", "--noproxy", "*", "-m", str(BULK_SECONDS), "-o", "/dev/null"]
    argv += ["-w", "%{http_code} %{size_download} %{speed_download}"]
    argv += [f"http://{stage.state.vm(target).address4}/bulk"]
    inside = stage.state.netns_argv(source, argv)
    return read_transfer(run(inside, timeout=BULK_SECONDS + 20.0, check=False))


def _read_largest(stage: Stage, above: int) -> int:
    """What the engine of the inspected lane took at most, in bytes; 0 unless it is more than ``above``."""
    largest = find_largest(read_metrics(stage.state)).get("prevent", 0)
    return largest if largest > above else 0


def _read_state(stage: Stage) -> str:
    """What the engine of the inspected lane says of super-packets: on, ready or off."""
    found = re.search(
        r'^hairpin_lane_super_packets\{lane="prevent",state="(\w+)"\} 1',
        read_metrics(stage.state),
        re.MULTILINE,
    )
    return "not told" if found is None else found[1]


def run_fast(stage: Stage) -> Iterator[Check]:
    """(f) What the engine is given, how large, and what the switch passes by itself."""
    stage.say("(f) a large download, inspected, and let go after a megabyte")
    bulk = stage.directory / INSPECTED[1] / "bulk"
    with bulk.open("wb") as file:
        file.truncate(BULK_BYTES)
    bulk.chmod(0o644)
    before = read_metrics(stage.state)
    dialects = re.findall(r'^hairpin_inspection_dialect\{dialect="(\w+)"\} 1', before, re.MULTILINE)
    yield Check(
        "f",
        "what sends frames to the engine",
        "nftables",
        ", ".join(dialects) or "not told",
        dialects == ["nftables"],
    )
    moved = download(stage, *INSPECTED)
    largest = wait_until(lambda: _read_largest(stage, USUAL_PACKET), COUNTED_SECONDS, 2.0)
    largest = largest or _read_largest(stage, 0)
    yield Check(
        "f",
        f"download, {' -> '.join(INSPECTED)}, inspected",
        "super-packets",
        f"{moved}; largest packet in the engine: {largest} bytes ({_read_state(stage)})",
        moved.status == 200 and moved.size == BULK_BYTES and largest > USUAL_PACKET,
    )
    file_path = stage.directory / "policies-bulk.yaml"
    documents = build_documents(stage.state.vms, with_added=True)
    file_path.write_text(f"{documents}---\n{render_shortcut_policy()}")
    stage.run_hairpin("policy", "apply", str(file_path))
    moved = download(stage, *LET_GO)

    def find_uninspected() -> int:
        accounts = stage.run_hairpin("shortcut", "list")["accounts"]
        return sum(one["bytes"] for one in accounts if one["policy"] == POLICY)

    passed = wait_until(find_uninspected, 15.0, 1.0)
    yield Check(
        "f",
        f"the same, {' -> '.join(LET_GO)}, shortcut after 1 MB",
        "most of it uninspected",
        f"{moved}; {passed / 1e6:.1f} MB passed by the switch alone",
        moved.status == 200 and moved.size == BULK_BYTES and passed > BULK_BYTES / 2,
    )
    attempt = Attempt(LOG4SHELL, *LET_GO, "IPv4")
    answer, seen = stage.try_it(attempt), stage.count_seen(attempt)
    yield Check(
        "f",
        f"{LOG4SHELL.name} on that pair, in a new connection",
        "blocked",
        f"{answer.text}; server saw {seen}",
        answer.kind is AnswerKind.SILENT and seen == 0,
    )
