"""MTUs and offloads: no cell in which Hairpin loses what the plain switch delivers, or misses an exploit.

Each cell is measured on an inspected pair and on a direct one at the same time. The switch's userspace
datapath can't take what a card should finish (checksums, segments) unless `userspace-tso-enable` is set:
such cells fail on the direct pair too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from appliance import lab as the_lab
from steering.run import run
from tests.support.appliance import Appliance, build_base, build_policy, inspect
from tests.support.evasion_tools import BENIGN_HEADER, HOSTILE_HEADER
from tests.support.lab import build_name, wait_until
from tests.support.mtu import FEATURES, ROOT, Cell, Result

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(600)]

SENDER, INSPECTED, DIRECT = "web-1", "app-1", "db-1"
VMS = (SENDER, INSPECTED, DIRECT)
USUAL = ("rx", "sg")  # as the lab leaves its links

MTUS = (
    Cell("1280", (1280, 1280)),
    Cell("1400", (1400, 1400)),
    Cell("1500", (1500, 1500)),
    Cell("9000 to 1500", (9000, 1500)),
    Cell("1500 to 9000", (1500, 9000)),
    Cell("1400 to 1500", (1400, 1500)),
    Cell("9000, legs 9216", (9000, 9000), legs=9216),
    Cell("9000 to 1500, legs 9216", (9000, 1500), legs=9216),
)
OFFLOADS = (
    *(Cell(f"VM: {name}", on=(name,)) for name in FEATURES),
    Cell("VM: all", on=FEATURES),
    *(Cell(f"everywhere: {name}", on=(name,), where="all") for name in FEATURES),
    Cell("everywhere: all", on=FEATURES, where="all"),
    Cell("everywhere: all, 9000", (9000, 9000), FEATURES, "all", 9216),
)


def standing(directory: Path, *, super_packets: bool) -> Iterator[Appliance]:
    name = build_name("o" if super_packets else "n")
    try:
        lab = the_lab.bring_up(name, 3, super_packets=super_packets)
        appliance = Appliance(lab, directory)
        appliance.start_web(INSPECTED, DIRECT)
        for vm in (INSPECTED, DIRECT):
            environment = ["env", f"PYTHONPATH={ROOT}"]
            argv = [*environment, sys.executable, "-m", "tests.support.mtu", "serve"]
            appliance.start(vm, *argv, role=f"echo-{vm}")
        policy = build_policy("mtu", SENDER, INSPECTED, inspect("prevent"))
        appliance.apply([*build_base(lab), policy])
        assert wait_until(lambda: appliance.is_forwarding("prevent"), 20)
        yield appliance
    finally:
        the_lab.take_down(name)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    yield from standing(tmp_path_factory.mktemp("plain"), super_packets=False)


@pytest.fixture(scope="module")
def super_packets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    yield from standing(tmp_path_factory.mktemp("super"), super_packets=True)


def set_links(appliance: Appliance, cell: Cell) -> None:
    """MTUs and offloads of the cell, at every link that it names."""
    lab = appliance.lab
    links: list[tuple[str, str, int, bool]] = []
    for name in VMS:
        vm, mtu = lab.vm(name), cell.mtus[name != SENDER]
        links.append((vm.netns, vm.device, mtu, True))
        links.append((lab.hypervisor, vm.interface, mtu, cell.where == "all"))
    for lane in lab.lanes:
        for interface, device, _ in lane.legs:
            links.append((lab.hypervisor, interface, cell.legs, cell.where == "all"))
            links.append((lab.service_host, device, cell.legs, cell.where == "all"))
    for netns, device, mtu, named in links:
        inside = ["ip", "netns", "exec", netns]
        run([*inside, "ip", "link", "set", device, "mtu", str(mtu)])
        wanted = cell.on if cell.on and named else USUAL
        said = [word for name in FEATURES for word in (name, "on" if name in wanted else "off")]
        run([*inside, "ethtool", "-K", device, *said], check=False)


def measure(appliance: Appliance, cell: Cell) -> dict[tuple[str, int], Result]:
    set_links(appliance, cell)
    assert wait_until(lambda: appliance.is_forwarding("prevent"), 20)
    targets = {(vm, family): appliance.address(vm, family) for vm in VMS[1:] for family in (4, 6)}
    told = {
        "targets": list(targets.values()),
        "sizes": cell.sizes,
        "benign": BENIGN_HEADER,
        "hostile": HOSTILE_HEADER,
    }
    argv = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.support.mtu", "measure"]
    done = appliance.run(SENDER, *argv, json.dumps(told), timeout=60)
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    return {key: Result(**found[address]) for key, address in targets.items()}


def render(cell: Cell, family: int, direct: Result, inspected: Result) -> str:
    def one(result: Result) -> str:
        lost = f"{len(result.lost)} lost" if result.lost else "none lost"
        return f"{'whole' if result.transfer else 'BROKEN':6} {lost:9}"

    verdict = "blocked" if not inspected.hostile else "DELIVERED"
    return f"{cell.name:26} IPv{family}  {one(direct)}  {one(inspected)}  {verdict}"


def expect(appliance: Appliance, cells: tuple[Cell, ...]) -> None:
    print(f"\n{'cell':26} IP    direct            inspected         exploit")
    wrong = []
    for cell in cells:
        found = measure(appliance, cell)
        for family in (4, 6):
            direct, inspected = found[DIRECT, family], found[INSPECTED, family]
            print(render(cell, family, direct, inspected))
            wrong += [f"{cell.name} IPv{family}: {one}" for one in inspected.find_worse(direct)]
            if inspected.hostile:
                wrong.append(f"{cell.name} IPv{family}: the exploit was answered")
    # One without its last header gets 408 when nginx has waited long enough.
    answered = 'GET /hostile HTTP/1.0" 200'
    assert answered not in appliance.read_requests(INSPECTED)
    assert answered in appliance.read_requests(DIRECT), "so the log above would have told"
    assert wrong == []


def test_no_mtu_makes_a_black_hole(plain: Appliance) -> None:
    expect(plain, MTUS)


def test_no_offload_makes_it_worse(plain: Appliance) -> None:
    expect(plain, OFFLOADS)


def test_legs_that_carry_less_than_a_vm_sends_are_a_black_hole(plain: Appliance) -> None:
    """A limit, told in docs/mtu.md: the switch drops what is too long for a leg, and nobody says so."""
    found = measure(plain, Cell("9000, legs 1600", (9000, 9000), legs=1600))
    for family in (4, 6):
        assert found[DIRECT, family].transfer
        assert not found[DIRECT, family].lost
        assert found[INSPECTED, family].find_worse(found[DIRECT, family])
        assert not found[INSPECTED, family].hostile


def test_super_packets_arrive_whole_and_are_inspected(super_packets: Appliance) -> None:
    # Open vSwitch 3.1 cuts them to the MTU of the port that they leave by, so that of a leg counts.
    cells = (Cell("as the lab is"), *OFFLOADS)
    expect(super_packets, tuple(replace(one, legs=max(one.mtus) + 4) for one in cells))


def test_super_packets_are_cut_too_long_for_a_vm_by_a_leg_with_a_larger_mtu(
    super_packets: Appliance,
) -> None:
    """A limit, told in docs/mtu.md."""
    found = measure(super_packets, Cell("all, legs 1600", on=FEATURES, legs=1600))
    for family in (4, 6):
        assert found[DIRECT, family].transfer
        assert not found[INSPECTED, family].transfer
        assert not found[INSPECTED, family].hostile
