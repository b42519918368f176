"""The observer on a real mirror port of a real Open vSwitch, with real traffic between two VMs."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from appliance.settings import parse_settings
from appliance.visibility.attribute import Evidence, attribute_flow
from appliance.visibility.group import remove_groups
from appliance.visibility.heartbeat import DST_MAC, SRC_ADDRESS
from appliance.visibility.main import USER, build_confined, build_group_name
from appliance.visibility.record import FlowRecord, parse_record
from appliance.visibility.state import ObserverState, build_sample, compare, is_fresh, read_state
from steering.model import Machine, Port
from steering.run import run

pytestmark = [
    pytest.mark.lab,
    pytest.mark.side_by_side,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root"),
]

PAGE = 40_000
MACS = {"a": "02:00:00:00:76:01", "b": "02:00:00:00:76:02"}
RESPONDER = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("10.76.0.2", 53))
while True:
    query, peer = s.recvfrom(512); s.sendto(query[:2] + bytes([0x81, 0x80]) + query[4:], peer)
"""
QUERY = """
import socket, struct
name = b"".join(bytes([len(p)]) + p for p in b"db1.example.com".split(b".")) + b"\\0"
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
s.sendto(struct.pack("!6H", 7, 0x0100, 1, 0, 0, 0) + name + struct.pack("!2H", 1, 1), ("10.76.0.2", 53))
s.recv(512)
"""


@dataclass(frozen=True)
class Switch:
    """Two VMs, ``a`` and ``b``, on one bridge whose mirror port ends at ``mir0``."""

    prefix: str
    directory: Path

    def netns(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def inside(self, name: str, *argv: str) -> str:
        return run(["ip", "netns", "exec", self.netns(name), *argv], timeout=60).stdout

    def read_port(self, port: str) -> dict[str, int]:
        """OpenFlow's counters of a port: what the switch received from it and sent to it."""
        text = run(["ovs-ofctl", "dump-ports", f"unix:{self.directory}/br0.mgmt", port]).stdout
        rx, tx = text.split("rx pkts=")[1], text.split("tx pkts=")[1]
        return {"rx": int(rx.split(",")[0]), "tx": int(tx.split(",")[0])}


def wait_for(what: str, found: Callable[[], object], seconds: float = 40.0) -> None:
    limit = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < limit, f"not within {seconds} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def switch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Switch]:
    lab = Switch(f"vV{os.getpid()}", tmp_path_factory.mktemp("ovs"))
    where = lab.directory
    db = f"unix:{where}/db.sock"
    daemons: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        for name in ("hv", "mon", "a", "b"):
            run(["ip", "netns", "add", lab.netns(name)])
            stack.callback(run, ["ip", "netns", "del", lab.netns(name)])
        run(["ovsdb-tool", "create", f"{where}/conf.db"])

        # The mirror port is to be quiet but for what is mirrored.
        for name in ("hv", "mon"):
            lab.inside(name, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")

        def start(*argv: str) -> None:
            process = subprocess.Popen(
                ["ip", "netns", "exec", lab.netns("hv"), *argv],
                env={**os.environ, "OVS_RUNDIR": str(where)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            daemons.append(process)
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)

        start("ovsdb-server", f"{where}/conf.db", f"--remote=p{db}", f"--unixctl={where}/db.ctl")
        wait_for("ovsdb-server", (where / "db.sock").exists)
        run(["ovs-vsctl", f"--db={db}", "--no-wait", "init"])
        start("ovs-vswitchd", db, f"--unixctl={where}/vs.ctl")
        for name, mac in MACS.items():
            number = mac[-1]
            peer = ["peer", "name", "eth0", "address", mac, "netns", lab.netns(name)]
            run(["ip", "-n", lab.netns("hv"), "link", "add", f"tap-{name}", "type", "veth", *peer])
            lab.inside(name, "ethtool", "-K", "eth0", "tx", "off")
            lab.inside(name, "ip", "addr", "add", f"10.76.0.{number}/24", "dev", "eth0")
            lab.inside(name, "ip", "addr", "add", f"fd76::{number}/64", "dev", "eth0", "nodad")
            lab.inside(name, "ip", "link", "set", "eth0", "up")
            run(["ip", "-n", lab.netns("hv"), "link", "set", f"tap-{name}", "up"])
        peer = ["peer", "name", "mir0", "netns", lab.netns("mon")]
        run(["ip", "-n", lab.netns("hv"), "link", "add", "hp-mirror", "type", "veth", *peer])
        run(["ip", "-n", lab.netns("hv"), "link", "set", "hp-mirror", "up"])
        lab.inside("mon", "ip", "link", "set", "mir0", "up")
        ports = [
            word
            for port in ("tap-a", "tap-b", "hp-mirror")
            for word in ("--", "add-port", "br0", port)
        ]
        ids = [
            w
            for i in ("tap-a", "tap-b", "hp-mirror")
            for w in ("--", f"--id=@{i}", "get", "port", i)
        ]
        run(
            [
                "ovs-vsctl",
                f"--db={db}",
                "add-br",
                "br0",
                "--",
                "set",
                "bridge",
                "br0",
                "datapath_type=netdev",
                *ports,
            ]
        )
        run(
            [
                "ovs-vsctl",
                f"--db={db}",
                *ids[1:],
                "--",
                "--id=@m",
                "create",
                "mirror",
                "name=m0",
                "select_src_port=@tap-a,@tap-b",
                "output_port=@hp-mirror",
                "--",
                "set",
                "bridge",
                "br0",
                "mirrors=@m",
            ]
        )
        site = where / "site"
        site.mkdir()
        (site / "page.html").write_bytes(b"x" * PAGE)
        for argv in (
            [sys.executable, "-m", "http.server", "--bind", "::", "--directory", str(site), "8080"],
            [sys.executable, "-c", RESPONDER],
        ):
            server = subprocess.Popen(
                ["ip", "netns", "exec", lab.netns("b"), *argv],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(server.wait, 10)
            stack.callback(server.kill)
        wait_for(
            "the web server",
            lambda: (
                "8080" in lab.inside("b", "ss", "-Hltn") and ":53" in lab.inside("b", "ss", "-Hlun")
            ),
        )
        yield lab


class Observer:
    """`hairpin observe` as a process of its own."""

    def __init__(self, switch: Switch, directory: Path, start: Sequence[str] = ()) -> None:
        legs = {
            "legA": {"interface": "a", "device": "a"},
            "legB": {"interface": "b", "device": "b"},
        }
        document = {
            "name": "vtest",
            "stateDir": str(directory / "state"),
            "runDir": str(directory / "run"),
            "lanes": [{"profile": "prevent", "vlan": 100, "queues": [0], **legs}],
            "visibility": {
                "device": "mir0",
                "netns": None if start else switch.netns("mon"),
                "idleSeconds": 2,
                "activeSeconds": 10,
            },
        }
        self.settings = parse_settings(yaml.safe_dump(document))
        file = directory / "settings.yaml"
        file.write_text(yaml.safe_dump(document))
        code = (
            "import sys; from pathlib import Path\n"
            "from appliance.settings import read_settings\n"
            "from appliance.visibility.main import run_observe\n"
            "sys.exit(run_observe(read_settings(Path(sys.argv[1]))))"
        )
        self.process = subprocess.Popen([*(start or [sys.executable]), "-c", code, str(file)])
        self.known: set[psutil.Process] = set()

    def read_state(self) -> ObserverState | None:
        return read_state(self.settings.flow_spool.with_name("state.json"))

    def read_records(self) -> list[FlowRecord]:
        with contextlib.suppress(FileNotFoundError):
            return [
                parse_record(line) for line in self.settings.flow_spool.read_bytes().splitlines()
            ]
        return []

    def find_members(self) -> list[psutil.Process]:
        """The supervisor's descendants: nfstream's process first, then its worker."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.known.update(found)
        return found

    def is_metering(self) -> bool:
        state = self.read_state()
        return (
            state is not None
            and is_fresh(state, time.time())
            and state.heartbeat_age is not None
            and state.heartbeat_age < 3
            and len(self.find_members()) == 2
        )

    def survivors(self) -> list[psutil.Process]:
        return [p for p in self.known if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def observer(switch: Switch, tmp_path: Path) -> Iterator[Observer]:
    tmp_path.chmod(0o755)
    observing = Observer(switch, tmp_path)
    try:
        wait_for("metering", observing.is_metering, 60)
        yield observing
    finally:
        if observing.process.poll() is None:
            observing.process.terminate()
        observing.process.wait(10)
        for process in observing.survivors():
            process.kill()
        remove_groups(build_group_name(observing.settings.name, observing.settings.run_dir))


@pytest.mark.slow
def test_records_tell_who_spoke_what_and_miss_nothing(switch: Switch, observer: Observer) -> None:
    first_state = observer.read_state()
    assert first_state is not None
    first = build_sample(first_state, switch.read_port("hp-mirror")["tx"])
    with socket_inside(switch, "a") as tap:
        for url in ("http://10.76.0.2:8080/page.html", "http://[fd76::2]:8080/page.html"):
            assert len(switch.inside("a", "curl", "-sf", "-g", url)) == PAGE
        switch.inside("a", sys.executable, "-c", QUERY)
        switch.inside("a", "ping", "-c", "3", "-i", "0.2", "10.76.0.2")
        wanted = {("10.76.0.1", 6), ("fd76::1", 6), ("10.76.0.1", 17), ("10.76.0.1", 1)}
        wait_for(
            "the four flows",
            lambda: wanted <= {(r.src_address, r.protocol_number) for r in observer.read_records()},
        )
        heard = [frame[:6] for frame in read_frames(tap)]
    records = {(r.src_address, r.protocol_number): r for r in observer.read_records()}

    for family, source, target in (
        ("ipv4", "10.76.0.1", "10.76.0.2"),
        ("ipv6", "fd76::1", "fd76::2"),
    ):
        page = records[source, 6]
        assert (page.family, page.dst_address, page.dst_port) == (family, target, 8080)
        assert (page.src_mac, page.dst_mac, page.vlan) == (MACS["a"], MACS["b"], 0)
        assert page.application == "HTTP"
        assert page.application_category == "Web"
        assert PAGE < page.dst_bytes < PAGE + 8000
        assert page.src_bytes < 5000
        assert page.reason == "idle"
        assert time.time() - 60 < page.first_seen <= page.last_seen < time.time()
    query = records["10.76.0.1", 17]
    assert (query.application, query.requested_server_name) == ("DNS", "db1.example.com")
    assert (query.src_packets, query.dst_packets) == (1, 1)
    ping = records["10.76.0.1", 1]
    assert (ping.application, ping.src_packets, ping.dst_packets) == ("ICMP", 3, 3)

    port = Port("tap-b", 2, MACS["b"].upper(), "i", "vm-b", "br0")
    known = attribute_flow(ping, [Machine("vm-b", "b", {}, ("db",), (port,))], ())
    assert known.src is None
    assert known.dst is not None
    assert (known.dst.name, known.dst.evidence) == ("b", Evidence.MAC)

    # Heartbeats reach the switch's mirror port and stop there; no record tells of them.
    assert switch.read_port("hp-mirror")["rx"] > 3
    assert heard, "the tap heard the traffic"
    assert bytes.fromhex(DST_MAC.replace(":", "")) not in heard
    assert not [r for r in observer.read_records() if r.src_address == SRC_ADDRESS]

    def settled() -> bool:
        state = observer.read_state()
        return state is not None and state.totals.in_flight == 0 and state.totals.flows >= 4

    wait_for("nothing in flight", settled)
    last_state = observer.read_state()
    assert last_state is not None
    report = compare(first, build_sample(last_state, switch.read_port("hp-mirror")["tx"]))
    assert report.switch_packets > 40
    # Every frame is told of, but for those of the last two seconds: the state is that old.
    assert report.missed_packets <= 2, report
    assert last_state.totals.port - first_state.totals.port == pytest.approx(
        report.switch_packets, abs=2
    )


def test_a_quiet_port_still_tells(switch: Switch, observer: Observer) -> None:
    switch.inside("a", "ping", "-c", "1", "10.76.0.2")
    taps = ("tap-a", "tap-b")
    try:
        for tap in taps:
            run(["ip", "-n", switch.netns("hv"), "link", "set", tap, "down"])
        mirrored = switch.read_port("hp-mirror")["tx"]
        assert not [r for r in observer.read_records() if r.application == "ICMP"]
        wait_for(
            "the ping's record",
            lambda: any(r.application == "ICMP" for r in observer.read_records()),
        )
        assert switch.read_port("hp-mirror")["tx"] == mirrored
    finally:
        for tap in taps:
            run(["ip", "-n", switch.netns("hv"), "link", "set", tap, "up"])


def test_runs_with_the_least_it_needs(observer: Observer) -> None:
    members = [psutil.Process(observer.process.pid), *observer.find_members()]
    state = observer.read_state()
    assert state is not None
    for process in members:
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == 1 << 13, "CAP_NET_RAW and nothing else"
        assert status["NoNewPrivs"] == "1"
        assert process.username() == state.isolation.user
        # nfstream pins its processes to pairs of processors: it shows where there are more than two.
        assert os.sched_getaffinity(process.pid) == os.sched_getaffinity(0)
    assert state.isolation.user == "hairpin" or state.isolation.reasons
    kind, _, path = state.isolation.group.partition(" ")
    if kind == "process":
        assert any(
            "control group" in reason or "cgroup" in reason for reason in state.isolation.reasons
        )
    else:
        inside = (Path(path) / "meter" / "cgroup.procs").read_text().split()
        assert sorted(map(int, inside)) == sorted(p.pid for p in members[1:])


def find_python() -> list[str]:
    """A Python that every user may run, with this project and what it needs."""
    own = Path(sys.executable).resolve()
    if all(folder.stat().st_mode & 1 for folder in (own, *own.parents)):
        return [sys.executable]
    system = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin")
    if system is None:
        pytest.skip(f"no user but root may run {own}, and there is no other Python of its version")
    return ["env", f"PYTHONPATH={os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}", system]


def test_a_user_with_one_capability_can_start_it(switch: Switch) -> None:
    user = pwd.getpwnam(USER)
    directory = Path(tempfile.mkdtemp(prefix="vV-", dir="/tmp"))
    spool = directory / "run" / "observe"
    spool.mkdir(parents=True)
    directory.chmod(0o755)
    os.chown(spool, user.pw_uid, user.pw_gid)
    confined = build_confined((user.pw_uid, user.pw_gid), find_python())
    observing = Observer(switch, directory, ["ip", "netns", "exec", switch.netns("mon"), *confined])
    try:
        wait_for("metering", observing.is_metering, 60)
        switch.inside("a", sys.executable, "-c", QUERY)
        wait_for("a record", lambda: any(r.dst_port == 53 for r in observing.read_records()))
        state = observing.read_state()
        assert state is not None
        assert state.isolation.user == USER
        # `ip netns exec` hides the control groups: that is told, and the signals do the work.
        assert state.isolation.group == "process group"
        assert state.isolation.reasons == ("no control group hierarchy is mounted here",)
        assert len(observing.survivors()) == 2
        psutil.Process(state.pid).kill()
        wait_for("all of nfstream to end", lambda: not observing.survivors(), 3)
    finally:
        observing.process.kill()
        observing.process.wait(10)
        for process in observing.survivors():
            process.kill()
        shutil.rmtree(directory)


def test_sigterm_ends_everything_within_three_seconds(observer: Observer) -> None:
    began = time.monotonic()
    observer.process.send_signal(signal.SIGTERM)
    assert observer.process.wait(3) == 0
    assert not observer.survivors()
    assert time.monotonic() - began < 3
    state = observer.read_state()
    assert state is not None
    assert not state.alive


def test_no_worker_outlives_a_killed_supervisor(observer: Observer) -> None:
    assert len(observer.survivors()) == 2
    observer.process.kill()
    observer.process.wait(3)
    wait_for("all of nfstream to end", lambda: not observer.survivors(), 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "nfstream's worker died"),
        (signal.SIGSTOP, "no packet metered for"),
    ],
)
def test_a_dead_or_hung_worker_is_replaced(
    switch: Switch, observer: Observer, number: signal.Signals, reason: str
) -> None:
    before = observer.find_members()
    before[-1].send_signal(number)

    def replaced() -> bool:
        state = observer.read_state()
        return state is not None and state.restarts == 1 and observer.is_metering()

    wait_for("another worker", replaced, 60)
    assert not [process for process in before if process.is_running()]
    state = observer.read_state()
    assert state is not None
    assert reason in state.last_restart
    switch.inside("a", sys.executable, "-c", QUERY)
    wait_for(
        "a record of the new worker",
        lambda: any(r.application == "DNS" for r in observer.read_records()),
    )


def test_a_missing_device_is_refused(switch: Switch, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    run(["ip", "-n", switch.netns("mon"), "link", "set", "mir0", "name", "other"])
    try:
        observing = Observer(switch, tmp_path)
        assert observing.process.wait(60) == 1
    finally:
        run(["ip", "-n", switch.netns("mon"), "link", "set", "other", "down"])
        run(["ip", "-n", switch.netns("mon"), "link", "set", "other", "name", "mir0"])
        run(["ip", "-n", switch.netns("mon"), "link", "set", "mir0", "up"])
        remove_groups(build_group_name(observing.settings.name, observing.settings.run_dir))


@contextlib.contextmanager
def socket_inside(switch: Switch, name: str) -> Iterator[socket.socket]:
    """A packet socket on a VM's eth0, opened by a thread's visit to the VM's namespace."""
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{switch.netns(name)}", os.O_RDONLY)
    try:
        set_namespace(there)
        try:
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            tap.bind(("eth0", 3))
        finally:
            set_namespace(here)
    finally:
        os.close(here)
        os.close(there)
    with tap:
        yield tap


def set_namespace(fd: int) -> None:
    import ctypes

    assert ctypes.CDLL(None, use_errno=True).setns(fd, 0) == 0, os.strerror(ctypes.get_errno())


def read_frames(tap: socket.socket) -> list[bytes]:
    tap.setblocking(False)
    frames = []
    with contextlib.suppress(BlockingIOError):
        while True:
            frames.append(tap.recv(128))
    return frames
