"""One real lane: two clients in namespaces, the service host between them, a real engine.

No switch: the clients are wired straight to the legs, and frames with tags are made by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.l2 import ARP, LLC, Dot1AD, Dot1Q, Ether

from appliance.inspection.counting import parse_nftables_counters
from appliance.inspection.publish import EngineState, read_inspection_state
from appliance.inspection.queueing import (
    NFT_COUNTERS,
    count_nftables_rules,
    render_nftables,
)
from appliance.inspection.socket import check_reload, reload_rules
from steering.errors import HairpinError
from steering.model import Leg
from steering.run import run
from tests.support.inspection_lane import (
    HOST,
    INSPECT,
    MAC_A,
    MAC_B,
    RULES,
    V4,
    V6,
    VLAN,
    A,
    B,
    LaneLab,
    Sniffer,
    connect,
    crosses,
    get,
    in_namespace,
    open_lane,
    pings,
    wait_for,
)

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]


def find_group(user: str) -> int:
    return pwd.getpwnam(user).pw_gid


@pytest.fixture(scope="module")
def lane_lab() -> Iterator[LaneLab]:
    with open_lane() as lab:
        yield lab


def test_without_rules_no_engine_starts_and_nothing_is_forwarded(lane_lab):
    lane = lane_lab.wait_state(EngineState.NO_RULES)
    assert lane.pid is None
    assert "no ruleset" in lane.faults[0].reason
    assert pings() == 0
    assert not crosses(*V4)
    assert not crosses(Dot1Q(vlan=VLAN), *V6)


def test_the_engine_starts_when_its_ruleset_appears(lane_lab):
    lane_lab.write_rules(RULES, loaded=2)
    lane = lane_lab.running()
    assert (lane.rules_loaded, lane.rules_failed, lane.hyperscan) == (2, 0, True)
    assert lane.queues[0].number == 7
    assert pings() == 3


def test_the_engine_runs_with_one_capability_as_its_own_user(lane_lab):
    status = Path(f"/proc/{lane_lab.running().pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    net_admin = f"{1 << 12:016x}"
    assert {fields[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {net_admin}
    assert fields["NoNewPrivs"] == "1"
    assert psutil.Process(lane_lab.running().pid).username() == "hairpin-engine"
    lane = lane_lab.settings.build_lanes()[0]
    for path in (lane_lab.settings.engine_socket(lane), lane_lab.settings.eve_file(lane)):
        assert path.group() == "hairpin"
        assert path.stat().st_mode & 0o007 == 0
        for user, status in (("hairpin", 0), ("nobody", 1)):
            as_user = [
                "setpriv",
                f"--reuid={user}",
                "--clear-groups",
                f"--regid={find_group(user)}",
            ]
            assert run([*as_user, "test", "-r", str(path)], check=False).status == status, user


@pytest.mark.parametrize("host", ["10.97.0.2", "fd97::2"])
def test_an_exploit_is_dropped_and_recorded_and_the_rest_passes(lane_lab, host):
    lane_lab.running()
    assert get(connect(host), "/") == 200
    assert get(connect(host), "/?file=/etc/passwd") is None
    alert = wait_for(
        lambda: next(
            (
                e
                for e in lane_lab.events("alert")
                if e["dest_ip"].endswith("2") and (":" in host) == (":" in e["dest_ip"])
            ),
            None,
        )
    )
    assert alert["alert"]["action"] == "blocked"
    assert alert["verdict"]["action"] == "drop"
    assert alert["alert"]["metadata"]["cve"] == ["CVE_2021_41773"]
    assert alert["http"]["url"] == "/?file=/etc/passwd"
    assert "GET /?file=/etc/passwd" in alert["payload_printable"]
    assert {"payload", "packet", "community_id", "flow_id"} <= set(alert)


def test_an_attack_late_in_a_connection_is_still_seen(lane_lab):
    lane_lab.running()
    connection = connect()
    # Each direction is reassembled to a depth of its own, so it is the client that has to send much.
    connection.request("POST", "/", body=b"y" * (3 * 2**20))
    assert connection.getresponse().read() == b"xx"
    assert get(connection, "/?file=/etc/passwd") is None


@pytest.mark.parametrize(
    ("layers", "passes"),
    [
        pytest.param(V4, True, id="IPv4 untagged, as the switch's BFD"),
        pytest.param(V6, True, id="IPv6 untagged"),
        pytest.param((Dot1Q(vlan=VLAN), *V4), True, id="IPv4 in the lane's VLAN"),
        pytest.param((Dot1Q(vlan=VLAN), *V6), True, id="IPv6 in the lane's VLAN"),
        pytest.param((Dot1Q(vlan=VLAN + 1), *V4), False, id="another VLAN"),
        pytest.param((Dot1Q(vlan=VLAN), Dot1Q(vlan=VLAN), *V4), False, id="two tags"),
        pytest.param((Dot1AD(vlan=VLAN), Dot1Q(vlan=VLAN), *V4), False, id="QinQ"),
        pytest.param((Dot1AD(vlan=VLAN), *V4), False, id="a provider tag"),
        pytest.param((ARP(psrc="10.97.0.1", pdst="10.97.0.2"),), False, id="ARP"),
        pytest.param((Dot1Q(vlan=VLAN), ARP(pdst="10.97.0.2")), False, id="ARP in the VLAN"),
        pytest.param((LLC(dsap=0x42, ssap=0x42),), False, id="a bridge's own protocol"),
    ],
)
def test_only_the_lanes_own_ip_crosses(lane_lab, layers, passes):
    lane_lab.running()
    before = lane_lab.running().queues[0].packets
    assert crosses(*layers) is passes
    if passes:
        wait_for(lambda: lane_lab.running().queues[0].packets > before, 3.0)


def test_the_service_host_says_nothing_in_a_lane(lane_lab):
    lane_lab.running()
    run(["ip", "-n", HOST, "addr", "add", "10.97.0.99/32", "dev", "lo"])
    sniffer = Sniffer(A, "a0")
    try:
        sender = in_namespace(A, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        sender.bind(("a0", 0))
        leg_mac = run(
            ["ip", "netns", "exec", HOST, "cat", "/sys/class/net/legA/address"]
        ).stdout.strip()
        question = Ether(src=MAC_A, dst="ff:ff:ff:ff:ff:ff") / ARP(
            psrc="10.97.0.1", pdst="10.97.0.99"
        )
        echo = Ether(src=MAC_A, dst=leg_mac) / IP(src="10.97.0.1", dst="10.97.0.99") / ICMP()
        with sender:
            sender.send(bytes(question))
            sender.send(bytes(echo))
        seen = sniffer.read()
        assert [
            frame.hex() for frame in seen if frame[6:12] != bytes.fromhex(MAC_B.replace(":", ""))
        ] == []
    finally:
        sniffer.socket.close()


def test_a_killed_engine_is_back_within_a_second_and_flows_survive_inspected(lane_lab):
    before = lane_lab.running()
    by_uri, by_payload = connect(), connect()
    assert get(by_uri, "/") == get(by_payload, "/") == 200
    began = time.monotonic()
    os.kill(before.pid, signal.SIGKILL)
    after = lane_lab.wait_state(EngineState.RUNNING, other_than=before.pid)
    took = time.monotonic() - began
    print(f"engine killed and back in {took:.2f} s")
    assert took < 1.5
    assert after.restarts == before.restarts + 1
    assert any("exited" in fault.reason and fault.mended for fault in after.faults)
    for connection in (by_uri, by_payload):
        assert get(connection, "/") == 200
    assert get(by_uri, "/?file=/etc/passwd") is None
    assert get(by_payload, "/RAWATTACK") is None


def test_a_transfer_in_progress_outlives_its_engine(lane_lab):
    before = lane_lab.running()
    connection = connect()
    connection.sock.settimeout(15)
    connection.request("GET", "/", headers={"Wanted": str(40 * 2**20)})
    response = connection.getresponse()
    received = len(response.read(2**20))
    os.kill(before.pid, signal.SIGKILL)
    received += len(response.read())
    assert received == 40 * 2**20
    assert lane_lab.running().pid != before.pid


def test_a_flow_that_cannot_be_parsed_is_dropped_and_told(lane_lab):
    lane_lab.running()
    with in_namespace(A, lambda: socket.socket(socket.AF_INET)) as client:
        client.settimeout(1.5)
        client.connect(("10.97.0.2", 80))
        client.sendall(b"SSH-2.0-x\r\n")
        client.sendall(b"\xff" * 600)
        with pytest.raises(TimeoutError):
            client.recv(100)
    reasons = wait_for(lambda: [event["drop"]["reason"] for event in lane_lab.events("drop")])
    assert "applayer error" in reasons


@pytest.mark.slow
def test_a_hung_engine_is_replaced(lane_lab):
    before = lane_lab.running()
    began = time.monotonic()
    os.kill(before.pid, signal.SIGSTOP)
    assert pings() == 0
    after = lane_lab.wait_state(EngineState.RUNNING, other_than=before.pid)
    print(f"engine stopped and replaced in {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 10
    assert not psutil.pid_exists(before.pid)
    assert any("and did nothing" in fault.reason for fault in after.faults)
    assert pings() == 3


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(["iptables", "-t", "mangle", "-F"], id="iptables flushed"),
        pytest.param(
            ["iptables", "-t", "mangle", "-D", "FORWARD", "-j", "hairpin"], id="jump gone"
        ),
        pytest.param(["sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=0"], id="sysctl off"),
    ],
)
def test_rules_that_somebody_removes_leave_the_lane_closed_and_come_back(lane_lab, damage):
    lane_lab.running()
    sniffer = Sniffer(B, "b0")
    run(["ip", "netns", "exec", HOST, *damage])
    # Of 30 pings in 3 s, those sent while the rules are away are lost and not passed uninspected.
    before = lane_lab.running().queues[0].packets
    answered = pings(30)
    echoes = [frame for frame in sniffer.read() if frame[12:14] == b"\x08\x00" and frame[23] == 1]
    sniffer.socket.close()
    queued = wait_for(lambda: lane_lab.running().queues[0].packets - before >= 2 * answered, 3.0)
    assert queued
    assert len(echoes) == answered > 0
    state = read_inspection_state(lane_lab.settings.inspection_state)
    assert any("had been changed" in fault.reason for fault in state.faults)
    assert get(connect(), "/?file=/etc/passwd") is None


def test_ebtables_rules_that_somebody_removes_come_back(lane_lab):
    lane_lab.running()
    run(["ip", "netns", "exec", HOST, "ebtables", "-t", "filter", "-F", "hairpin"])
    wait_for(lambda: not crosses(Dot1Q(vlan=VLAN + 1), *V4), 6.0)
    assert crosses(Dot1Q(vlan=VLAN), *V4)


def test_a_bridge_that_somebody_removes_comes_back(lane_lab):
    lane_lab.running()
    run(["ip", "-n", HOST, "link", "del", "lane1"])
    wait_for(lambda: pings(1) == 1, 10.0)
    lane = lane_lab.running()
    assert any("lane1 was missing" in fault.reason for fault in lane.faults)


def test_a_live_reload_is_believed_only_when_it_worked(lane_lab):
    lane_lab.running()
    path = lane_lab.settings.engine_socket(lane_lab.settings.build_lanes()[0])
    lane_lab.write_rules(RULES + RULES.replace("sid:1;", "sid:3;").replace("sid:2;", "sid:4;"))
    report = asyncio.run(reload_rules(path))
    assert check_reload(report, floor=4) == ()
    assert report.rules_loaded == 4
    lane_lab.write_rules(RULES + "drop tcp any any -> any any (sid:9; nosuchkeyword;)\n")
    broken = asyncio.run(reload_rules(path))
    assert check_reload(broken, floor=2) == ("1 rules failed that loaded before (sid 9)",)
    assert check_reload(broken, floor=2, known_failed={9}) == ()
    lane_lab.write_rules(RULES, loaded=2)
    assert check_reload(asyncio.run(reload_rules(path)), floor=2) == ()
    assert get(connect(), "/") == 200


def reload(lane_lab):
    path = lane_lab.settings.engine_socket(lane_lab.settings.build_lanes()[0])
    return asyncio.run(reload_rules(path))


def blocks() -> bool:
    """Whether the lane passes what is benign and nothing that is not."""
    with contextlib.suppress(OSError):
        return get(connect(), "/") == 200 and get(connect(), "/?file=/etc/passwd") is None
    return False


@pytest.mark.parametrize("harm", ["empty", "truncated", "comments", "missing"])
def test_an_engine_that_loaded_a_bad_file_is_started_on_a_whole_one(lane_lab, harm):
    lane_lab.write_rules(RULES.splitlines(True)[0], loaded=1)
    broken = lane_lab.write_rules(RULES, loaded=2)
    before = lane_lab.running()
    assert reload(lane_lab).rules_loaded == 2
    if harm == "missing":
        broken.unlink()
    else:
        broken.write_text({"empty": "", "truncated": RULES[:90], "comments": "# x\n"}[harm])
    began = time.monotonic()
    # Killed so soon that whoever asked for the reload may not hear how it went.
    with contextlib.suppress(HairpinError):
        reload(lane_lab)
    after = lane_lab.wait_state(EngineState.RUNNING, other_than=before.pid, seconds=6)
    assert time.monotonic() - began < 5
    # The good one before it, since the one in force is damaged; and both things are told.
    assert after.rules_loaded == 1
    told = [fault.reason for fault in after.faults]
    assert any("had 0 rules loaded instead of 1 or more" in reason for reason in told)
    assert any(reason.endswith("the one before it is inspected by") for reason in told), told
    assert wait_for(blocks, 5)
    # The next start finds the same, whoever killed it.
    os.kill(after.pid, signal.SIGKILL)
    again = lane_lab.wait_state(EngineState.RUNNING, other_than=after.pid, seconds=6)
    assert again.rules_loaded == 1
    # Mended, it is what a reload loads: the fallback is not for ever.
    broken.write_text(RULES)
    assert reload(lane_lab).rules_loaded == 2
    assert lane_lab.wait_state(EngineState.RUNNING).pid == again.pid


def test_no_whole_ruleset_is_no_engine(lane_lab):
    lane_lab.running()
    store = lane_lab.settings.rules_dir / "prevent"
    saved = {path: path.read_text() for path in store.glob("*/suricata.rules")}
    for path in saved:
        path.write_text("alert tcp any any -> any any (sid:7;)\n")
    os.kill(lane_lab.lane().pid, signal.SIGKILL)
    lane = lane_lab.wait_state(EngineState.NO_RULES)
    assert any("was changed or torn" in fault.reason for fault in lane.faults)
    assert pings() == 0
    for path, text in saved.items():
        path.write_text(text)
    lane_lab.running()
    assert wait_for(lambda: pings() == 3)


def test_a_ruleset_that_the_engine_loads_a_part_of_is_inspected_by_and_told(lane_lab):
    lane_lab.write_rules(RULES + "\n", loaded=3)
    before = lane_lab.running()
    os.kill(before.pid, signal.SIGKILL)
    lane = lane_lab.wait_state(EngineState.RUNNING, other_than=before.pid)
    assert lane.rules_loaded == 2
    assert any("loads 2 of the 3 rules" in fault.reason for fault in lane.faults)
    time.sleep(2.5)
    assert lane_lab.running().pid == lane.pid
    lane_lab.write_rules(RULES, loaded=2)


def test_a_large_eve_file_is_rotated_and_the_next_event_is_in_the_new_one(lane_lab):
    lane_lab.running()
    eve = lane_lab.settings.eve_file(lane_lab.settings.build_lanes()[0])
    with eve.open("a") as stream:
        stream.write(json.dumps({"event_type": "padding", "text": "x" * 2**20}) + "\n")
    rotated = wait_for(lambda: list(eve.parent.glob("eve.json.*")), 5.0)
    assert len(rotated) == 1
    # The engine opens the new file with the next event it writes.
    time.sleep(1.5)
    assert get(connect(), "/?file=/etc/passwd") is None
    wait_for(lambda: lane_lab.events("alert"), 5.0)
    assert eve.stat().st_size < 2**20


def test_a_second_supervisor_of_one_directory_is_refused(lane_lab):
    lane_lab.running()
    second = subprocess.run(
        [sys.executable, "-c", INSPECT, str(lane_lab.directory / "settings.yaml")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert second.returncode != 0
    assert "another `hairpin inspect` holds" in second.stderr
    assert lane_lab.running().pid is not None


def test_a_killed_supervisor_leaves_the_engine_inspecting_and_the_next_adopts_it(lane_lab):
    before = lane_lab.running()
    connection = connect()
    assert get(connection, "/") == 200
    lane_lab.end(signal.SIGKILL)
    assert get(connection, "/") == 200
    assert get(connect(), "/?file=/etc/passwd") is None
    lane_lab.settings.inspection_state.unlink()
    lane_lab.start()
    after = lane_lab.running()
    assert (after.pid, after.adopted, after.started) == (before.pid, True, before.started)
    assert get(connection, "/") == 200
    os.kill(after.pid, signal.SIGKILL)
    assert not lane_lab.wait_state(EngineState.RUNNING, other_than=before.pid).adopted


def test_an_engine_that_died_with_its_supervisor_is_started_anew(lane_lab):
    before = lane_lab.running()
    lane_lab.end(signal.SIGKILL)
    os.kill(before.pid, signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(before.pid))
    lane_lab.settings.inspection_state.unlink()
    lane_lab.start()
    assert not lane_lab.wait_state(EngineState.RUNNING, other_than=before.pid).adopted
    assert pings() == 3


def test_an_end_in_order_stops_the_engine_and_leaves_the_lane_closed(lane_lab):
    before = lane_lab.running()
    assert lane_lab.end() == 0
    assert not psutil.pid_exists(before.pid)
    assert lane_lab.wait_state(EngineState.STOPPED).pid is None
    assert pings() == 0
    assert not crosses(*V4)
    assert not crosses(ARP(pdst="10.97.0.2"))


def test_one_rule_deleted_by_hand_opens_nothing(lane_lab):
    lane_lab.running()
    assert wait_for(lambda: crosses(*V4))
    for table, rule in (
        ("mangle", ["-i", "lane1", "-j", "NFQUEUE", "--queue-num", "7"]),
        ("mangle", ["-i", "lane1", "-j", "MARK", "--set-xmark", "0x100/0xff00"]),
    ):
        # Right after a look, so that the next one is 2 s away.
        looked = lane_lab.lane().counters.frames_at
        wait_for(lambda seen=looked: lane_lab.lane().counters.frames_at != seen)
        chain = ["ip", "netns", "exec", HOST, "iptables", "-t", table]
        run([*chain, "-D", "hairpin", *rule])
        assert not crosses(*V4), rule
        assert " ".join(rule) not in run([*chain, "-S", "hairpin"]).stdout
        assert wait_for(lambda: crosses(*V4), 5), rule


def test_the_nftables_dialect_is_understood_by_this_nft(lane_lab):
    """This kernel may lack nft_queue, so the queueing itself is replaced; the rest is loaded for real."""
    (lane,) = lane_lab.settings.build_lanes()
    text = render_nftables([replace(lane, leg_c=Leg("leg2", "legC"))])
    assert text.count("queue num 7") == 2
    loadable = text.replace("queue num 7", "accept").replace(
        "bridge hairpin", "bridge hairpin_trial"
    )
    in_host = ["ip", "netns", "exec", HOST]
    run([*in_host, "nft", "-f", "-"], stdin=loadable)
    run([*in_host, "nft", "-f", "-"], stdin=loadable)
    listed = run([*in_host, "nft", "list", "table", "bridge", "hairpin_trial"]).stdout
    counted = 'counter name "lane1_in_tagged" accept'
    assert f"vlan id {VLAN} vlan type {{ ip, ip6 }} {counted}" in listed
    lane_lab.running()
    crossed = wait_for(lambda: crosses(Dot1Q(vlan=VLAN), *V4))
    shown = run([*in_host, *NFT_COUNTERS[:-1], "hairpin_trial"]).stdout
    frames = parse_nftables_counters(lane_lab.settings.build_lanes(), shown)[1]
    assert crossed
    assert frames.in_tagged >= frames.out_tagged >= 1
    run([*in_host, "nft", "delete", "table", "bridge", "hairpin_trial"])
    assert f"vlan id {VLAN} vlan pcp 5 meta mark set 0x00050000" in listed
    assert count_nftables_rules(listed) == count_nftables_rules(loadable)
    assert listed.count(" drop") == 5
