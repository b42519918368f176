"""Reading what the demonstration's tools print: answers of curl and redis-cli, packets of tcpdump.

No I/O. Times are seconds since the epoch, all of one clock: the VMs are namespaces of one machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from steering.run import Finished

_ECHO = re.compile(r"^(\d+\.\d+) IP6? .* echo request, id \d+, seq (\d+),", re.MULTILINE)


class AnswerKind(StrEnum):
    ANSWERED = "answered"
    SILENT = "silent"  # connected (as far as the tool tells), and then nothing came back
    UNREACHED = "unreached"  # not even a connection
    FAILED = "failed"  # anything else: the check itself is broken


@dataclass(frozen=True, slots=True)
class Answer:
    """What whoever made a request got to see of it."""

    kind: AnswerKind
    text: str

    @property
    def is_200(self) -> bool:
        return self.kind is AnswerKind.ANSWERED and self.text == "HTTP 200"


def read_curl(ended: Finished) -> Answer:
    """From curl's exit status (curl(1): 28 is a timeout, 7 no connection) and what -w printed."""
    code, _, connected = ended.stdout.strip().partition(" ")
    if ended.status == 0 and code != "000":
        return Answer(AnswerKind.ANSWERED, f"HTTP {code}")
    if ended.status in (7, 28) and (not connected or float(connected) == 0):
        return Answer(AnswerKind.UNREACHED, "no connection")
    if ended.status == 28:
        return Answer(AnswerKind.SILENT, "no answer")
    return Answer(AnswerKind.FAILED, f"curl: {ended.status} {ended.stderr.strip()[-80:]}")


def read_redis(ended: Finished) -> Answer:
    """From redis-cli under timeout(1), which exits with 124 when the time is over."""
    text = " ".join((ended.stdout or ended.stderr).split())
    if ended.status == 124:
        return Answer(AnswerKind.SILENT, "no answer")
    if "Could not connect" in text:
        return Answer(AnswerKind.UNREACHED, "no connection")
    if text:
        word = "an error" if "ERR" in text else "a reply"
        return Answer(AnswerKind.ANSWERED, f"{word} of Redis")
    return Answer(AnswerKind.FAILED, f"redis-cli: {ended.status}")


def parse_capture(text: str) -> dict[int, float]:
    """Sequence number to time of the echo requests that `tcpdump -tt -n` printed."""
    return {int(seq): float(at) for at, seq in _ECHO.findall(text)}


def find_passed(
    sent: Mapping[int, float], arrived: Mapping[int, float], begin: float, end: float
) -> list[int]:
    """Those sent from ``begin`` to ``end`` that had arrived by ``end``, in their order."""
    return sorted(
        seq
        for seq, at in sent.items()
        if begin <= at <= end and arrived.get(seq, float("inf")) <= end
    )


def count_sent(sent: Mapping[int, float], begin: float, end: float) -> int:
    return sum(begin <= at <= end for at in sent.values())


def find_first_arrival(
    sent: Mapping[int, float], arrived: Mapping[int, float], sent_after: float
) -> float | None:
    """When the first packet arrived of those sent at ``sent_after`` or later; None for none yet."""
    times = [arrived[seq] for seq, at in sent.items() if at >= sent_after and seq in arrived]
    return min(times, default=None)
