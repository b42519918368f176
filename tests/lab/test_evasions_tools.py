"""The tools that attackers have: hping3, nmap, thc-ipv6, ipv6toolkit. What they send is inspected.

hping3 and nmap carry the mark that a rule drops (or one that none does). The others send what they
will: of all that the target got from the attacker, every packet must have left a lane first.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.support.evasion_tools import ALL_IP, ATTACKER, CONTROL, MARK, NO_MARK, Stage
from tests.support.lab import run_in_vm, wait_until
from tests.support.wire_witness import watching

NEEDED = ("hping3", "nmap", "atk6-fragmentation6", "frag6", "tcpdump")
MISSING = [one for one in NEEDED if shutil.which(one) is None]
pytestmark = [
    pytest.mark.lab,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(MISSING), reason=f"run `make setup`: {', '.join(MISSING)} missing"),
]

# Options before the address; None for the benign twin: a target takes no such packet.
HPING = {
    "udp": ("-2",),
    "udp-bad-checksum": ("-2", "-b"),
    "udp-fragments": ("-2", "-f"),
    "udp-fragments-800": ("-2", "-m", "800"),
    "udp-spoofed": ("-2", "-a", "10.77.0.6"),
    "udp-ttl-1": ("-2", "-t", "1"),
    "udp-record-route": ("-2", "-G"),
    "udp-source-53": ("-2", "-s", "53", "-k"),
    "icmp": ("-1",),
    "icmp-bad-checksum": ("-1", "-b"),
    "raw-253": ("-0", "-H", "253"),
}
NMAP = {
    "udp": ("-sU",),
    "udp-f": ("-sU", "-f"),
    "udp-mtu-24": ("-sU", "--mtu", "24"),
    "udp-bad-sum": ("-sU", "--badsum"),
    "udp-decoys": ("-sU", "-D", "10.77.0.6,ME"),
    "udp-options": ("-sU", "--ip-options", "R"),
    "udp-mac": ("-sU", "--spoof-mac", "02:48:50:00:00:04"),
}
# Commands; TARGET is the target's address. Each ends by itself, with a few hundred packets at most.
IPV6_TOOLS = {
    "fragmentation6": "atk6-fragmentation6 -p -n 1 eth0 TARGET",
    "firewall6 tcp": "atk6-firewall6 eth0 TARGET 80",
    "firewall6 udp": "atk6-firewall6 -u eth0 TARGET 9999",
    "implementation6": "atk6-implementation6 -p eth0 TARGET",
    "frag6 policy": "frag6 -i eth0 -d TARGET -p",
}


@pytest.fixture(scope="module")
def stage(evasions: Stage) -> Stage:
    return evasions


def send_with_hping(stage: Stage, target: str, mark: str, name: str) -> str:
    token = f"hping-{name}-{target}-{mark[-4:]}"
    payload = f"{mark} token={token};"
    file = stage.directory / token
    file.write_text(payload)
    argv = ["hping3", "-q", "-n", "-c", "2", "-i", "u20000", *HPING[name], "-p", "9999"]
    argv += ["-E", str(file), "-d", str(len(payload)), stage.address(target, 4)]
    run_in_vm(stage.appliance.lab, ATTACKER, "timeout", "4", *argv)
    return token


def send_with_nmap(stage: Stage, target: str, mark: str, name: str) -> str:
    token = f"nmap-{name}-{target}-{mark[-4:]}"
    argv = ["nmap", "-n", "-Pn", "--max-retries", "0", "--host-timeout", "3s", *NMAP[name]]
    argv += ["-p", "9999", "--data-string", f"{mark} token={token};", stage.address(target, 4)]
    run_in_vm(stage.appliance.lab, ATTACKER, "timeout", "8", *argv)
    return token


@pytest.mark.parametrize(
    ("send", "names"), [(send_with_hping, HPING), (send_with_nmap, NMAP)], ids=["hping3", "nmap"]
)
def test_what_carries_the_mark_is_dropped(stage: Stage, send, names) -> None:  # type: ignore[no-untyped-def]
    rounds = [(ALL_IP, MARK), (CONTROL, MARK), (ALL_IP, NO_MARK)]
    with ThreadPoolExecutor(6) as pool:
        hostile, potent, benign = (
            dict(zip(names, pool.map(partial(send, stage, *one), names), strict=True))
            for one in rounds
        )
    arrived = [name for name, token in hostile.items() if stage.find_arrival(ALL_IP, token)]
    assert arrived == []
    taken = [
        name for name, token in potent.items() if stage.find_arrival(CONTROL, token) == "socket"
    ]
    assert "udp" in taken
    print(f"\n0 of {len(names)} arrived ({len(taken)} potent: {' '.join(taken)})")
    # Small fragments and protocols that the engine can't read do not arrive (`LOST`).
    missing = [name for name in taken if stage.find_arrival(ALL_IP, benign[name]) != "socket"]
    assert set(missing) <= {"udp-fragments", "udp-fragments-800", "udp-f", "udp-mtu-24", "raw-253"}


def test_what_ipv6_tools_send_goes_through_a_lane(stage: Stage) -> None:
    lab, address = stage.appliance.lab, stage.address(ALL_IP, 6)
    seen, uninspected = {}, {}
    for name, command in IPV6_TOOLS.items():
        argv = [address if word == "TARGET" else word for word in command.split()]
        with watching(lab, ATTACKER, ALL_IP, stage.directory) as witness:
            run_in_vm(lab, ATTACKER, "timeout", "4", *argv, timeout=20)
        seen[name] = len(witness.arrived)
        if witness.uninspected:
            uninspected[name] = [one[:80].hex() for one in witness.uninspected[:3]]
        print(f"{name:24} {seen[name]:4} arrived, {len(witness.uninspected)} uninspected")
    assert uninspected == {}
    assert [name for name, count in seen.items() if not count] == [], "so each sent something"
    # The lane is alive afterwards, and inspects.
    assert wait_until(lambda: stage.appliance.is_forwarding("prevent"))
    assert stage.appliance.curl(ATTACKER, ALL_IP, family=6).status == 0
    token = stage.send(ALL_IP, 6, MARK, ["udp-plain"])
    assert token == {"udp-plain": ""}


@pytest.mark.xfail(
    strict=True, reason="ENDPOINT takes x.63, x.127 and x.191 for a subnet's own broadcast"
)
def test_a_frame_for_all_does_not_carry_a_packet_for_one(stage: Stage) -> None:
    """Not even to an address that looks like a subnet's own broadcast (.63)."""
    lab = stage.appliance.lab
    assert run_in_vm(lab, ALL_IP, "ip", "addr", "add", "10.77.0.63/24", "dev", "eth0").status == 0
    payload = f"{MARK} token=for-all;"
    program = (
        "import sys; from scapy.all import conf, IP, UDP, Ether\n"
        "s = conf.L2socket(iface='eth0')\n"
        "s.send(Ether(src=sys.argv[1], dst='ff:ff:ff:ff:ff:ff') / IP(src='10.77.0.1', "
        "dst='10.77.0.63') / UDP(sport=4000, dport=9999) / sys.argv[2].encode())\n"
    )
    argv = [sys.executable, "-c", program, lab.vm(ATTACKER).mac, payload]
    assert run_in_vm(lab, ATTACKER, "ping", "-c1", "-W1", "10.77.0.63").status == 0
    assert run_in_vm(lab, ATTACKER, *argv).status == 0
    assert not wait_until(lambda: stage.find_arrival(ALL_IP, "for-all") == "socket", 1)
