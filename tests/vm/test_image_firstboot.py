"""First boot in the image itself: by a credential and by disks, right and wrong; its bundle, and a month off.

Each boot answers several questions: under TCG one takes a minute or two.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from appliance.api.documents import Health
from appliance.cli import run_cli
from steering.errors import HairpinError
from tests.support.disk_images import find_partition, flip_byte
from tests.support.qemu import Vm, VmFault, VmSpec, run_vm, write_seed
from tests.support.tls_switch import open_tls_switch
from tests.support.vm_probe import build_probe, read_probe
from tests.support.vm_seed import (
    LEGS,
    OFPORTS,
    VmHost,
    build_host,
    give_seed,
    render_user_data,
    write_iso,
)
from tests.vm.test_image_boot import DISK_BYTES, Inside, parse_facts

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]

RULE = 'alert tcp any any -> any any (msg:"of the bundle"; content:"of-the-bundle"; sid:1999001; rev:1;)\n'
BUNDLE = "hairpin/bundle"
DAYS_OFF = 30
READY_SECONDS = 1200.0
"""To an engine with rules: several programs start and two rulesets are tried, under TCG beside others."""
TOLD_SECONDS = 15.0
LOOK = """
n=0; while [ $n -lt 240 ] && ! grep -qs running /run/hairpin/inspection.json; do sleep 1; n=$((n+1)); done
n=0; while [ $n -lt 240 ] && ! systemctl is-active -q systemd-bless-boot; do sleep 1; n=$((n+1)); done
echo [keys] $(stat -c '%a/%U' /run/hairpin-config/api.key /run/hairpin-config/switch.key /var/lib/hairpin/token)
echo [kept] $(stat -c '%a/%U' /var/lib/hairpin-firstboot /var/lib/hairpin-firstboot/accepted.json)
echo [kernels] $(ls /boot/EFI/Linux)
echo [boots] $(cat /run/hairpin-boot/versions.json)
echo [failed] $(systemctl --failed --no-legend --plain | cut -d' ' -f1)
echo [copy] $(ps -C ovs-vswitchd -o user= -o args= | head -n 1)
echo [name] $(hostname)
echo [addresses] $(ip -br -4 addr)
echo [client] $(HOME=/tmp hairpin health --json | tr -d '\\n' | head -c 200)
"""
NOTHING = """
n=0; while [ $n -lt 120 ] && ! systemctl is-active -q hairpin-setup-health; do sleep 1; n=$((n+1)); done
echo [units] $(systemctl is-active hairpin-inspect hairpin-serve hairpin-observe hairpin-setup-health)
echo [processes] $(ps -eo args | grep -E 'suricata|hairpin (serve|inspect|observe)' | grep -v grep)
echo [config] $(ls /run/hairpin-config) $(ls /var/lib/hairpin)
echo [links] $(ip -br link | cut -d' ' -f1)
echo [up] $(ip -br link show up | cut -d' ' -f1)
echo [tables] $(nft list tables)
"""


@pytest.fixture(scope="module")
def host() -> Iterator[VmHost]:
    # Short: sockets lie in it.
    with (
        tempfile.TemporaryDirectory(prefix="hp-") as name,
        open_tls_switch(Path(name), OFPORTS, time.time()) as tls,
    ):
        yield build_host(tls, Path(name))


@pytest.fixture(scope="module")
def refreshed(
    image: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of the image with a rules bundle of one rule, put in while it did not run."""
    at = tmp_path_factory.mktemp("refreshed")
    disk, rules = at / "disk.raw", at / "one.rules"
    shutil.copyfile(image, disk)
    rules.write_text(RULE)
    argv = ["image", "refresh", str(disk), "--rules", str(rules)]
    assert run_cli([*argv, "--key", str(keys[0]), "--certificate", str(keys[1])]) == 0
    return disk


def flip_bundle(disk: Path) -> None:
    """A byte in each of its copies."""
    part = find_partition(disk, "hairpin-rules")
    for at in (part.offset + 300, part.offset + part.size // 2 + 300):
        flip_byte(disk, at)


@pytest.fixture(scope="module")
def configured(
    host: VmHost, refreshed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Inside, Health, str]]:
    """First boot by a credential. It is switched off in order at the end: its disk is used again."""
    at = tmp_path_factory.mktemp("vm")
    spec = VmSpec(
        disk=refreshed,
        directory=at,
        disk_bytes=DISK_BYTES,
        nics=host.nics,
        credentials=build_probe("look", LOOK),
        options=give_seed(at / "seed.json", host.build_seed()),
    )
    with run_vm(spec) as vm:
        health = wait_for_the_bundle(host, vm, uses_bundle)
        facts = parse_facts(read_probe(vm, "look", READY_SECONDS))
        fingerprint = host.open_client()[1]
        vm.wait_for(fingerprint, 120.0)
        yield Inside(vm, facts), health, fingerprint


def is_inspecting(health: Health) -> bool:
    """The engine runs, the switch is reached. Both take a while, and fail now and then, on an emulated machine."""
    parts = health.components
    running = all(one.engine == "running" and one.rules_loaded for one in parts.lanes)
    return bool(parts.lanes) and running and parts.switch.status == "ok"


def uses_bundle(health: Health) -> bool:
    return is_inspecting(health) and BUNDLE in health.components.rules.detail


def refuses_bundle(health: Health) -> bool:
    return is_inspecting(health) and "is not used" in health.components.rules.detail


def wait_for_the_bundle(
    host: VmHost, vm: Vm, wanted: Callable[[Health], bool], before: int = 0
) -> Health:
    """Until its use or its refusal is done with, by the event, of which there were ``before``, and the engines too.

    An engine loads rules for some seconds, and its supervisor tells of them now and then.
    """
    host.wait_for_health(vm, wanted, READY_SECONDS)
    deadline = time.monotonic() + READY_SECONDS
    while count_events(host, "rules.bundle") <= before:
        if time.monotonic() > deadline:
            raise VmFault(f"no event tells of the bundle\n{vm.read_console()[-6000:]}")
        time.sleep(2.0)
    time.sleep(TOLD_SECONDS)
    return host.wait_for_health(vm, wanted, READY_SECONDS)


def count_events(host: VmHost, kind: str) -> int:
    try:
        events = host.open_client()[0].find_events({}).items
    except (OSError, HairpinError):
        return 0  # emulated, it answers late now and then
    return sum(one.kind == kind for one in events)


def test_a_right_seed_makes_an_appliance(configured: tuple[Inside, Health, str]) -> None:
    inside, health, _ = configured
    assert health.name == "rack-12"
    assert health.components.switch.status == "ok", health.model_dump_json(indent=1)
    assert inside["name"] == "rack-12"
    assert inside["failed"] == ""
    assert "10.0.2.15/24" in inside["addresses"]
    assert inside["keys"] == "600/hairpin 600/hairpin 600/hairpin"
    assert inside["kept"] == "700/root 600/root"


def test_the_console_shows_who_it_is_and_how_it_is(configured: tuple[Inside, Health, str]) -> None:
    inside, _, fingerprint = configured
    console = inside.vm.read_console()
    assert "=== Hairpin rack-12, version " in console
    assert f"SHA-256 {fingerprint}" in console
    assert "seed       taken at this boot" in console
    assert "login:" not in console


def test_roots_commands_know_the_service_by_its_certificate(
    configured: tuple[Inside, Health, str],
) -> None:
    assert '"name": "rack-12"' in configured[0]["client"]


def test_the_ledgers_copy_of_the_switch_runs_without_a_privilege(
    host: VmHost, configured: tuple[Inside, Health, str]
) -> None:
    health = host.wait_for_health(configured[0].vm, lambda one: True, 60.0)
    assert [one.reason for one in health.problems if "are not proved" in one.reason] == []
    assert configured[0]["copy"].startswith("hairpin ovs-vswitchd")


def test_the_first_version_is_kept(configured: tuple[Inside, Health, str]) -> None:
    version = json.loads(configured[0]["boots"])["versions"]
    assert [one["running"] for one in version] == [True]
    # Without the count of tries: it was found good.
    assert f"hairpin_{version[0]['version']}.efi" in configured[0]["kernels"].split()


def test_the_bundle_of_the_image_is_used(configured: tuple[Inside, Health, str]) -> None:
    _, health, _ = configured
    assert f"{BUNDLE} read" in health.components.rules.detail
    assert health.components.rules.status == "ok"


@pytest.fixture(scope="module")
def years_later(
    host: VmHost, refreshed: Path, configured: tuple[Inside, Health, str]
) -> Iterator[tuple[Inside, Health, int]]:
    """The same VM, switched off in order, started DAYS_OFF days later without its seed, its bundle damaged."""
    inside, before, _ = configured
    inside.vm.press_power()
    inside.vm.wait_ended(240.0)
    flip_bundle(refreshed)
    later = datetime.now(UTC) + timedelta(days=DAYS_OFF)
    spec = VmSpec(
        disk=refreshed,
        directory=inside.vm.spec.directory,
        nics=host.nics,
        options=("-rtc", f"base={later:%Y-%m-%dT%H:%M:%S}"),
    )
    began = len(inside.vm.read_console())
    with run_vm(spec) as vm:
        health = wait_for_the_bundle(host, vm, refuses_bundle, before=1)
        vm.wait_for("seed       none is offered now; as accepted at", 180.0, after=began)
        yield Inside(vm, {}), health, before.components.lanes[0].rules_loaded


def test_after_a_month_off_it_inspects_and_says_that_its_rules_are_old(
    years_later: tuple[Inside, Health, int],
) -> None:
    _, health, _ = years_later
    assert health.status != "ok"
    assert health.components.rules.status == "degraded"
    reasons = [one.reason for one in health.problems]
    assert any(f"of {BUNDLE} were last read 30 days ago" in one for one in reasons), reasons


def test_a_bundle_that_was_damaged_since_is_told_and_the_kept_one_used(
    years_later: tuple[Inside, Health, int],
) -> None:
    _, health, before = years_later
    assert health.components.lanes[0].rules_loaded == before
    assert "the rules bundle is not used: copy 1" in health.components.rules.detail


@pytest.fixture(scope="module")
def by_disk(
    host: VmHost,
    refreshed: Path,
    years_later: tuple[Inside, Health, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Inside, Health, int]]:
    """A new appliance, its seed on a vfat disk, and a bundle that is damaged since it was built."""
    years_later[0].vm.kill()
    at = tmp_path_factory.mktemp("vm")
    files = {
        "user-data": render_user_data(host.build_seed()),
        "meta-data": "local-hostname: not-this-one\n",
    }
    seed = write_seed(at / "seed.img", files)
    spec = VmSpec(disk=refreshed, directory=at / "vm", nics=host.nics, drives=(seed,))
    with run_vm(spec) as vm:
        health = wait_for_the_bundle(host, vm, refuses_bundle)
        yield Inside(vm, {}), health, years_later[2]


def test_a_vfat_disk_configures_it(by_disk: tuple[Inside, Health, int]) -> None:
    assert by_disk[1].name == "rack-12"
    assert by_disk[1].components.switch.status == "ok"


def test_with_a_damaged_bundle_the_roots_rules_are_used(
    by_disk: tuple[Inside, Health, int],
) -> None:
    _, health, with_bundle = by_disk
    assert health.components.lanes[0].rules_loaded == with_bundle - 1
    assert health.status != "ok"
    assert "the rules bundle is not used: copy 1" in health.components.rules.detail


@pytest.fixture(scope="module")
def refused(
    host: VmHost,
    image: Path,
    by_disk: tuple[Inside, Health, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Inside]:
    """A seed on an iso9660 disk with two faults: a leg that is no device of the VM, a VLAN that is none."""
    by_disk[0].vm.kill()
    at = tmp_path_factory.mktemp("vm")
    seed = host.build_seed()
    seed["lanes"][0]["vlan"] = 4095
    seed["canary"]["mac"] = "not-a-mac"
    disk = write_iso(at / "seed.iso", {"user-data": render_user_data(seed), "meta-data": "{}\n"})
    spec = VmSpec(
        disk=image,
        directory=at / "vm",
        nics=host.nics,
        drives=(disk,),
        credentials=build_probe("nothing", NOTHING),
    )
    with run_vm(spec) as vm:
        yield Inside(vm, parse_facts(read_probe(vm, "nothing", READY_SECONDS)))


def test_a_wrong_seed_is_told_on_the_console(refused: Inside) -> None:
    refused.vm.wait_for(r"health +failing: not configured, first boot failed", 120.0)
    console = refused.vm.read_console()
    for path in ("lanes[0].vlan", "canary.mac"):
        assert f"  ! {path}: " in console
    assert "http://...:8470/health" in console


def ask_once_it_listens(port: int, seconds: float) -> urllib.error.HTTPError:
    """The refusal that it answers with. Its unit is active before its program listens."""
    url = f"http://127.0.0.1:{port}/health"
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=20)
        except urllib.error.HTTPError as refusal:
            return refusal
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)
        else:
            pytest.fail(f"{url} is answered as if all were well")


def test_a_wrong_seed_is_told_by_health(host: VmHost, refused: Inside) -> None:
    told = ask_once_it_listens(host.port, 120.0)
    assert told.code == 503
    health = Health.model_validate_json(told.read())
    assert health.status == "failing"
    found = {one.reason.partition(":")[0] for one in health.problems}
    assert found == {"lanes[0].vlan", "canary.mac"}


def test_with_a_wrong_seed_nothing_of_the_product_runs(refused: Inside) -> None:
    assert refused["units"] == "inactive inactive inactive active"
    assert refused["processes"] == ""
    assert refused["config"].split() == ["faults.json"]


def test_with_a_wrong_seed_no_leg_is_touched(refused: Inside) -> None:
    """No bridge, no rule, each leg as the kernel made it: nobody answers BFD, so `onFailure` holds."""
    names = set(refused["links"].split())
    assert len(names) == len(LEGS) + 2  # the management device, loopback
    assert len(refused["up"].split()) == 2, refused["up"]
    assert refused["tables"] == ""
