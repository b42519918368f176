"""The shortcut in the service host: a real engine in a real lane, on the lab's switch with flows by hand."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator

import pytest

from appliance.inspection.publish import EngineState, read_inspection_state
from appliance.rules.check import finish_rules
from steering.model import Profile, Trigger
from steering.run import run
from steering.shortcut import PRIORITY_CODES
from tests.support.inspection_lane import get, wait_for
from tests.support.shortcut_lane import (
    RAW_PORT,
    TLS_PORT,
    ShortcutLab,
    ask,
    find_lane,
    open_shortcut_lane,
    talk_tls,
)

pytestmark = [pytest.mark.lab, pytest.mark.slow]

SIZE = PRIORITY_CODES[Trigger.ONE_MEGABYTE]
TLS = PRIORITY_CODES[Trigger.TLS_HANDSHAKE]
RULE = PRIORITY_CODES[Trigger.RULE]
SYN = 0xCF
(REWRITTEN,), _, _ = finish_rules(
    [
        'alert http any any -> any any (msg:"let go"; http.uri; content:"/let-go"; bypass; sid:7; rev:1;)'
    ],
    Profile.PREVENT,
    shortcut=True,
)


@pytest.fixture(scope="module")
def lane(bare_lab) -> Iterator[ShortcutLab]:
    with open_shortcut_lane(bare_lab, f"{REWRITTEN.text}\n") as made:
        yield made


def blocked_for(lane: ShortcutLab, since: float) -> list[str]:
    time.sleep(0.3)
    return [
        event["alert"]["signature"]
        for event in lane.events("alert")
        if event["alert"]["action"] == "blocked"
    ][int(since) :]


@pytest.mark.parametrize("family", [4, 6])
def test_after_a_megabyte_frames_leave_by_leg_c_with_their_tag_and_no_syn_does(lane, family):
    lane.steer(SIZE)
    before, entered = lane.by_leg_c(0xC0 + SIZE), lane.shortcut().entered
    connection = lane.socket(family, RAW_PORT)
    assert ask(connection, 100, 100) == 100_004
    assert lane.by_leg_c(0xC0 + SIZE) == before, "below the size nothing goes"
    assert ask(connection, 1, 4000) == 4_000_004
    assert ask(connection, 4000, 1) == 1_004
    connection.close()
    assert lane.by_leg_c(0xC0 + SIZE) > before
    assert lane.by_leg_c(SYN) == 0
    assert wait_for(lambda: lane.shortcut().entered > entered)
    assert lane.wait_shortcut("on").reason == ""
    # The engine took what came before as super-packets.
    assert wait_for(lambda: find_lane(lane).super_packets.state == "on")


@pytest.mark.parametrize("family", [4, 6])
def test_one_that_the_switch_does_not_take_goes_on_in_inspection_as_it_was(lane, family):
    """More than the policy's number of them: its frames come by leg C, and the next ones are steered again."""
    lane.steer(SIZE)
    before = wait_for(lane.shortcut)
    connection = lane.connect(family)
    assert get(connection, "/", {"Wanted": "5000000"}) == 200
    assert get(connection, "/next", {"Wanted": "5000000"}) == 200
    assert wait_for(lambda: lane.shortcut().entered == before.entered + 1)
    # In two parts: the engine must know the first one.
    connection.sock.sendall(b"GET /?file=/etc/pas")
    time.sleep(1.5)
    connection.sock.sendall(b"swd HTTP/1.1\r\nHost: a\r\n\r\n")
    # TCP sends it again and again meanwhile, after pauses of more than a second.
    connection.sock.settimeout(6)
    with pytest.raises(TimeoutError):
        connection.sock.recv(100)
    assert lane.shortcut().returned == before.returned


def test_what_was_blocked_stays_blocked_when_it_is_sent_again(lane):
    """Of a connection that returned; the engine must not take the second half for something new."""
    lane.steer(SIZE)
    connection = lane.socket(4, RAW_PORT)
    with lane.passing(connection.getsockname()[1]):
        pass
    assert ask(connection, 1, 3000) == 3_000_004
    with lane.passing(connection.getsockname()[1]):
        assert ask(connection, 4000, 4000) == 4_000_004
    assert ask(connection, 10, 10) == 10_004
    connection.sendall(b"000001000001" + b"RAWAT")
    time.sleep(0.2)
    connection.sendall(b"TACK" + b"u" * 991)
    connection.settimeout(6)
    with pytest.raises(TimeoutError):
        connection.recv(100)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("code", [0, 6, 7, PRIORITY_CODES[Trigger.HUNDRED_MEGABYTES], TLS, RULE])
def test_other_classes_do_not_go_by_this_trigger(lane, family, code):
    lane.steer(code)
    before = lane.all_by_leg_c()
    assert {0xC0 + one for one in range(8)} <= before.keys()
    connection = lane.socket(family, RAW_PORT)
    assert ask(connection, 2000, 3000) == 3_000_004
    connection.close()
    assert lane.all_by_leg_c() == before


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_goes_after_its_handshake_which_is_inspected(lane, version):
    lane.steer(TLS)
    before = lane.by_leg_c(0xC0 + TLS)
    assert talk_tls(lane.socket(4, TLS_PORT), "good.example", version) == 1_004
    after = lane.by_leg_c(0xC0 + TLS)
    assert after > before
    assert talk_tls(lane.socket(4, TLS_PORT), "evil.example", version) == -1
    assert lane.by_leg_c(0xC0 + TLS) == after
    wait_for(lambda: any(e["alert"]["signature"] == "test sni" for e in lane.events("alert")))


@pytest.mark.parametrize("family", [4, 6])
def test_a_connection_that_returns_goes_on_and_is_inspected(lane, family):
    lane.steer(SIZE)
    connection = lane.connect(family)
    port = connection.sock.getsockname()[1]
    assert get(connection, "/", {"Wanted": "2000000"}) == 200
    returned = wait_for(lambda: lane.shortcut()).returned
    with lane.passing(port):
        assert get(connection, "/unseen?file=/etc/passwd", {"Wanted": "3000000"}) == 200
    assert get(connection, "/back", {"Wanted": "5000000"}) == 200
    assert get(connection, "/again", {"Wanted": "10"}) == 200
    assert wait_for(lambda: lane.shortcut().returned > returned)
    assert get(connection, "/?file=/etc/passwd") is None
    alert = wait_for(
        lambda: next(
            (
                e
                for e in lane.events("alert")
                if e["src_port"] == port and e["alert"]["signature"] == "test uri"
            ),
            None,
        )
    )
    assert alert["alert"]["action"] == "blocked"
    assert alert["dest_ip"].replace(":0000", ":").startswith(lane.address(family)[:4])


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_connection_that_returns_is_inspected_both_ways_by_content(lane, family, way):
    lane.steer(SIZE)
    connection = lane.socket(family, RAW_PORT)
    port = connection.getsockname()[1]
    size = (3000, 1) if way == "up" else (1, 3000)
    assert ask(connection, *size) == size[1] * 1000 + 4
    with lane.passing(port):
        assert ask(connection, 4000, 4000) == 4_000_004
    assert ask(connection, 3000, 3000) == 3_000_004
    attack = bytearray(b"u" * 2_000_000)
    attack[1_500_000:1_500_009] = b"RAWATTACK"
    assert ask(connection, 2000, 1, bytes(attack)) == -1
    connection.close()


@pytest.mark.parametrize("family", [4, 6])
def test_one_that_returns_in_the_middle_of_a_body_lives_and_is_inspected_from_the_next_request(
    lane, family
):
    lane.steer(SIZE)
    connection = lane.connect(family)
    port = connection.sock.getsockname()[1]
    connection.request("GET", "/", headers={"Wanted": "40000000"})
    response = connection.getresponse()
    assert len(response.read(5_000_000)) == 5_000_000
    with lane.passing(port):
        assert len(response.read(15_000_000)) == 15_000_000
    assert len(response.read()) == 20_000_000
    assert get(connection, "/next") == 200
    assert get(connection, "/and-next") == 200
    assert get(connection, "/?file=/etc/passwd") is None


def test_new_connections_on_old_ports_are_inspected_from_their_first_byte(lane):
    lane.steer(SIZE)
    connection = lane.socket(4, RAW_PORT, 45_123)
    assert ask(connection, 1, 3000) == 3_000_004
    renewed = wait_for(lambda: lane.shortcut()).renewed
    with lane.passing(45_123):
        assert ask(connection, 1, 3000) == 3_000_004
        # Reset, so that the ports are free at once; the engine sees nothing of it.
        connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
        connection.close()
        time.sleep(0.1)
    again = lane.socket(4, RAW_PORT, 45_123)
    assert ask(again, 10, 10) == 10_004
    assert wait_for(lambda: lane.shortcut().renewed > renewed)
    assert ask(again, 1, 1, b"RAWATTACK".ljust(1000)) == -1
    again.close()


def test_without_leg_c_all_goes_on_inspected_and_it_is_told(lane):
    lane.steer(SIZE)
    device = lane.state.lanes[0].device_c
    host = lane.state.service_host
    peer = ["ip", "-n", lane.state.hypervisor, "link", "set", lane.state.lanes[0].leg_c]
    connection = lane.connect(4)
    assert get(connection, "/", {"Wanted": "2000000"}) == 200
    run([*peer, "down"])
    try:
        said = lane.wait_shortcut("off", seconds=3)
        assert said.reason == f"device: {device} has no carrier"
        before = lane.by_leg_c(0xC0 + SIZE)
        assert get(connection, "/", {"Wanted": "3000000"}) == 200
        other = lane.connect(4)
        assert get(other, "/", {"Wanted": "3000000"}) == 200
        assert get(other, "/?file=/etc/passwd") is None
        assert get(connection, "/?file=/etc/passwd") is None
        assert lane.by_leg_c(0xC0 + SIZE) == before
        leg = lane.state.lanes[0].device_a
        shown = run(["tc", "-n", host, "filter", "show", "dev", leg, "egress"], check=False)
        assert "mirred" not in shown.stdout
    finally:
        run([*peer, "up"])
    lane.wait_shortcut("ready", "on", seconds=5)
    assert any("has no carrier" in fault.reason for fault in find_lane(lane).faults)


def test_a_filter_that_somebody_took_away_is_put_back(lane):
    device = lane.state.lanes[0].device_a
    run(["tc", "-n", lane.state.service_host, "qdisc", "del", "dev", device, "clsact"])
    show = ["tc", "-n", lane.state.service_host, "filter", "show", "dev", device, "egress"]
    wait_for(lambda: "mirred" in run(show, check=False).stdout, 5)
    told = lambda: any("third leg had been changed" in f.reason for f in find_lane(lane).faults)  # noqa: E731
    assert wait_for(told)


def test_a_rule_with_bypass_stops_no_inspection_and_lets_go_only_who_asked(lane):
    lane.steer(0)
    connection = lane.connect(4)
    assert get(connection, "/let-go") == 200
    assert get(connection, "/then", {"Wanted": "2000000"}) == 200
    assert get(connection, "/?file=/etc/passwd") is None
    lane.steer(RULE)
    before = lane.by_leg_c(0xC0 + RULE)
    connection = lane.connect(4)
    assert get(connection, "/other") == 200
    assert lane.by_leg_c(0xC0 + RULE) == before
    assert get(connection, "/let-go") == 200
    assert get(connection, "/then") == 200
    assert lane.by_leg_c(0xC0 + RULE) > before


def test_what_came_by_leg_c_was_never_a_syn_and_queues_lost_nothing(lane):
    assert lane.by_leg_c(SYN) == 0
    found = find_lane(lane)
    assert found.state is EngineState.RUNNING
    # The queue rules read back as they were written, and count.
    state = read_inspection_state(lane.settings.inspection_state)
    assert state is not None
    assert not [fault.reason for fault in state.faults if "queue rules" in fault.reason]
    assert found.counters.frames_in_tagged >= found.counters.frames_out_tagged > 1000
    assert sum(queue.dropped + queue.user_dropped for queue in found.queues) == 0
    assert found.shortcut.refused_full == 0


def test_a_third_leg_that_is_gone_costs_the_shortcut_alone(lane):
    """The last one: the device does not come back."""
    lane.steer(SIZE)
    connection = lane.connect(4)
    assert get(connection, "/", {"Wanted": "2000000"}) == 200
    run(["ip", "-n", lane.state.hypervisor, "link", "del", lane.state.lanes[0].leg_c])
    device = lane.state.lanes[0].device_c
    said = lane.wait_shortcut("off", seconds=3)
    assert said.reason == f"device: no device {device} in the service host"
    assert get(connection, "/", {"Wanted": "3000000"}) == 200
    assert get(lane.connect(4), "/?file=/etc/passwd") is None
    assert get(connection, "/?file=/etc/passwd") is None
