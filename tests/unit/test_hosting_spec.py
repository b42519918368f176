"""`host.yaml`: what is wrong is told with its path; ports are the same each time, BFD addresses a secret."""

from __future__ import annotations

import uuid
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
import yaml

from appliance.cli import run_cli
from appliance.firstboot.certificates import Pair, judge_pair
from appliance.firstboot.offer import Offered, build_mapping, read_offer
from appliance.firstboot.parse import read_seed
from appliance.hosting.pki import issue
from appliance.hosting.spec import (
    HostSpec,
    build_digest,
    build_ports,
    parse_spec,
    render_connection,
    render_listener,
)
from appliance.hosting.vm import build_seed, check_paths, check_seed, render_domain, render_seed
from steering.errors import WrongInput
from tests.support.host_specs import SPEC, TOKEN

SECRET = bytes(32)


def change(**changes: object) -> str:
    return yaml.safe_dump({**yaml.safe_load(SPEC), **changes})


def find_faults(text: str) -> dict[str, str]:
    with pytest.raises(WrongInput) as told:
        parse_spec(text)
    return {fault.path: fault.reason for fault in told.value.faults}


@pytest.mark.parametrize(
    ("changes", "path", "reason"),
    [
        ({"name": "a b"}, "name", "is not of the form"),
        ({"name": "$(reboot)"}, "name", "is not of the form"),
        ({"address": "hv-1"}, "address", "does not appear to be"),
        ({"address": "0.0.0.0"}, "address", "one address of a host"),
        ({"address": 'fd00::1%") system("reboot") ("'}, "address", "without a zone"),
        ({"address": "::ffff:192.0.2.10"}, "address", "one address of a host"),
        ({"address": "255.255.255.255"}, "address", "one address of a host"),
        ({"address": "fe80::1"}, "address", "link-local"),
        ({"name": "HV-1.example.org"}, "name", "is not of the form"),
        ({"lanes": [{"profile": "prevent", "vlan": True}]}, "lanes[0].vlan", "valid integer"),
        ({"lanes": [{"profile": "prevent", "vlan": "12"}]}, "lanes[0].vlan", "valid integer"),
        ({"vm": {"management": {"bridge": "b", "address": "fd00::1%x/64"}}}, "vm.management.address",
         "ADDRESS/PREFIX"),
        ({"bridge": "br int"}, "bridge", "is not of the form"),
        ({"bridge": "a" * 16}, "bridge", "is not of the form"),
        ({"directory": "/etc/../root"}, "directory", "is not of the form"),
        ({"directory": "/etc/a;reboot"}, "directory", "is not of the form"),
        ({"vmDirectory": "relative"}, "vmDirectory", "is not of the form"),
        ({"ovsdbPort": 6653}, "(file)", "are the same"),
        ({"lanes": []}, "lanes", "at least 1"),
        ({"lanes": [{"profile": "prevent", "vlan": 4095}]}, "lanes[0].vlan", "4094"),
        ({"lanes": [{"profile": "prevent", "vlan": 1}, {"profile": "prevent", "vlan": 2}]}, "(file)",
         "the same profile"),
        ({"lanes": [{"profile": "prevent", "vlan": 1}, {"profile": "detect", "vlan": 1}]}, "(file)",
         "the same vlan"),
        ({"firstOfport": 100}, "firstOfport", "32768"),
        ({"tls": "none"}, "tls", "issue"),
        ({"colour": "red"}, "colour", "unknown key"),
        ({"vm": {}}, "vm.management", "must be given"),
        ({"vm": {"management": {}}}, "vm.management", "give bridge"),
        ({"vm": {"management": {"bridge": "br-int"}}}, "(file)", "the bridge that is steered"),
        ({"vm": {"management": {"bridge": "b", "address": "192.0.2.10/24"}}}, "(file)",
         "the host's own address"),
        ({"address": "fd00::1", "vm": {"management": {"bridge": "b", "address": "fd00:0::1/64"}}}, "(file)",
         "the host's own address"),
        ({"vm": {"management": {"bridge": "b", "gateway": "192.0.2.1"}}}, "vm.management", "DHCP"),
        ({"vm": {"management": {"bridge": "b", "address": "192.0.2.1"}}}, "vm.management.address",
         "ADDRESS/PREFIX"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_path(
    changes: dict[str, object], path: str, reason: str
) -> None:
    faults = find_faults(change(**changes))
    assert path in faults
    assert reason in faults[path]


def test_a_file_with_two_documents_or_none_is_refused() -> None:
    assert "2 documents" in find_faults(f"{SPEC}---\n{SPEC}")["(file)"]
    assert "0 documents" in find_faults("")["(file)"]


def test_a_file_without_an_end_is_not_read_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["host", "prepare", "/dev/zero"]) == 2
    assert "/dev/zero: longer than 524288 bytes" in capsys.readouterr().err


def test_ports_are_the_same_each_time_and_their_numbers_no_vm_s() -> None:
    spec = parse_spec(SPEC)
    ports = build_ports(spec, SECRET)
    assert ports == build_ports(parse_spec(SPEC), SECRET)
    assert [port.interface for port in ports] == [
        "hp-prev-a", "hp-prev-b", "hp-prev-c", "hp-det-a", "hp-det-b", "hp-canary"
    ]  # fmt: skip
    assert len({port.ofport for port in ports}) == len(ports)
    assert all(32768 <= port.ofport <= 65279 for port in ports)
    assert len({port.mac for port in ports}) == len(ports)
    assert all(port.mac.startswith("02:") for port in ports)


def test_the_bfd_address_is_a_lane_s_own_and_can_t_be_made_from_the_spec() -> None:
    ports, others = (build_ports(parse_spec(SPEC), secret) for secret in (SECRET, b"x" * 32))
    by_lane = {port.profile: port.bfd_mac for port in ports if port.bfd_mac}
    assert len(set(by_lane.values())) == 2
    assert [p.leg for p in ports if p.bfd_mac] == ["a", "b", "a", "b"]
    assert not {p.bfd_mac for p in ports if p.bfd_mac} & {p.bfd_mac for p in others if p.bfd_mac}
    assert [p.mac for p in ports] == [p.mac for p in others]


def test_an_ipv6_address_stands_in_brackets() -> None:
    spec = parse_spec(change(address="FD00::0010"))
    assert render_listener(spec, 6640) == "pssl:6640:[fd00::10]"
    assert render_connection(spec, 6640) == "ssl:[fd00::10]:6640"


def test_the_digest_is_of_what_the_switch_is_told() -> None:
    digest = build_digest(parse_spec(SPEC))
    assert digest == build_digest(parse_spec(SPEC))
    assert digest != build_digest(parse_spec(change(bfdMilliseconds=100)))
    vm = {**yaml.safe_load(SPEC)["vm"], "memoryMiB": 8192}
    assert digest == build_digest(parse_spec(change(vm=vm)))
    # With other keys the appliance would be cut off.
    assert len({build_digest(parse_spec(SPEC), ca) for ca in ("", "one CA", "another")}) == 3
    assert build_digest(parse_spec(SPEC)) == digest
    # By its name files are called, of which those of an earlier one would stay.
    assert digest != build_digest(parse_spec(change(vm={**vm, "name": "other"})))


def test_the_vm_has_the_taps_that_the_switch_expects() -> None:
    spec = parse_spec(SPEC)
    ports = build_ports(spec, SECRET)
    domain = ElementTree.fromstring(render_domain(spec, ports))  # noqa: S314 - our own
    taps = domain.findall("devices/interface[@type='ethernet']")
    shown = [
        (tap.find("target").get("dev"), tap.find("mac").get("address"), tap.find("mtu").get("size"))  # type: ignore[union-attr]
        for tap in taps
    ]
    assert shown == [(port.interface, port.mac, "1504") for port in ports]
    assert domain.find("devices/interface[@type='bridge']/source").attrib == {"bridge": "br-mgmt"}  # type: ignore[union-attr]
    seed = yaml.safe_load(render_seed(spec, ports, None, TOKEN))["hairpin"]
    assert seed["api"] == {"token": TOKEN}
    assert seed["lanes"][0]["legC"] == {"interface": "hp-prev-c", "mac": ports[2].mac}
    assert "legC" not in seed["lanes"][1]
    assert seed["canary"]["interface"] == "hp-canary"


def render_vm(**changes: object) -> ElementTree.Element:
    spec = parse_spec(change(vm={**yaml.safe_load(SPEC)["vm"], **changes}))
    return ElementTree.fromstring(render_domain(spec, build_ports(spec, SECRET)))  # noqa: S314 - our own


def test_the_firmware_is_never_one_with_the_keys_of_others() -> None:
    def find_features(domain: ElementTree.Element) -> dict[str, str]:
        return {
            one.attrib["name"]: one.attrib["enabled"]
            for one in domain.findall("os[@firmware='efi']/firmware/feature")
        }

    # Left to itself libvirt 9.0 and 11.3 took Debian's with Microsoft's keys, which trusts nothing of the image.
    assert find_features(render_vm()) == {"secure-boot": "yes", "enrolled-keys": "no"}
    assert find_features(render_vm(secureBoot=False)) == {
        "secure-boot": "no",
        "enrolled-keys": "no",
    }


def test_an_emulated_vm_has_a_cpu_that_can_be_emulated() -> None:
    cpus = {
        kind: (domain.attrib["type"], domain.find("cpu").attrib["mode"])  # type: ignore[union-attr]
        for kind in ("kvm", "qemu")
        for domain in (render_vm(virtType=kind),)
    }
    # libvirt: "CPU mode 'host-passthrough' ... is not supported" without KVM.
    assert cpus == {"kvm": ("kvm", "host-passthrough"), "qemu": ("qemu", "maximum")}
    assert render_vm().attrib["type"] == "kvm"


def test_a_vm_that_is_defined_again_is_the_same_one() -> None:
    # With another UUID libvirt refuses it: "domain 'hairpin' already exists with uuid ...".
    first, again = render_vm().findtext("uuid"), render_vm(memoryMiB=8192).findtext("uuid")
    assert first == again
    assert first != render_vm(name="other").findtext("uuid")
    assert uuid.UUID(first).version == 5


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({}, []),
        ({"vmDirectory": "/srv/hairpin"}, []),
        ({"vmDirectory": "/etc/hairpin-host"}, ["vmDirectory"]),
        ({"vmDirectory": "/usr/local/lib/hairpin"}, ["vmDirectory"]),
        ({"vmDirectory": "/lib64"}, ["vmDirectory"]),
        ({"vmDirectory": "/etc", "vm": {"image": "/usr/share/hairpin.raw"}}, ["vmDirectory", "vm.image"]),
    ],
)  # fmt: skip
def test_files_that_apparmor_gives_to_no_vm_are_told_before_it_starts(
    changes: dict[str, Any], places: list[str]
) -> None:
    vm = {**yaml.safe_load(SPEC)["vm"], **changes.get("vm", {})}
    spec = parse_spec(change(**{**changes, "vm": vm}))
    if not places:
        return check_paths(spec)
    with pytest.raises(WrongInput) as told:
        check_paths(spec)
    assert [fault.path for fault in told.value.faults] == places


def test_the_first_boot_takes_the_seed_that_a_host_is_prepared_with() -> None:
    spec = parse_spec(SPEC)
    pki = issue(spec.name, spec.names, spec.address, 1_800_000_000.0)
    text = render_seed(spec, build_ports(spec, SECRET), pki, TOKEN)
    offer, faults = read_offer(Offered({"hairpin.seed": text.encode()}))
    assert faults == ()
    reading = read_seed(build_mapping(offer))
    assert reading.faults == ()
    assert reading.document is not None
    lanes = [lane.profile for lane in reading.document.lanes]
    assert lanes == [lane.profile for lane in spec.lanes]


def test_a_key_that_stands_twice_is_told() -> None:
    assert find_faults(f"{SPEC}bridge: br-ex\n") == {"bridge": "stands here more than once"}


@pytest.mark.parametrize(
    ("management", "path", "reason"),
    [
        ({"address": "192.0.2.0/24"}, "vm.management.address", "not an address that a host"),
        ({"address": "127.0.0.1/8"}, "vm.management.address", "not an address that a host"),
        ({"address": "192.0.2.20/24", "gateway": "198.51.100.1"}, "vm.management",
         "the gateway is not in"),
        ({"address": "192.0.2.20/24", "dns": ["192.0.2.1"] * 5}, "vm.management.dns", "at most 4"),
    ],
)  # fmt: skip
def test_what_the_first_boot_would_refuse_is_told_on_the_host(
    management: dict[str, object], path: str, reason: str
) -> None:
    spec = parse_spec(change(vm={"management": {"bridge": "br-mgmt", **management}}))
    with pytest.raises(WrongInput) as told:
        check_seed(spec, build_ports(spec, SECRET))
    assert [(one.path, reason in one.reason) for one in told.value.faults] == [(path, True)]
    right = parse_spec(SPEC)
    check_seed(right, build_ports(right, SECRET))


def test_a_seed_that_is_cut_off_is_never_taken() -> None:
    spec = parse_spec(SPEC)
    pki = issue(spec.name, spec.names, spec.address, 1_800_000_000.0)
    text = render_seed(spec, build_ports(spec, SECRET), pki, TOKEN).rstrip()

    def is_taken(part: str) -> bool:
        offer, faults = read_offer(Offered({"hairpin.seed": part.encode()}))
        document = read_seed(build_mapping(offer)).document
        if faults or document is None:
            return False
        # A key that is cut off is found later, by who reads it.
        pair = Pair(document.switch.certificate, document.switch.key)
        return not judge_pair("switch", pair, 1_800_000_000.0, "client").faults

    ends = [place for place, char in enumerate(text) if char == "\n"]
    assert [place for place in ends if is_taken(text[:place])] == []
    assert is_taken(text)


def test_no_secret_is_in_what_others_may_read() -> None:
    spec: HostSpec = parse_spec(SPEC)
    ports = build_ports(spec, SECRET)
    pki = issue(spec.name, spec.names, spec.address, 1_800_000_000.0)
    seed = build_seed(spec, ports, pki, TOKEN)["hairpin"]
    assert seed["switch"]["key"] == pki.appliance.key
    assert seed["api"] == {"token": TOKEN, "certificate": pki.api.certificate, "key": pki.api.key}
    for secret in (pki.ca.key, pki.host.key):
        assert secret not in str(seed)
    domain = render_domain(spec, ports)
    assert TOKEN not in domain
    assert "PRIVATE" not in domain
    assert not any(port.bfd_mac and port.bfd_mac in domain for port in ports)
