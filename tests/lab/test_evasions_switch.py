"""Attacks on what steers rather than on what inspects: BFD, the switch's MAC table, ARP and ND."""

from __future__ import annotations

import json
import re
import signal
import sys
import time

import pytest

from appliance import lab as the_lab
from steering.run import run
from tests.support import evasion_tools as tools
from tests.support.appliance import BLOCKED
from tests.support.evasion_modes import FAMILIES
from tests.support.evasion_tools import ALL_IP, ATTACKER, CONTROL, HTTP_ONLY, ROOT, Stage
from tests.support.lab import run_in_vm, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(300)]

SHELLSHOCK = ("-A", "() { :; }; /bin/bash -c id", "-m", "1.2")


@pytest.fixture(scope="module")
def stage(evasions: Stage) -> Stage:
    return evasions


def appctl(stage: Stage, *args: str) -> str:
    return run(["ovs-appctl", "-t", str(stage.appliance.lab.vswitchd), *args]).stdout


def find_legs(stage: Stage) -> list[str]:
    return [leg for lane in stage.appliance.lab.lanes for leg, _, _ in lane.legs]


def read_flaps(stage: Stage) -> dict[str, str]:
    lab = stage.appliance.lab
    return {
        leg: run(lab.vsctl_argv(["get", "Interface", leg, "bfd_status:flap_count"])).stdout.strip()
        for leg in find_legs(stage)
    }


def find_discriminators(stage: Stage) -> list[int]:
    """Those of both sessions of the lane that prevents, as an attacker would have to guess them."""
    shown = appctl(stage, "bfd/show", "hp-prev-a")
    return [int(number, 16) for number in re.findall(r"Discriminator: (0x[0-9a-f]+)", shown)]


def find_targets(stage: Stage) -> list[list[str]]:
    """Where forged BFD could work: the legs, the lane's secret address, everybody, and other VMs."""
    lab = stage.appliance.lab
    source = stage.address(ATTACKER, 4)
    macs = ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", lab.lanes[0].bfd_mac]
    for leg, device, _ in lab.lanes[0].legs:
        macs.append(
            run(lab.vsctl_argv(["get", "Interface", leg, "mac_in_use"])).stdout.strip(' "\n')
        )
        inside = [
            "ip",
            "netns",
            "exec",
            lab.service_host,
            "cat",
            f"/sys/class/net/{device}/address",
        ]
        macs.append(run(inside).stdout.strip())
    # As OVS addresses its own, and then to VMs: within the policy on all of IP, beside the one on
    # tcp/80, and to one that no policy names.
    targets = [[mac, "169.254.1.1", "169.254.1.0"] for mac in macs]
    for vm in (ALL_IP, HTTP_ONLY, CONTROL):
        targets.append([lab.vm(vm).mac, source, stage.address(vm, 4)])
        targets.append([lab.vm(vm).mac, "169.254.1.1", "169.254.1.0"])
        targets.append([lab.vm(vm).mac, stage.address(ATTACKER, 6), stage.address(vm, 6)])
    return targets


def forge(stage: Stage, numbers: list[int], seconds: float) -> int:
    told = {
        "mac": stage.appliance.lab.vm(ATTACKER).mac,
        "targets": find_targets(stage),
        "discriminators": [0, 0xDEADBEEF, *numbers],
        "seconds": seconds,
    }
    argv = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.support.attacker_bfd"]
    done = stage.appliance.run(ATTACKER, *argv, json.dumps(told))
    assert done.status == 0, done.stderr
    sent: int = json.loads(done.stdout)
    return sent


def test_forged_bfd_does_not_kill_a_living_lane(stage: Stage) -> None:
    before = read_flaps(stage)
    numbers = find_discriminators(stage)
    assert len(numbers) >= 2
    assert forge(stage, numbers, 6) > 300
    assert read_flaps(stage) == before
    assert all(the_lab.find_forwarding_legs(stage.appliance.lab).values())
    assert stage.appliance.curl(ATTACKER, ALL_IP).stdout == f"hello from {ALL_IP}\n"


def test_forged_bfd_does_not_bring_a_dead_lane_to_life(stage: Stage) -> None:
    appliance = stage.appliance
    numbers = find_discriminators(stage)
    stopped = [
        the_lab.find_process(appliance.lab, role)[0] for role in ("inspect", "engine-prevent")
    ]
    try:
        for role in ("inspect", "engine-prevent"):
            the_lab.kill_process(appliance.lab, role, signal.SIGSTOP)
        assert wait_until(lambda: not appliance.is_forwarding("prevent"), 5)
        before = read_flaps(stage)
        assert forge(stage, numbers, 6) > 300
        legs = the_lab.find_forwarding_legs(appliance.lab)
        assert not legs["hp-prev-a"]
        assert not legs["hp-prev-b"]
        assert read_flaps(stage) == before, "not for a moment"
        assert appliance.curl(ATTACKER, ALL_IP, "-m", "1.2").status == BLOCKED
    finally:
        for role in ("engine-prevent", "inspect"):
            the_lab.kill_process(appliance.lab, role, signal.SIGCONT)
    assert len(set(stopped)) == 2
    # What a stopped supervisor found when it went on may have been worth a restart of the engine.
    assert wait_until(lambda: appliance.is_forwarding("prevent"), 30)
    assert wait_until(lambda: appliance.curl(ATTACKER, ALL_IP).status == 0, 15)


def test_the_switch_learns_no_address_on_a_leg(stage: Stage) -> None:
    for family in FAMILIES:
        assert stage.appliance.curl(ATTACKER, ALL_IP, family=family).status == 0
        assert stage.appliance.curl(ATTACKER, CONTROL, family=family).status == 0
    stage.send(
        ALL_IP, 4, tools.MARK, ["udp-plain", "udp-tags-q3901", "udp-mac-neighbour", "udp-snap"]
    )
    legs = {str(ofport) for lane in stage.appliance.lab.lanes for _, _, ofport in lane.legs}
    entries = [line.split() for line in appctl(stage, "fdb/show", "br-int").splitlines()[1:]]
    assert entries
    learned = {(port, mac) for port, _vlan, mac, _age in entries}
    assert {port for port, _ in learned} & legs == set()
    # And each VM's address on its own port only.
    owners = {vm.mac: str(vm.ofport) for vm in stage.appliance.lab.vms}
    assert {one for one in learned if one[1] in owners and owners[one[1]] != one[0]} == set()


def test_flooding_the_address_table_opens_nothing(stage: Stage) -> None:
    """300 addresses from a VM that policies name, and 300 from one that none does."""
    program = (
        "from scapy.all import conf; from scapy.layers.l2 import Ether\n"
        "s = conf.L2socket(iface='eth0')\n"
        "for n in range(300):\n"
        "    s.send(Ether(src=f'02:aa:00:00:{n // 256:02x}:{n % 256:02x}', dst='ff:ff:ff:ff:ff:ff', "
        "type=0x88b5) / (b'x' * 50))\n"
    )
    for vm in (ATTACKER, CONTROL):
        assert run_in_vm(stage.appliance.lab, vm, sys.executable, "-c", program).status == 0
    shown = appctl(stage, "fdb/show", "br-int")
    own = stage.appliance.lab.vm(ATTACKER).ofport
    assert f" {own}     0  02:aa:" not in shown, "GUARD holds it to its own address"
    assert stage.appliance.curl(ATTACKER, ALL_IP, *SHELLSHOCK).status == BLOCKED
    assert stage.appliance.curl(ATTACKER, ALL_IP).status == 0


def read_neighbour(stage: Stage, vm: str, address: str) -> str:
    shown = run_in_vm(stage.appliance.lab, vm, "ip", "neigh", "show", address).stdout
    found = re.search(r"lladdr (\S+)", shown)
    return found[1] if found else ""


@pytest.mark.parametrize("family", FAMILIES)
def test_arp_and_nd_can_t_be_poisoned_with_another_s_address(stage: Stage, family: int) -> None:
    """In the name of another MAC: dropped. In its own: the policies on its own port hold still."""
    appliance, lab = stage.appliance, stage.appliance.lab
    victim, named, foreign = ALL_IP, stage.address("db-2", family), lab.vm("web-2").mac
    assert run_in_vm(lab, victim, "ping", "-c1", "-W1", named).status == 0
    true = lab.vm("db-2").mac
    assert read_neighbour(stage, victim, named) == true
    if family == 6:
        argv = ["timeout", "6", "atk6-fake_advertise6", "-r", "-n", "3", "-w", "1", "eth0"]
        run_in_vm(lab, ATTACKER, *argv, named, stage.address(victim, 6), foreign)
        run_in_vm(lab, ATTACKER, "timeout", "2", "atk6-parasite6", "-l", "eth0")
    else:
        program = (
            "import sys; from scapy.all import conf; from scapy.layers.l2 import ARP, Ether\n"
            "s = conf.L2socket(iface='eth0'); own, foreign, ip, mac, victim = sys.argv[1:]\n"
            "for source in (own, foreign):\n"
            "    for op in (1, 2):\n"
            "        s.send(Ether(src=source, dst=mac) / ARP(op=op, hwsrc=foreign, psrc=ip, "
            "hwdst=mac, pdst=victim))\n"
        )
        argv = [sys.executable, "-c", program, lab.vm(ATTACKER).mac, foreign, named]
        argv += [lab.vm(victim).mac, stage.address(victim, 4)]
        assert run_in_vm(lab, ATTACKER, *argv).status == 0
    time.sleep(0.3)
    assert read_neighbour(stage, victim, named) == true
    assert appliance.attack(ATTACKER, victim, family=family).status == BLOCKED
    assert appliance.curl(ATTACKER, victim, family=family).status == 0
