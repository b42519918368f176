"""The door to `ofproto/trace`: where would the switch, as it is now, send a packet.

vswitchd's control socket speaks JSON-RPC 1.0 (ovs-appctl(8)). One connection serves many traces: 0.8 ms
each, against 5 ms by a process of its own. The framing is done here with the standard library's JSON,
since the one in the `ovs` package costs 2 ms of this process's time per answer; what is in the answer is
taken apart by the package's own parser of datapath actions.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import structlog
from ovs.flow.kv import KVParser
from ovs.flow.odp import ODPFlow

from steering.errors import SwitchError
from steering.ledger import GroupUse, Output, Seen
from steering.witnesses import TraceRequest

log = structlog.get_logger("trace")

LONGEST_ANSWER = 1 << 20  # bytes; a trace of ours is about 3 kB
SECONDS = 5.0  # an answer takes less than 1 ms; vswitchd may be busy with a large bundle
LONGEST_PATH = 40

# Datapath port -> (bridge, ofport, name); ofport 0 where the port has none (a patch port).
PortMap = Mapping[int, tuple[str, int, str]]


def find_socket(path: Path) -> Path:
    """The control socket that ``path`` names, or a pid file beside which it lies.

    By default its name holds the pid, `ovs-vswitchd.PID.ctl`, so it changes with every start
    (ovs-vswitchd(8), --unixctl). Raises OSError, ValueError.
    """
    if path.suffix != ".pid":
        return path
    with path.open(encoding="ascii") as stream:
        pid = int(stream.read(32))
    return path.with_name(f"{path.stem}.{pid}.ctl")


class ControlSocket:
    """One connection to vswitchd's control socket; blocks, so it belongs in a thread.

    Every failure is a SwitchError; after one the connection is closed and the next call opens another.
    """

    def __init__(self, path: Path, *, seconds: float = SECONDS) -> None:
        self._path = path
        self._seconds = seconds
        self._socket: socket.socket | None = None
        self._number = 0

    def __enter__(self) -> ControlSocket:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _fault: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def call(self, command: str, arguments: list[str]) -> str:
        """What `ovs-appctl COMMAND ARGUMENTS` prints. Raises SwitchError."""
        log.debug("call", command=command, arguments=arguments)
        self._number += 1
        try:
            answer = self._ask({"id": self._number, "method": command, "params": arguments})
        except (OSError, ValueError) as fault:
            self.close()
            raise SwitchError(
                f"ovs-vswitchd at {self._path} did not answer {command}: {fault}",
                "check that it runs and that this user may open its control socket",
            ) from fault
        error, result = answer.get("error"), answer.get("result")
        if error is not None or not isinstance(result, str):
            raise SwitchError(f"ovs-vswitchd refused {command}: {str(error).strip()[:500]}")
        return result

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + self._seconds
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(self._seconds)
            self._socket.connect(str(find_socket(self._path)))
        self._socket.sendall(json.dumps(request).encode())
        received = bytearray()
        while len(received) <= LONGEST_ANSWER:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise ConnectionError("it closed the connection")
            received += piece
            if not received.endswith(b"}"):
                continue
            try:
                answer = json.loads(received)
            except ValueError:
                continue  # the brace stood inside
            if not isinstance(answer, dict) or answer.get("id") != request["id"]:
                raise ValueError(f"an answer to something else: {received[:200]!r}")
            return answer
        raise ValueError(f"an answer of more than {LONGEST_ANSWER} bytes")

    def read_ports(self) -> PortMap:
        """The datapath's ports. Raises SwitchError."""
        return parse_ports(self.call("dpif/show", []))

    def trace(self, request: TraceRequest, ports: PortMap) -> Seen:
        """Where the packet would go. Raises SwitchError."""
        return parse_trace(self.call("ofproto/trace", request.arguments), request.bridge, ports)


_BRIDGE = re.compile(r"^  (\S[^:]*):$")
_PORT = re.compile(r"^    (\S+) (\d+|none)/(\d+|none): ")


def parse_ports(text: str) -> PortMap:
    """The output of `dpif/show`, which is indented by bridge; ports come as `NAME OFPORT/DATAPATH:`."""
    bridge = ""
    found: dict[int, tuple[str, int, str]] = {}
    for line in text.splitlines():
        if match := _BRIDGE.match(line):
            bridge = match[1]
        elif (match := _PORT.match(line)) and match[3] != "none":
            found[int(match[3])] = (bridge, int(match[2]) if match[2].isdecimal() else 0, match[1])
    return found


_RULE = re.compile(r"^ *(\d+)\. (?:.*, )?priority (\d+)(?:, cookie (0x[0-9a-f]+))?$")
_OUTPUT = re.compile(r"^ *output:(\d+)$")
_REGISTER_OUTPUT = re.compile(r"^ *-> output port is (\d+)$")
_GROUP = re.compile(r"^ *group:(\d+)$")
_BUCKET = re.compile(r"^ *-> using bucket (\d+)$")
_DEAD = re.compile(r"^ *-> bucket \d+: (not live.*)$")
# Actions that send a packet somewhere without saying to which port.
_WIDE = re.compile(r"^ *(?:FLOOD|ALL|IN_PORT|LOCAL|TABLE|bundle.*|output\(.*|-> .*\bflooding.*)$")
_FAULT = re.compile(r"^Translation failed \((.*)\)")


def parse_trace(text: str, bridge: str, ports: PortMap) -> Seen:
    """The output of `ofproto/trace` of any packet (lib/ofproto-dpif-trace.c). Raises SwitchError.

    Where frames go is taken from the datapath's actions, since these are what is carried out; the text
    above them tells how it came to that.
    """
    outputs: list[Output] = []
    told: set[int] = set()
    groups: list[GroupUse] = []
    path: list[tuple[int, int, int]] = []
    dead: list[str] = []
    normal = wide = translated = False
    fault, tagged = "", None
    for line in text.splitlines():
        if match := _RULE.match(line):
            if len(path) < LONGEST_PATH:
                path.append((int(match[1]), int(match[2]), int(match[3] or "0", 16)))
        elif line.startswith("Flow: "):
            tagged = _parse_vlan(line)
        elif line.startswith("Datapath actions: "):
            translated = True
            outputs += _find_outputs(line[18:], tagged, bridge, ports)
        elif (match := _OUTPUT.match(line)) or (match := _REGISTER_OUTPUT.match(line)):
            told.add(int(match[1]))
        elif line.strip() == "NORMAL":
            normal = True
        elif match := _GROUP.match(line):
            groups.append(GroupUse(int(match[1]), None))
            dead = []
        elif (match := _DEAD.match(line)) and groups:
            dead.append(match[1])
            groups[-1] = GroupUse(groups[-1].group_id, None, tuple(dead))
        elif (match := _BUCKET.match(line)) and groups:
            groups[-1] = GroupUse(groups[-1].group_id, int(match[1]), tuple(dead))
        elif match := _FAULT.match(line):
            fault = f"the switch gave up on it: {match[1]}"
        elif _WIDE.match(line):
            wide = True
    if not translated and not fault:
        raise SwitchError(f"ofproto/trace gave no datapath actions: {text.strip()[-300:]}")
    return Seen(
        outputs=tuple(outputs),
        told=frozenset(told),
        normal=normal,
        wide=wide,
        groups=tuple(groups),
        path=tuple(path),
        fault=fault,
    )


_TAG = re.compile(r"\bdl_vlan=(\d+)")


def _parse_vlan(line: str) -> int | None:
    found = _TAG.search(line)
    return int(found[1]) if found else None


def _find_outputs(
    actions: str, tagged: int | None, bridge: str, ports: PortMap
) -> Iterator[Output]:
    # Every trace has a number of its own for its recirculation; without it most are alike.
    plain = re.sub(r"recirc\((?:0x)?[0-9a-f]+\)", "recirc(1)", actions)
    for number, vlan in find_frames(plain, tagged):
        where, ofport, name = ports.get(number, ("", 0, f"datapath port {number}"))
        yield Output(ofport if where == bridge else 0, name, vlan)


@lru_cache(maxsize=4096)
def find_frames(actions: str, tagged: int | None) -> tuple[tuple[int, int | None], ...]:
    """(datapath port, outer VLAN or None) of every frame that these datapath actions send.

    Raises SwitchError for actions that the parser does not know: better no answer than a wrong one.
    """
    try:
        parser = KVParser(actions, ODPFlow.action_decoders())
        parser.parse()
    except Exception as fault:  # the package raises its own ParseError, ValueError or KeyError
        raise SwitchError(f"not understood: datapath actions {actions[:300]}: {fault}") from fault
    frames: list[tuple[int, int | None]] = []
    _walk(
        [(item.key, item.value) for item in parser.kv()], [] if tagged is None else [tagged], frames
    )
    return tuple(frames)


def _walk(
    actions: list[tuple[str, Any]], tags: list[int], frames: list[tuple[int, int | None]]
) -> None:
    """``tags`` are the frame's VLANs, outermost last; nested actions work on a copy of the frame."""
    for name, value in actions:
        if name == "output":
            frames.append((int(value["port"]), tags[-1] if tags else None))
        elif name == "push_vlan":
            tags.append(int(value["vid"]))
        elif name == "pop_vlan":
            if tags:
                tags.pop()
        elif name == "set" and isinstance(value, dict) and "vlan" in value and tags:
            vid = value["vlan"]["vid"]
            tags[-1] = int(getattr(vid, "value", vid))
        elif isinstance(value, (list, dict)):
            for nested in _find_nested(value):
                _walk(nested, list(tags), frames)


def _find_nested(value: Any) -> Iterator[list[tuple[str, Any]]]:
    """The lists of actions inside an action: clone, sample, check_pkt_len."""
    if isinstance(value, list):
        if all(isinstance(item, dict) for item in value):
            yield [pair for item in value for pair in item.items()]
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _find_nested(inner)
