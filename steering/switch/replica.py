"""A copy of a switch on this machine, for `ofproto/trace`, where the switch itself is reached over the network.

OVSDB and OpenFlow can't trace; the switch's control socket could, but takes every command, so nobody forwards it.
What they can is tell everything that a trace goes by: ports, flows, groups. So Open vSwitch's own code is run here
without a device or a privilege (its dummy datapath), is given what was read back from the switch, and is asked
in its place. It shows what the switch's tables mean, as they were a moment ago; it does not show that the
switch's own code carries them out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from steering.errors import CommandFailed, SwitchError
from steering.run import run
from steering.switch.trace import ControlSocket
from steering.tls import TlsFiles, find_options

log = structlog.get_logger("replica")

SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")
START_SECONDS = 10.0
SECONDS = 20.0
VERSION = ("-O", "OpenFlow15", "--no-names")
LOCAL_OFPORT = 65534
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9
_LAUNCH = (
    f"import ctypes, os, sys; ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {_SIGKILL}, 0, 0, 0); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True, slots=True)
class CopiedPort:
    """What NORMAL and the tables see of a port. ``settings`` as ovs-vsctl takes them, of table Port."""

    name: str
    ofport: int
    settings: tuple[str, ...] = ()


def parse_ports(bridge: str, names: str, ports: str, interfaces: str) -> tuple[CopiedPort, ...]:
    """Of ``bridge``, from `list-ports` and the JSON of tables Port and Interface (RFC 7047, 5.1).

    A port that the switch could not open is none. Of a bond each interface is one of its own.
    """
    wanted = set(names.split())
    by_id = {row["_uuid"][0]: row for row in _find_rows(interfaces)}
    found = []
    for row in _find_rows(ports):
        if row["name"] not in wanted:
            continue
        settings = []
        for column in ("tag", "trunks", "vlan_mode"):
            if row[column]:
                settings.append(f"{column}={','.join(map(str, row[column]))}")
        if row["protected"] == [True]:
            settings.append("protected=true")
        for identity in row["interfaces"]:
            interface = by_id.get(identity)
            ofport = interface["ofport"] if interface else []
            if interface and ofport and 0 < ofport[0] < LOCAL_OFPORT:
                found.append(CopiedPort(interface["name"][0], ofport[0], tuple(settings)))
    return tuple(sorted(found, key=lambda port: port.ofport))


def _find_rows(text: str) -> list[dict[str, Any]]:
    """Rows by column; every value as a list, but ``name``, which is text where it stands alone."""
    table = json.loads(text)
    rows = []
    for values in table["data"]:
        row = {
            column: _flatten(value) for column, value in zip(table["headings"], values, strict=True)
        }
        if "interfaces" in row:
            row["name"] = row["name"][0]
        rows.append(row)
    return rows


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, list) and value[0] == "set":
        return [item for part in value[1] for item in _flatten(part)]
    if isinstance(value, list) and value[0] in ("uuid", "named-uuid"):
        return [value[1]]
    return [value]


def build_port_commands(
    bridge: str, before: Sequence[CopiedPort], after: Sequence[CopiedPort]
) -> list[str]:
    """ovs-vsctl's arguments that make the copy's ports those of ``after``; empty where they are."""
    gone, new = set(before) - set(after), set(after) - set(before)
    argv: list[str] = []
    for port in sorted(gone, key=lambda port: port.ofport):
        argv += ["--", "--if-exists", "del-port", bridge, port.name]
    for port in sorted(new, key=lambda port: port.ofport):
        argv += ["--", "add-port", bridge, port.name, *port.settings]
        argv += ["--", "set", "Interface", port.name, "type=dummy", f"ofport_request={port.ofport}"]
    return argv[1:]


# Not those inside learn(), which have no space behind.
_TIMEOUT = re.compile(r"(?:idle|hard)_timeout=\d+, ")


def find_lines(dump: str, word: str) -> str:
    """The lines of a dump that ovs-ofctl takes again: those with ``word``.

    Without timeouts: no packet keeps a flow alive here, and it is the switch that says when one is gone.
    """
    lines = (_TIMEOUT.sub("", line.strip()) for line in dump.splitlines() if word in line)
    return "".join(f"{line}\n" for line in lines)


class Replica:
    """``directory`` is its own, short (sockets lie in it); ``ovsdb`` and ``openflow`` are the switch's.

    `open` on the event loop, `copy` beside it; `control` is then what `ControlSocket` is given.
    """

    def __init__(
        self, directory: Path, bridge: str, ovsdb: str, openflow: str, tls: TlsFiles | None
    ) -> None:
        self._directory = directory
        self._bridge = bridge
        self._ovsdb = ovsdb
        self._openflow = openflow
        self._tls = tls
        self._processes: list[asyncio.subprocess.Process] = []
        self._ports: tuple[CopiedPort, ...] = ()
        self._tables = ("", "")
        self._live: dict[str, bool] = {}
        self._is_whole = True

    @property
    def control(self) -> Path:
        return self._directory / "vswitchd.ctl"

    async def open(self) -> None:
        """Have it run; anew, and empty, if it ended or its ports are not known. Raises SwitchError."""
        running = self._processes and all(one.returncode is None for one in self._processes)
        if running and self._is_whole:
            return
        await self.close()
        self._ports, self._tables, self._live = (), ("", ""), {}
        self._is_whole = True
        try:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory.mkdir(mode=0o700, parents=True)
            await self._start()
        except (OSError, CommandFailed) as fault:
            await self.close()
            raise SwitchError(
                f"a copy of the switch can't be run here: {fault}",
                "install Open vSwitch's programs (openvswitch-switch) beside `hairpin serve`; its service "
                "need not run",
            ) from fault

    async def _start(self) -> None:
        database = self._directory / "conf.db"
        await asyncio.to_thread(run, ["ovsdb-tool", "create", str(database), str(SCHEMA)])
        await self._begin(
            "ovsdb-server",
            str(database),
            f"--remote=p{self._socket}",
            f"--unixctl={self._directory}/ovsdb.ctl",
        )
        await self._wait(self._directory / "db.sock")
        await asyncio.to_thread(self._vsctl, "--no-wait", "init")
        await self._begin(
            "ovs-vswitchd",
            self._socket,
            "--enable-dummy=override",
            "--disable-system",
            f"--unixctl={self.control}",
        )
        await self._wait(self.control)
        bridge = ["add-br", self._bridge, "--", "set", "Bridge", self._bridge]
        await asyncio.to_thread(self._vsctl, *bridge, "datapath_type=dummy", "fail_mode=secure")

    @property
    def _socket(self) -> str:
        return f"unix:{self._directory}/db.sock"

    async def _begin(self, *argv: str) -> None:
        """A program that ends with us, however we end (prctl(2), PR_SET_PDEATHSIG).

        Not by setpriv(1), which sets its capabilities anew, even to what they are: the appliance's unit forbids that.
        """
        names = ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR")
        directory = str(self._directory)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", _LAUNCH, *argv, "-vconsole:off", "-vsyslog:off",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **dict.fromkeys(names, directory)},
        )  # fmt: skip
        self._processes.append(process)
        log.debug("begin", command=argv, pid=process.pid)

    async def _wait(self, path: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not path.is_socket():
            ended = [one.returncode for one in self._processes if one.returncode is not None]
            if ended or time.monotonic() >= deadline:
                why = f"its program ended with status {ended[0]}" if ended else "too slow"
                raise OSError(f"{path.name} did not appear: {why}")
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        processes, self._processes = self._processes, []
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def copy(self, live: Mapping[str, bool]) -> None:
        """Make it what the switch is now. ``live``: by leg, whether BFD passes. Blocks. Raises SwitchError."""
        began = time.monotonic()
        try:
            changed = self._copy_ports() | self._copy_tables()
            self._copy_liveness(live)
        except (CommandFailed, ValueError, KeyError, IndexError, TypeError) as fault:
            self._tables, self._ports = ("", ""), ()
            raise SwitchError(
                f"the switch could not be copied for traces: {fault}",
                "see whether its Open vSwitch is much newer than the one here",
            ) from fault
        if changed:
            log.info("copied", ports=len(self._ports), seconds=round(time.monotonic() - began, 3))

    def _vsctl(self, *argv: str) -> str:
        return run(
            ["ovs-vsctl", f"--db={self._socket}", "--timeout=15", *argv], timeout=SECONDS
        ).stdout

    def _ask_ovsdb(self, *argv: str) -> str:
        options = (f"--db={self._ovsdb}", *find_options(self._ovsdb, self._tls), "--timeout=10")
        return run(["ovs-vsctl", *options, *argv], timeout=SECONDS).stdout

    def _ask_openflow(self, command: str, *options: str) -> str:
        tls = find_options(self._openflow, self._tls)
        return run(
            ["ovs-ofctl", *VERSION, *tls, *options, command, self._openflow], timeout=SECONDS
        ).stdout

    def _ofctl(self, command: str, stdin: str | None = None) -> None:
        target = f"unix:{self._directory}/{self._bridge}.mgmt"
        argv = ["ovs-ofctl", *VERSION, command, target, *([] if stdin is None else ["-"])]
        run(argv, stdin=stdin, timeout=SECONDS)

    def _copy_ports(self) -> bool:
        columns = "--columns=name,interfaces,tag,trunks,vlan_mode,protected"
        ports = parse_ports(
            self._bridge,
            self._ask_ovsdb("list-ports", self._bridge),
            self._ask_ovsdb("--format=json", columns, "list", "Port"),
            self._ask_ovsdb("--format=json", "--columns=_uuid,name,ofport", "list", "Interface"),
        )
        argv = build_port_commands(self._bridge, self._ports, ports)
        if argv:
            # One that was given up is none the less done, sooner or later.
            self._is_whole = False
            self._vsctl(*argv)
            self._is_whole = True
            for name in {port.name for port in set(self._ports) ^ set(ports)}:
                self._live.pop(name, None)
            self._ports = ports
        return bool(argv)

    def _copy_tables(self) -> bool:
        """Flows are deleted with the groups that they use, so both are always given together."""
        groups = find_lines(self._ask_openflow("dump-groups"), "group_id=")
        flows = find_lines(self._ask_openflow("dump-flows", "--no-stats"), "actions=")
        if (groups, flows) == self._tables:
            return False
        self._tables = ("", "")
        self._ofctl("del-flows")
        self._ofctl("del-groups")
        if groups:
            self._ofctl("add-groups", groups)
        if flows:
            self._ofctl("add-flows", flows)
        self._tables = (groups, flows)
        return True

    def _copy_liveness(self, live: Mapping[str, bool]) -> None:
        """A group asks whether a bucket's port is live: here by its link, there by BFD."""
        names = {port.name for port in self._ports}
        changed = {
            name: up
            for name, up in live.items()
            if name in names and self._live.get(name, True) != up
        }
        with ControlSocket(self.control) as control:
            for name, up in changed.items():
                control.call("netdev-dummy/set-admin-state", [name, "up" if up else "down"])
        for name, up in changed.items():
            self._vsctl("wait-until", "Interface", name, f"link_state={'up' if up else 'down'}")
            self._live[name] = up


def find_leg_liveness(
    legs: Iterable[tuple[str, str]], forwarding: Mapping[str, bool]
) -> dict[str, bool]:
    """By leg, from (lane, leg) and what is known by lane."""
    return {leg: forwarding.get(lane, False) for lane, leg in legs}
