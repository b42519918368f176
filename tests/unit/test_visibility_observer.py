"""The observer's pure parts: heartbeat, totals, stalls, comparison, spool, control groups, privileges."""

from __future__ import annotations

import resource
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from appliance.visibility import heartbeat, watch
from appliance.visibility.group import parse_hierarchies
from appliance.visibility.main import build_confined
from appliance.visibility.spool import Spool, find_rotated
from appliance.visibility.state import (
    Isolation,
    MissReport,
    ObserverState,
    Sample,
    Totals,
    compare,
    is_fresh,
    parse_state,
    read_state,
    write_state,
)
from steering.errors import WrongInput

MAC = "02:11:22:33:44:55"


class TestHeartbeat:
    def test_a_beat_is_a_sound_packet_that_no_bridge_forwards(self) -> None:
        frame = Ether(heartbeat.build_frame(MAC, 3))
        assert frame.src == MAC
        assert frame.dst == "01:80:c2:00:00:0f"
        assert (frame[IPv6].src, frame[IPv6].dst, frame[IPv6].hlim) == ("100::1", "100::2", 1)
        assert (frame[UDP].sport, frame[UDP].dport) == (49155, 9)
        given_sum = frame[UDP].chksum
        del frame[UDP].chksum
        assert Ether(bytes(frame))[UDP].chksum == given_sum

    @given(st.binary(min_size=6, max_size=6))
    def test_every_mac_is_locally_administered_and_unicast(self, random: bytes) -> None:
        assert int(heartbeat.build_mac(random)[:2], 16) & 3 == 2

    @given(st.integers(0, 200_000), st.integers(0, 16383))
    def test_the_beat_is_known_by_its_port(self, beat: int, later: int) -> None:
        assert heartbeat.find_beat(heartbeat.find_port(beat), beat + later) == beat

    def test_what_a_vm_sends_is_no_heartbeat(self) -> None:
        beat = SimpleNamespace(
            src_mac=MAC, dst_mac=heartbeat.DST_MAC, src_ip="100::1", dst_ip="100::2", src_port=49152
        )
        assert heartbeat.is_heartbeat(beat, MAC)
        for change in (
            {"src_mac": "02:11:22:33:44:56"},
            {"dst_mac": "02:00:00:00:00:01"},
            {"src_ip": "fd00::1"},
            {"dst_ip": "fd00::1"},
        ):
            assert not heartbeat.is_heartbeat(SimpleNamespace(**{**vars(beat), **change}), MAC)


def report(processed: int, ignored: int = 0, dropped: int = 0) -> watch.Report:
    return watch.Report(processed % 2**32, ignored, dropped)


class TestWorker:
    def test_heartbeats_are_no_traffic(self) -> None:
        worker = watch.Worker(started=0, first_beat=1)
        worker.take_report(report(12, ignored=2), sent_beat=5, now=1)
        assert worker.in_flight == 7
        worker.recorded = 4
        worker.take_beat(2, now=2)
        # Beat 1 was sent before the worker captured: 1 recorded and beats 3 to 5 in flight.
        assert worker.in_flight == 4

    def test_counters_that_wrap(self) -> None:
        worker = watch.Worker(started=0, first_beat=1)
        worker.take_report(report(2**32 - 10), 0, 1)
        worker.take_report(report(2**32 + 20), 0, 2)
        assert worker.processed == 2**32 + 20

    def test_packets_without_memory_are_lost_not_in_flight(self) -> None:
        worker = watch.Worker(started=0, first_beat=1)
        worker.take_report(report(100), 0, 1)
        worker.aborted = watch.count_aborted(
            b"WARNING: Failed to allocate memory space for flow creation. Flow creation aborted.\n"
        )
        assert worker.in_flight == 99
        assert watch.build_totals(Totals(lost=2), worker, 100, 0, 0).lost == 3
        assert watch.end_worker(Totals(), worker).lost == 100

    def test_what_a_dead_worker_had_in_flight_is_lost(self) -> None:
        worker = watch.Worker(started=0, first_beat=1)
        worker.take_report(report(100, ignored=7, dropped=3), 0, 1)
        worker.recorded = 60
        ended = watch.end_worker(Totals(recorded=5, lost=1), worker)
        assert ended == Totals(recorded=65, lost=41, unmetered=7, dropped=3)
        after = watch.Worker(started=2, first_beat=9)
        after.take_report(report(10), 8, 3)
        totals = watch.build_totals(ended, after, port=130, flows=4, unwritten=0)
        assert (totals.recorded, totals.in_flight, totals.lost) == (65, 10, 41)
        assert totals.seen == 65 + 10 + 7

    @pytest.mark.parametrize(
        ("progressed", "recorded", "now", "has_worker", "fault"),
        [
            (None, None, 59, False, None),
            (None, None, 61, True, "no packet metered 61 s after its start"),
            (100, None, 107, True, "no heartbeat recorded for 107 s"),
            (50, None, 55, True, None),
            (100, 95, 107, True, None),
            (100, 95, 109, True, "no packet metered for 9 s"),
            (200, 95, 201, True, "no heartbeat recorded for 106 s"),
            (100, 95, 101, False, "nfstream's worker died"),
        ],
    )
    def test_faults(
        self,
        progressed: float | None,
        recorded: float | None,
        now: float,
        has_worker: bool,
        fault: str | None,
    ) -> None:
        worker = watch.Worker(
            started=0, first_beat=1, progressed=progressed, beat_recorded=recorded
        )
        assert watch.find_fault(worker, now, 15, 60, has_worker=has_worker) == fault

    def test_a_report_without_new_packets_is_no_progress(self) -> None:
        worker = watch.Worker(started=0, first_beat=1)
        worker.take_report(report(5), 1, 10)
        worker.take_report(report(5), 2, 20)
        assert worker.progressed == 10


@pytest.mark.parametrize(
    "line",
    [b"WARNING: Failed to allocate", b"{}", b"[]", b"1", b'{"packets_processed": null}', b"\xff"],
)
def test_what_nfstream_prints_besides_is_no_report(line: bytes) -> None:
    assert watch.parse_report(line) is None


def test_nfstreams_report_is_read() -> None:
    line = (
        b'{"flows_expired": 15, "packets_processed": 19, "packets_ignored": 2, '
        b'"packets_dropped_filtered_by_kernel": 1, "meters_packets_processing_balance": [19]}\n'
    )
    assert watch.parse_report(line) == watch.Report(19, 2, 1)
    assert watch.parse_report(b"WARNING: no memory." + line) == watch.Report(19, 2, 1)


@pytest.mark.parametrize(
    ("line", "port"),
    [(b'{"beat": 49152}\n', 49152), (b'{"beat": "x"}\n', None), (b'{"first_seen": 1}', None)],
)
def test_a_beats_line(line: bytes, port: int | None) -> None:
    assert watch.parse_beat(line) == port


class TestCompare:
    first = Sample(1000.0, 1010.0, Totals(port=20, recorded=10, in_flight=5, unmetered=5), 520)

    def test_what_was_missed_and_where(self) -> None:
        totals = Totals(port=110, recorded=60, in_flight=20, unmetered=10, dropped=8, lost=12)
        found = compare(self.first, Sample(1000.0, 1070.0, totals, 620))
        assert found == MissReport(
            seconds=60.0,
            seen_packets=70,
            switch_packets=100,
            missed_packets=30,
            missed_ratio=0.3,
            note="20 packets are in flows that have not ended yet; 10 never reached the port; "
            "8 found the capture buffer full; 12 were lost with a worker that died or had no memory",
        )

    def test_nothing_passed(self) -> None:
        assert compare(self.first, self.first).missed_ratio == 0.0

    def test_a_newer_count_than_the_switchs_is_no_negative_miss(self) -> None:
        last = Sample(1000.0, 1012.0, Totals(port=40, recorded=40), 521)
        found = compare(self.first, last)
        assert (found.missed_packets, found.missed_ratio) == (0, 0.0)
        assert "newer" in found.note

    @pytest.mark.parametrize("change", [{"started": 1001.0}, {"switch_packets": 3}])
    def test_a_restart_makes_the_window_meaningless(self, change: dict[str, float]) -> None:
        with pytest.raises(WrongInput):
            compare(self.first, replace(self.first, **change))  # type: ignore[arg-type]


class TestState:
    state = ObserverState(
        pid=1,
        device="mir0",
        started=1.0,
        updated=100.0,
        alive=True,
        isolation=Isolation(user="hairpin", capabilities=("net_raw",), group="process group"),
    )

    def test_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        path = tmp_path / "state.json"
        assert read_state(path) is None
        write_state(path, self.state)
        assert read_state(path) == self.state
        assert [file.name for file in tmp_path.iterdir()] == ["state.json"]

    def test_one_that_was_killed_is_not_fresh(self) -> None:
        assert is_fresh(self.state, 105.0)
        assert not is_fresh(self.state, 111.0)
        assert not is_fresh(self.state.model_copy(update={"alive": False}), 100.0)

    def test_what_is_no_state_is_refused(self) -> None:
        with pytest.raises(WrongInput):
            parse_state('{"pid": "many"}')


class TestSpool:
    def test_whole_lines_rotated_by_rename(self, tmp_path: Path) -> None:
        path = tmp_path / "flows.json"
        times = iter(range(1, 99))
        spool = Spool(path, size_limit=10, clock_ns=lambda: next(times))
        for number in range(4):
            spool.write_line(b"line%d\n" % number)
        spool.close()
        assert [file.name for file in find_rotated(path)] == [
            "flows.json.1",
            "flows.json.2",
            "flows.json.3",
        ]
        assert path.read_bytes() == b"line3\n"
        assert (tmp_path / "flows.json.1").read_bytes() == b"line0\n"

    def test_files_that_nobody_takes_away_are_bounded(self, tmp_path: Path) -> None:
        path = tmp_path / "flows.json"
        times = iter(range(8, 99))
        spool = Spool(path, size_limit=1, rotated_limit=2, clock_ns=lambda: next(times))
        for number in range(6):
            spool.write_line(b"%d\n" % number)
        spool.close()
        # By number, not by name: 12 is newer than 9.
        assert [file.read_bytes() for file in find_rotated(path)] == [b"3\n", b"4\n"]

    @pytest.mark.parametrize(
        ("before", "kept"),
        [(b"a\nb\ntor", b"a\nb\n"), (b"torn", b""), (b"a\n", b"a\n"), (b"", b"")],
    )
    def test_a_torn_tail_is_cut_off(self, tmp_path: Path, before: bytes, kept: bytes) -> None:
        path = tmp_path / "flows.json"
        path.write_bytes(before)
        spool = Spool(path)
        spool.write_line(b"new\n")
        spool.close()
        assert path.read_bytes() == kept + b"new\n"

    def test_a_line_that_does_not_fit_leaves_nothing_of_it(self, tmp_path: Path) -> None:
        path = tmp_path / "flows.json"
        spool = Spool(path)
        spool.write_line(b"first\n")
        # A full disk as a process sees it: the kernel takes the bytes that fit, then refuses.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
            with pytest.raises(OSError, match="too large"):
                spool.write_line(b"second\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert path.read_bytes() == b"first\n"
        spool.write_line(b"third\n")
        spool.close()
        assert path.read_bytes() == b"first\nthird\n"

    def test_another_file_of_a_like_name_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "flows.json"
        for name in ("flows.json.old", "flows.json.5", "other.json.6"):
            (tmp_path / name).write_text("")
        assert [file.name for file in find_rotated(path)] == ["flows.json.5"]


class TestHierarchies:
    def test_version_2_before_version_1(self) -> None:
        mountinfo = (
            "36 31 0:34 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n"
            "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
            "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
            "23 1 0:21 / / rw shared:1 - ext4 /dev/vda rw\n"
            "41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n"
        )
        own = "9:name=systemd:/a\n6:freezer:/\n1:cpu:/\n0::/b/c\n"
        assert [(h.version, str(h.base)) for h in parse_hierarchies(mountinfo, own)] == [
            (2, "/sys/fs/cgroup/unified/b/c"),
            (1, "/sys/fs/cgroup/systemd/a"),
            (1, "/sys/fs/cgroup/freezer"),
        ]

    def test_a_mount_that_does_not_show_our_group_is_no_use(self) -> None:
        mountinfo = (
            "41 31 0:38 /other /mnt/a rw - cgroup2 cgroup2 rw\n"
            "42 31 0:38 /pods/x /mnt/b\\040c rw - cgroup2 cgroup2 rw\n"
        )
        found = parse_hierarchies(mountinfo, "0::/pods/x/y\n")
        assert [str(h.base) for h in found] == ["/mnt/b c/y"]

    def test_none_is_mounted(self) -> None:
        assert parse_hierarchies("23 1 0:21 / / rw - ext4 /dev/vda rw\n", "0::/\n") == []


def test_the_privileges_that_are_left() -> None:
    assert build_confined((999, 995), ["python", "-m", "x"]) == [
        "setpriv",
        "--reuid=999",
        "--regid=995",
        "--clear-groups",
        "--inh-caps=-all,+net_raw",
        "--ambient-caps=-all,+net_raw",
        "--bounding-set=-all,+net_raw",
        "--no-new-privs",
        "--",
        "python",
        "-m",
        "x",
    ]
    assert not [word for word in build_confined(None, ["x"]) if "uid" in word or "gid" in word]
