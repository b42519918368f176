"""The image boots under Secure Boot: sealed root, /var that grew, what lanes need, and nobody can log in."""

from __future__ import annotations

import mmap
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.disk_images import find_partition, flip_byte
from tests.support.qemu import Nic, Vm, VmSpec, run_vm
from tests.support.vm_probe import build_probe, read_probe, write_file

BOOT_SECONDS = 600.0
"""Under TCG on two busy cores; on idle ones it takes a tenth."""
DISK_BYTES = 8 * 2**30
MODULES = (
    "nft_queue", "nft_meta_bridge", "nfnetlink_queue", "br_netfilter", "sch_ingress", "cls_bpf",
    "act_mirred", "8021q", "virtio_net", "bridge", "nft_compat", "xt_NFQUEUE",
)  # fmt: skip
LOGINS = ("agetty", "login", "su", "sshd", "sulogin", "passwd")

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

SETTINGS = """
lanes:
- profile: prevent
  vlan: 101
  legA: {interface: a, device: lega}
  legB: {interface: b, device: legb}
canary: {interface: c, device: canary}
inspection: {requireHyperscan: true}
"""
DEVICES = {
    "lega": "02:48:50:00:01:0a",
    "legb": "02:48:50:00:01:0b",
    "canary": "02:48:50:00:01:0c",
}
# What `hairpin firstboot` will do: here the test hands in the settings, and it is replaced by nothing.
NO_FIRSTBOOT = "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"

# There is no curl in it.
ASK = (
    "/usr/lib/hairpin/venv/bin/python -I -c "
    '\'import http.client as h; c = h.HTTPConnection("127.0.0.1", 8470); '
    'c.request("GET", "/health"); r = c.getresponse(); print(r.status, r.read().decode())\''
)
LOOK = f"""
echo [verity] $(veritysetup status root 2>/dev/null | tr -s ' \\n' ' ') $(grep ' / ' /proc/mounts)
echo [dm] $(cat /sys/block/dm-0/dm/uuid)
echo [var] $(grep ' /var ' /proc/mounts) $(df -B1 --output=size /var | tail -n 1)
echo [failed] $(systemctl --failed --no-legend --plain | cut -d' ' -f1)
echo [secure] $(od -An -tu1 -j4 -N1 /sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c)
echo [modules] $(cut -d' ' -f1 /proc/modules)
echo [builtin] $(cat /lib/modules/*/modules.builtin | grep -oE 'virtio_net|bridge')
echo [logins] $(command -v {" ".join(LOGINS)})
echo [write] $(touch /usr/x 2>&1)
echo [machine] $(cat /etc/machine-id)
echo [lockdown] $(cat /sys/kernel/security/lockdown)
n=0; while [ $n -lt 240 ] && ! systemctl is-active -q hairpin-setup-health; do sleep 1; n=$((n+1)); done
ask() {{ {ASK} > /tmp/health.new && mv /tmp/health.new /tmp/health; }}
n=0; while [ $n -lt 120 ] && ! [ -e /tmp/health ]; do sleep 2; n=$((n+1)); ask; done
echo [health] $(cat /tmp/health)
echo [config] $(ls /run/hairpin-config)
"""
INSPECT = """
rights() { grep -hE '^(Uid|CapEff|CapBnd|NoNewPrivs)' /proc/$1/status; }
main() { systemctl show -P MainPID $1; }
engine() { pgrep -f '^/usr/bin/suricata' | head -n 1; }
n=0; while [ $n -lt 240 ] && ! grep -qs running /run/hairpin/inspection.json; do sleep 1; n=$((n+1)); done
echo [state] $(cat /run/hairpin/inspection.json)
echo [inspect] $(systemctl is-active hairpin-inspect) $(rights $(main hairpin-inspect))
echo [serve] $(systemctl is-active hairpin-serve) $(rights $(main hairpin-serve))
echo [engine] $(rights $(engine)) nice $(ps -o ni= -p $(engine))
echo [lanes] $(stat -c '%A %U %G' /run/hairpin/lanes/prevent)
journalctl -b -u hairpin-inspect -u hairpin-serve --no-pager -o cat | tail -n 12
"""


def _name_devices() -> Mapping[str, str]:
    return {
        f"network.link.10-{name}": f"[Match]\nMACAddress={mac}\n[Link]\nName={name}\n"
        for name, mac in DEVICES.items()
    }


@dataclass(frozen=True)
class Inside:
    vm: Vm
    facts: Mapping[str, str]

    def __getitem__(self, name: str) -> str:
        return self.facts[name]


def parse_facts(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\[([a-z]+)\] ?(.*)$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def inside(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    """What a VM says of itself, after one boot under firmware that enforces Secure Boot."""
    spec = VmSpec(
        disk=image,
        directory=tmp_path_factory.mktemp("vm"),
        disk_bytes=DISK_BYTES,
        secure_boot=True,
        credentials=build_probe("look", LOOK),
    )
    with run_vm(spec) as vm:
        yield Inside(vm, parse_facts(read_probe(vm, "look", BOOT_SECONDS)))


def test_the_boot_loader_enrols_the_key_and_secure_boot_is_on(inside: Inside) -> None:
    assert "Custom Secure Boot keys successfully enrolled" in inside.vm.read_console()
    assert inside["secure"].strip() == "1"
    assert "[integrity]" in inside["lockdown"] or "[confidentiality]" in inside["lockdown"]


def test_the_root_is_sealed(inside: Inside) -> None:
    assert inside["dm"].startswith("CRYPT-VERITY-")
    assert "/dev/mapper/root / erofs ro" in inside["verity"]
    assert "Read-only file system" in inside["write"]


def test_var_is_a_partition_of_its_own_that_grew(inside: Inside) -> None:
    *mount, size = inside["var"].split()
    assert mount[1:3] == ["/var", "ext4"]
    assert {"nosuid", "nodev", "noexec"} <= set(mount[3].split(","))
    # What is before it takes 2.5 GiB.
    assert int(size) > DISK_BYTES - 3 * 2**30


def test_everything_that_was_started_is_well(inside: Inside) -> None:
    # Not ours to judge here: what has no seed does not start.
    assert [unit for unit in inside["failed"].split() if not unit.startswith("hairpin-")] == []


def test_the_kernel_has_what_lanes_need(inside: Inside) -> None:
    present = {*inside["modules"].split(), *inside["builtin"].split()}
    assert [name for name in MODULES if name not in present] == []


def test_nobody_can_log_in(inside: Inside) -> None:
    assert inside["logins"] == ""
    assert "login:" not in inside.vm.read_console()


def test_the_machine_is_known_by_the_hypervisors_number(inside: Inside) -> None:
    assert inside["machine"] == inside.vm.spec.uuid.replace("-", "")


def test_without_a_seed_it_tells_so_and_nothing_of_the_product_runs(inside: Inside) -> None:
    """On the console and at `/health`, on loopback: no management network is known."""
    console = inside.vm.read_console()
    assert "(seed): there is none: neither the credential hairpin.seed nor a disk" in console
    assert "failing: not configured, first boot failed" in console
    assert inside["health"].startswith("503 ")
    assert '"status":"failing"' in inside["health"].replace(" ", "")
    assert inside["config"] == "faults.json"


def test_a_root_with_a_flipped_byte_is_not_used(
    image: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In the first block of its file system: the kernel reads it first, and starts anew."""
    at = tmp_path_factory.mktemp("flipped")
    disk = at / "disk.raw"
    shutil.copyfile(image, disk)
    label = image.name.removesuffix(".raw")
    flip_byte(disk, find_partition(disk, label).offset + 1024 + 40)
    with run_vm(VmSpec(disk=disk, directory=at / "vm")) as vm:
        vm.wait_for(r"device-mapper: verity: .* data block 0 is corrupted", BOOT_SECONDS)
        seen = len(vm.read_console())
        # The initrd gives up, and the firmware begins again.
        vm.wait_for(
            r"BdsDxe: starting|EFI stub|Linux version|verity: .* is corrupted", 300.0, after=seen
        )
        assert "Hairpin" not in vm.read_console()


def find_kernel(disk: Path, label: str) -> int:
    """Where on the disk a byte in the middle of its signed kernel image is: as its initrd has it, in no header."""
    esp = find_partition(disk, "esp")
    path = f"::/EFI/Linux/{label}+3.efi"
    argv = ["mcopy", "-i", f"{disk}@@{esp.offset}", path, "-"]
    kernel = subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout
    sample = kernel[len(kernel) // 2 :][:512]
    with (
        disk.open("rb") as stream,
        mmap.mmap(stream.fileno(), esp.offset + esp.size, prot=mmap.PROT_READ) as view,
    ):
        place = view.find(sample, esp.offset)
    assert place > 0
    return place + 100


def test_a_kernel_with_a_flipped_byte_is_not_started(
    image: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The firmware refuses it, with the image's own key enrolled by the boot loader before."""
    at = tmp_path_factory.mktemp("flipped")
    disk = at / "disk.raw"
    shutil.copyfile(image, disk)
    flip_byte(disk, find_kernel(disk, image.name.removesuffix(".raw")))
    with run_vm(VmSpec(disk=disk, directory=at / "vm", secure_boot=True)) as vm:
        enrolled = vm.wait_for("Custom Secure Boot keys successfully enrolled", BOOT_SECONDS)
        vm.wait_for("Access denied", 120.0, after=enrolled.end())
        assert "Linux version" not in vm.read_console()


@pytest.fixture(scope="module")
def inspecting(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    """A VM with settings and devices, in which the units work as they are shipped."""
    at = tmp_path_factory.mktemp("vm")
    files = write_file("/run/hairpin-config/settings.yaml", SETTINGS)
    spec = VmSpec(
        disk=image,
        directory=at,
        nics=tuple(Nic.user(mac, {}) for mac in DEVICES.values()),
        credentials={
            **_name_devices(),
            "tmpfiles.extra": files,
            "systemd.extra-unit.hairpin-firstboot.service": NO_FIRSTBOOT,
            **build_probe("inspect", INSPECT),
        },
    )
    with run_vm(spec) as vm:
        text = read_probe(vm, "inspect", BOOT_SECONDS)
        yield Inside(vm, {**parse_facts(text), "all": text})


def test_inspection_works_without_root(inspecting: Inside) -> None:
    assert '"dialect": "nftables"' in inspecting["state"], inspecting["all"]
    assert '"running"' in inspecting["state"], inspecting["all"]
    assert inspecting["inspect"].startswith("active Uid: 812 812 812 812")
    assert inspecting["lanes"] == "drwxrws--- hairpin-engine hairpin"


def test_the_engine_has_one_capability_and_its_urgency(inspecting: Inside) -> None:
    assert "Uid: 811 811 811 811" in inspecting["engine"], inspecting["all"]
    # CAP_NET_ADMIN is number 12 (capabilities(7)).
    assert f"CapEff: {1 << 12:016x} CapBnd: {1 << 12:016x}" in inspecting["engine"]
    assert inspecting["engine"].endswith("nice -10")


def test_the_api_has_no_capability(inspecting: Inside) -> None:
    assert inspecting["serve"].startswith("active Uid: 810 810 810 810"), inspecting["all"]
    assert f"CapEff: {0:016x} CapBnd: {0:016x} NoNewPrivs: 1" in inspecting["serve"]
