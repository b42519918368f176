"""From a seed and devices to files: what they say, who owns them, and that a fault leaves none."""

from __future__ import annotations

import configparser
import contextlib
import ssl
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from appliance.firstboot.certificates import (
    Pair,
    find_fingerprint,
    is_usable,
    judge_pair,
    make_pair,
    rewrite_certificates,
)
from appliance.firstboot.faults import Fault
from appliance.firstboot.network import Device
from appliance.firstboot.parse import read_seed
from appliance.firstboot.plan import CONFIG_DIR, SETTINGS, Plan, build_plan
from appliance.settings import parse_settings
from steering.model import Profile
from tests.support.certificates import NOW, issue, render_key
from tests.support.seed import (
    DEVICES,
    TOKEN,
    build_seed,
    change,
    find_authority,
    find_switch_pair,
)

SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
AT = NOW.timestamp()
OWN = make_pair("rack-12", "192.0.2.10", AT)


def plan(
    seed: dict[str, Any],
    devices: tuple[Device, ...] = DEVICES,
    *,
    accepted: bool = False,
    now: float = AT,
) -> Plan | tuple[Fault, ...]:
    reading = read_seed(seed)
    assert reading.document is not None, reading.faults
    return build_plan(reading.document, devices, OWN, now, accepted=accepted)


def build(seed: dict[str, Any]) -> Plan:
    made = plan(seed)
    assert isinstance(made, Plan), made
    return made


def find_faults(seed: dict[str, Any], *args: Any, **more: Any) -> dict[str, str]:
    made = plan(seed, *args, **more)
    assert not isinstance(made, Plan)
    assert all(fault.path and fault.reason and fault.mend for fault in made)
    return {fault.path: fault.reason for fault in made}


def read_text(made: Plan, path: str) -> str:
    (file,) = [file for file in made.files if file.path == path]
    return file.text


def read_network(made: Plan, name: str) -> dict[str, dict[str, list[str]]]:
    """A networkd file: values by section and key, a list of them each."""
    found: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in read_text(made, f"/run/systemd/network/{name}").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(section, {}).setdefault(key, []).append(value)
    return found


def test_the_settings_are_those_of_the_seed_and_are_taken_by_the_other_processes() -> None:
    made = build(change("visibility", {"mac": "52:54:00:10:03:01"}))
    assert made.files[-1].path == SETTINGS
    settings = parse_settings(made.files[-1].text)
    (lane,) = settings.build_lanes(4)
    assert (settings.name, lane.profile, lane.vlan) == ("rack-12", Profile.PREVENT, 101)
    assert (lane.leg_a.interface, lane.leg_a.device) == ("leg-prevent-a", "ens4")
    assert lane.leg_b.device == "ens5"
    assert (settings.canary.interface, settings.canary.device) == ("hairpin-canary", "ens6")
    assert settings.visibility.device == "ens7"
    assert settings.switch.ovsdb == "ssl:192.0.2.2:6640"
    assert settings.switch.tls is not None
    assert settings.switch.tls.server_name == "hv-1.example.org"
    assert (settings.api.listen, settings.api.port) == ("0.0.0.0", 8470)
    assert [one.name for one in settings.rules.sources] == ["et/open"]
    assert (settings.export[0].host, settings.export[0].transport) == ("siem.example.org", "tls")
    assert str(settings.state_dir) == "/var/lib/hairpin"


def test_every_file_that_the_settings_name_is_written_before_them() -> None:
    receiver = {
        "name": "siem",
        "host": "siem.example.org",
        "ca": find_authority().certificate,
        "certificate": build_seed()["switch"]["certificate"],
        "key": build_seed()["switch"]["key"],
    }
    made = build(change("export", [receiver]))
    settings = parse_settings(made.files[-1].text)
    tls, out = settings.switch.tls, settings.export[0]
    assert tls is not None
    named = {
        settings.api.cert_file, settings.api.key_file, settings.token_file,
        tls.ca_file, tls.cert_file, tls.key_file, out.ca_file, out.cert_file, out.key_file,
    }  # fmt: skip
    written = {Path(file.path) for file in made.files[:-1]}
    assert named <= written
    assert all(one.parent == Path(CONFIG_DIR) for one in named - {settings.token_file})


def test_secrets_are_for_the_services_user_alone_and_stand_nowhere_else() -> None:
    made = build(build_seed())
    key = build_seed()["switch"]["key"]
    for file in made.files:
        secret = any(text.strip() in file.text for text in (TOKEN, key, OWN.key))
        # Who is not root has no use for the note by which root's commands find the service.
        mode = 0o600 if file.path.endswith("/client.json") else 0o644
        assert (file.mode, file.owner) == ((0o600, "hairpin") if secret else (mode, "root"))
    assert TOKEN not in repr(made)
    assert "PRIVATE KEY" not in repr(made)


def test_only_the_management_device_has_an_address() -> None:
    made = build(build_seed())
    management = read_network(made, "10-hairpin-management.network")
    assert management["Match"] == {"MACAddress": ["52:54:00:10:00:01"], "Name": ["ens3"]}
    network = management["Network"]
    assert network["Address"] == ["192.0.2.10/24"]
    assert (network["Gateway"], network["DNS"]) == (["192.0.2.1"], ["192.0.2.53"])
    assert network["DHCP"] == network["LinkLocalAddressing"] == network["IPv6AcceptRA"] == ["no"]
    assert network["LLMNR"] == network["MulticastDNS"] == network["EmitLLDP"] == ["no"]
    lanes = read_network(made, "20-hairpin-lanes.network")
    assert lanes["Match"]["Name"] == ["ens4 ens5 ens6"]
    assert lanes["Link"]["ActivationPolicy"] == ["manual"]
    assert lanes["Link"]["ARP"] == lanes["Network"]["LinkLocalAddressing"] == ["no"]
    assert lanes["Network"]["LLMNR"] == lanes["Network"]["DHCP"] == ["no"]
    assert lanes["Network"]["KeepMaster"] == ["yes"]
    assert not {"Address", "Gateway", "DNS"} & set(lanes["Network"])
    assert not any("mirror" in file.path for file in made.files)
    for file in made.files:
        if file.path.endswith(".network"):
            configparser.ConfigParser(strict=False, interpolation=None).read_string(file.text)


def test_dhcp_and_ipv6_are_configured_as_they_need() -> None:
    mac = build_seed()["management"]["mac"]
    dhcp = build(change("management", {"mac": mac, "dhcp": True}))
    found = read_network(dhcp, "10-hairpin-management.network")
    assert found["Network"]["DHCP"] == ["ipv4"]
    assert found["DHCPv4"] == {"UseHostname": ["no"], "UseDomains": ["no"]}
    assert parse_settings(dhcp.files[-1].text).api.listen == "0.0.0.0"
    address = {"mac": mac, "address": "fd00::10/64", "gateway": "fe80::1"}
    v6 = build(change("management", address))
    found = read_network(v6, "10-hairpin-management.network")
    assert found["Network"]["LinkLocalAddressing"] == ["ipv6"]
    assert found["Network"]["IPv6AcceptRA"] == ["no"]
    assert found["Network"]["Gateway"] == ["fe80::1"]
    assert parse_settings(v6.files[-1].text).api.listen == "::"


def test_the_mirror_is_put_up_and_says_nothing() -> None:
    made = build(change("visibility", {"mac": "52:54:00:10:03:01"}))
    mirror = read_network(made, "21-hairpin-mirror.network")
    assert mirror["Match"]["Name"] == ["ens7"]
    assert mirror["Link"]["ActivationPolicy"] == ["up"]
    assert mirror["Link"]["ARP"] == mirror["Network"]["LinkLocalAddressing"] == ["no"]
    assert "ens7" not in str(read_network(made, "20-hairpin-lanes.network"))


def test_devices_that_are_not_there_are_all_told_with_those_that_are() -> None:
    faults = find_faults(build_seed(), DEVICES[:1])
    assert list(faults) == ["lanes[0].legA.mac", "lanes[0].legB.mac", "canary.mac"]
    assert "there are: ens3 52:54:00:10:00:01" in faults["canary.mac"]
    assert "there are: none" in find_faults(build_seed(), ())["management.mac"]


def test_a_device_that_can_not_be_told_apart_is_none() -> None:
    twice = (*DEVICES, Device("ens9", DEVICES[1].mac))
    assert "more than one device" in find_faults(build_seed(), twice)["lanes[0].legA.mac"]
    odd = (Device("a*", DEVICES[0].mac), *DEVICES[1:])
    assert "not usable" in find_faults(build_seed(), odd)["management.mac"]


def test_what_the_settings_refuse_is_told_too() -> None:
    lane = build_seed()["lanes"][0]
    second = {
        "profile": "prevent",
        "vlan": 101,
        "legA": {"interface": "leg-prevent-a", "mac": "52:54:00:10:09:01"},
        "legB": {"interface": "leg-b", "mac": "52:54:00:10:09:02"},
    }
    more = (*DEVICES, Device("ens8", "52:54:00:10:09:01"), Device("ens9", "52:54:00:10:09:02"))
    assert "used more than once" in find_faults(change("lanes", [lane, second]), more)["lanes"]
    assert "not consecutive" in find_faults(change("lanes.0.queues", [0, 2]))["lanes[0].queues"]


# Certificates


@pytest.mark.parametrize("section", ["switch", "api", "export.0"])
def test_keys_and_certificates_are_checked_wherever_they_stand(section: str) -> None:
    path = section.replace(".0", "[0]")
    good, other = issue("one", find_authority()), issue("other", find_authority())

    def faults(certificate: str, key: str) -> dict[str, str]:
        seed = change(f"{section}.certificate", certificate)
        return find_faults(change(f"{section}.key", key, seed))

    assert faults(good.certificate, other.key) == {f"{path}.key": "not the key of `certificate`"}
    assert faults("-----BEGIN nothing", good.key) == {
        f"{path}.certificate": "no certificate in PEM"
    }
    assert faults(good.certificate, "-----BEGIN nothing") == {
        f"{path}.key": "no private key in PEM"
    }
    locked = render_key(good.private, b"secret")
    assert faults(good.certificate, locked) == {f"{path}.key": "the private key is encrypted"}


def test_authorities_are_checked() -> None:
    assert find_faults(change("switch.ca", "-----BEGIN x")) == {
        "switch.ca": "no certificate in PEM"
    }
    assert "export[0].ca" in find_faults(change("export.0.ca", build_seed()["switch"]["key"]))


@pytest.mark.parametrize(
    ("section", "right", "wrong"),
    [("api", SERVER, CLIENT), ("switch", CLIENT, SERVER), ("export.0", CLIENT, SERVER)],
)
def test_a_certificate_for_the_other_purpose_is_refused(
    section: str, right: x509.ObjectIdentifier, wrong: x509.ObjectIdentifier
) -> None:
    def build(purpose: x509.ObjectIdentifier) -> dict[str, Any]:
        one = issue("one", find_authority(), purpose=purpose)
        return change(f"{section}.key", one.key, change(f"{section}.certificate", one.certificate))

    assert isinstance(plan(build(right)), Plan)
    path = f"{section.replace('.0', '[0]')}.certificate"
    assert "extended key usage" in find_faults(build(wrong))[path]


def test_a_certificate_of_no_authority_is_none_of_one() -> None:
    leaf = issue("leaf", find_authority()).certificate
    assert "no authority" in find_faults(change("switch.ca", leaf))["switch.ca"]


def test_openssl_reads_what_is_written_and_a_key_stands_only_where_keys_do(tmp_path: Path) -> None:
    """PEM that is indented is none for OpenSSL; a certificate's file often has its key in it, too."""
    pair, ca = find_switch_pair(), find_authority().certificate
    seed = change("switch.ca", "  " + ca.replace("\n", "\n  "))
    seed = change("switch.certificate", pair.certificate.replace("\n", "") + pair.key, seed)
    seed = change("switch.key", pair.certificate + pair.key, seed)
    made = plan(seed)
    assert isinstance(made, Plan)
    for file in made.files:
        if file.path.startswith("/run/hairpin-config/switch"):
            (tmp_path / Path(file.path).name).write_text(file.text)
            assert ("PRIVATE KEY" in file.text) == file.path.endswith(".key")
    context = ssl.create_default_context(cafile=str(tmp_path / "switch-ca.pem"))
    context.load_cert_chain(tmp_path / "switch.pem", tmp_path / "switch.key")


def test_weak_keys_are_refused_before_openssl_refuses_them_at_work() -> None:
    private = rsa.generate_private_key(65537, 1024)  # noqa: S505 - weak on purpose
    key = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
    weak = issue("weak", find_authority(), private=private)
    verdict = judge_pair("api", Pair(weak.certificate, key), AT, "server")
    assert [fault.reason for fault in verdict.faults] == ["an RSA key of 1024 bits is too weak"]


@pytest.mark.parametrize(("days", "word"), [(31, "expired at"), (-2, "not valid before")])
def test_a_new_seed_must_be_valid_now_and_an_accepted_one_is_told_of(days: int, word: str) -> None:
    now = (NOW + timedelta(days=days)).timestamp()
    faults = find_faults(build_seed(), now=now)
    assert set(faults) == {"switch.ca", "switch.certificate"}
    assert all(word in reason for reason in faults.values())
    made = plan(build_seed(), accepted=True, now=now)
    assert isinstance(made, Plan)
    assert len(made.notes) == 2
    assert all(word in note for note in made.notes)
    # What is wrong otherwise is wrong at any time.
    broken = change("switch.key", issue("other").key)
    assert "switch.key" in find_faults(broken, accepted=True, now=now)


def test_our_own_certificate_is_not_used_with_a_byte_flipped() -> None:
    whole = OWN.certificate
    for at in range(len(whole)):
        if whole[at].isspace():
            continue
        text = whole[:at] + chr(ord(whole[at]) ^ 1) + whole[at + 1 :]
        with contextlib.suppress(ValueError):
            if rewrite_certificates(text) == whole:
                continue  # bits of the text that carry nothing
        assert not is_usable(replace(OWN, certificate=text), "rack-12", "192.0.2.10", AT), at


def test_our_own_certificate_is_kept_while_it_fits() -> None:
    assert is_usable(OWN, "rack-12", "192.0.2.10", AT)
    assert not is_usable(OWN, "rack-13", "192.0.2.10", AT)
    assert not is_usable(OWN, "rack-12", "192.0.2.11", AT)
    assert not is_usable(OWN, "rack-12", None, AT)
    assert not is_usable(OWN, "rack-12", "192.0.2.10", AT + 3630 * 86400)
    assert not is_usable(replace(OWN, key=issue("x").key), "rack-12", "192.0.2.10", AT)
    assert not is_usable(Pair("x", "y"), "rack-12", "192.0.2.10", AT)
    bare = issue("rack-12")
    assert not is_usable(Pair(bare.certificate, bare.key), "rack-12", "192.0.2.10", AT)
    made = build(build_seed())
    assert made.fingerprint == find_fingerprint(OWN.certificate)
    own = issue("api", find_authority(), addresses=("192.0.2.10",))
    given = change("api.certificate", own.certificate, change("api.key", own.key))
    assert build(given).fingerprint == find_fingerprint(own.certificate)
