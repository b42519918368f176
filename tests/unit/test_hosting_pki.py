"""Certificates for one host and its appliance, and the folder in which they are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID

from appliance.hosting.keeping import ENDS, find_folder, keep
from appliance.hosting.pki import LEAF_DAYS, Pki, find_fault, issue, renew
from appliance.hosting.spec import parse_spec
from steering.errors import HairpinError
from steering.tls import TlsFiles, find_ending, find_options, split_target
from tests.support.host_specs import SPEC

NOW = 1_800_000_000.0
DAY = 86400.0
SPEC_ONE = parse_spec(SPEC)


def load(text: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(text.encode())


def build(now: float = NOW) -> Pki:
    return issue("hv-1", ["hv-1.example.org"], "192.0.2.10", now, "192.0.2.20")


def test_each_certificate_is_for_one_purpose_and_the_host_s_for_its_names() -> None:
    pki = build()
    ca, host, ours, api = (
        load(one.certificate) for one in (pki.ca, pki.host, pki.appliance, pki.api)
    )
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    for leaf, purpose in (
        (host, ExtendedKeyUsageOID.SERVER_AUTH),
        (ours, ExtendedKeyUsageOID.CLIENT_AUTH),
        (api, ExtendedKeyUsageOID.SERVER_AUTH),
    ):
        leaf.verify_directly_issued_by(ca)
        assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
            purpose
        ]
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        seconds = (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds()
        assert seconds == (LEAF_DAYS + 1) * DAY
    names = host.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hv-1", "hv-1.example.org"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.10"]
    shown = api.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert shown.get_values_for_type(x509.DNSName) == ["hv-1"]
    assert [str(one) for one in shown.get_values_for_type(x509.IPAddress)] == ["192.0.2.20"]


def test_every_host_has_a_ca_of_its_own() -> None:
    one, other = build(), build()
    with pytest.raises(InvalidSignature):
        load(one.host.certificate).verify_directly_issued_by(load(other.ca.certificate))
    assert one.ca.key != other.ca.key


@pytest.mark.parametrize(
    ("names", "address", "days", "fault"),
    [
        (["hv-1"], "192.0.2.10", 0, ""),
        (["hv-2"], "192.0.2.10", 0, "not for hv-2"),
        (["hv-1"], "192.0.2.11", 0, "not for 192.0.2.11"),
        (["hv-1"], "192.0.2.10", LEAF_DAYS - 89, "certificate ends on"),
        (["hv-1"], "192.0.2.10", LEAF_DAYS + 1, "certificate ends on"),
    ],
)
def test_what_does_not_fit_any_more_is_found(
    names: list[str], address: str, days: int, fault: str
) -> None:
    found = find_fault(build(), names, address, NOW + days * DAY)
    assert fault in found
    assert bool(found) == bool(fault)


def test_an_appliance_that_moved_needs_another_certificate() -> None:
    found = find_fault(build(), ["hv-1"], "192.0.2.10", NOW, "192.0.2.21")
    assert found == "the API's certificate is not for 192.0.2.21"
    assert find_fault(build(), ["hv-1"], "192.0.2.10", NOW, "192.0.2.20") == ""
    # By DHCP: the name is what it is known by.
    named = issue("hv-1", [], "192.0.2.10", NOW)
    assert find_fault(named, ["hv-1"], "192.0.2.10", NOW) == ""


def test_a_renewed_pair_is_by_the_same_ca_with_other_keys() -> None:
    former = build()
    now = renew(former.ca, "hv-1", [], "192.0.2.10", NOW + 600 * DAY)
    assert now.ca == former.ca
    assert {now.host.key, now.appliance.key}.isdisjoint({former.host.key, former.appliance.key})
    assert find_fault(now, ["hv-1"], "192.0.2.10", NOW + 600 * DAY) == ""
    with pytest.raises(HairpinError, match="CA ends"):
        renew(former.ca, "hv-1", [], "192.0.2.10", NOW + 3000 * DAY)


def test_a_certificate_with_another_s_key_or_ca_is_found() -> None:
    one, other = build(), build()
    for end in ("host", "appliance", "api"):
        mixed = replace(one, **{end: getattr(other, end)})
        assert "not signed by the CA" in find_fault(mixed, ["hv-1"], "192.0.2.10", NOW)
    swapped = replace(one, host=replace(one.host, key=one.appliance.key))
    assert "do not belong together" in find_fault(swapped, ["hv-1"], "192.0.2.10", NOW)


def test_the_folder_is_written_once_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    kept = keep(SPEC_ONE, folder, NOW)
    assert kept.issued
    assert folder.stat().st_mode & 0o777 == 0o700
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(
        [
            "secret",
            "token",
            *(f"{end}.{kind}" for end in ENDS for kind in ("pem", "key")),
        ]
    )
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
    again = keep(SPEC_ONE, folder, NOW + DAY)
    assert (again.secret, again.pki, again.issued) == (kept.secret, kept.pki, False)
    renewed = keep(SPEC_ONE, folder, NOW + DAY, renewed=True)
    assert renewed.pki is not None
    assert kept.pki is not None
    assert renewed.pki.ca == kept.pki.ca
    assert renewed.pki.host != kept.pki.host
    assert renewed.secret == kept.secret


def test_what_is_in_the_folder_is_not_taken_unseen(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    keep(SPEC_ONE, folder, NOW)
    (folder / "host.key").rename(folder / "away")
    with pytest.raises(HairpinError, match=r"host\.key is missing"):
        keep(SPEC_ONE, folder, NOW)
    (folder / "away").rename(folder / "host.key")
    (folder / "host.pem").write_text("no certificate\n")
    with pytest.raises(HairpinError, match="of no use"):
        keep(SPEC_ONE, folder, NOW)
    folder.chmod(0o755)
    with pytest.raises(HairpinError, match="others may look"):
        keep(SPEC_ONE, folder, NOW)
    folder.chmod(0o700)
    (folder / "secret").write_text("short\n")
    with pytest.raises(HairpinError, match="32 bytes"):
        keep(SPEC_ONE, folder, NOW)


def test_a_folder_of_somebody_else_gets_no_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was made beforehand where everybody may make one, as in /tmp."""
    (tmp_path / "keys").mkdir(mode=0o700)
    monkeypatch.setattr("os.geteuid", lambda: (tmp_path / "keys").stat().st_uid + 1)
    with pytest.raises(HairpinError, match="another user's"):
        keep(SPEC_ONE, tmp_path / "keys", NOW)
    assert not list((tmp_path / "keys").iterdir())


def test_nothing_is_renewed_by_another_ca_s_key(tmp_path: Path) -> None:
    one, other = keep(SPEC_ONE, tmp_path / "one", NOW), build()
    assert one.pki is not None
    (tmp_path / "one/ca.key").write_text(other.ca.key)
    with pytest.raises(HairpinError, match="not that of its certificate"):
        keep(SPEC_ONE, tmp_path / "one", NOW + DAY, renewed=True)
    assert (tmp_path / "one/host.pem").read_text() == one.pki.host.certificate


@pytest.mark.parametrize("renewed", [False, True])
def test_keys_of_another_host_are_left_to_it(tmp_path: Path, renewed: bool) -> None:
    """By --renew its CA would issue for two hosts, and the first one's own certificate would be gone."""
    kept = keep(SPEC_ONE, tmp_path, NOW)
    two = parse_spec(SPEC.replace("name: hv-1", "name: hv-2"))
    with pytest.raises(HairpinError, match="of another host, hv-1") as refused:
        keep(two, tmp_path, NOW, renewed=renewed)
    assert "--renew" not in refused.value.mend
    assert "hairpin-hv-2" in refused.value.mend
    assert kept.pki is not None
    assert (tmp_path / "host.pem").read_text() == kept.pki.host.certificate


def test_a_host_with_certificates_of_its_own_gets_none(tmp_path: Path) -> None:
    kept = keep(parse_spec(f"{SPEC}tls: existing\n"), tmp_path / "keys", NOW)
    assert kept.pki is None
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["secret", "token"]
    assert find_folder(SPEC_ONE, None) == Path("hairpin-hv-1")


def test_options_are_for_ssl_only_and_refuse_old_versions() -> None:
    files = TlsFiles(Path("/a/ca"), Path("/a/cert"), Path("/a/key"))
    assert find_options("unix:/a", files) == ()
    assert find_options("ssl:192.0.2.1:6640", None) == ()
    assert find_options("ssl:192.0.2.1:6640", files) == (
        "--private-key=/a/key", "--certificate=/a/cert", "--ca-cert=/a/ca", "--ssl-protocols=TLSv1.2"
    )  # fmt: skip
    assert split_target("ssl:[fd00::1]:6653") == ("fd00::1", 6653)
    for wrong in ("tcp:127.0.0.1:1", "ssl:host:1", "ssl:192.0.2.1", "ssl:"):
        with pytest.raises(ValueError, match=r"not of the form|does not appear"):
            split_target(wrong)


def test_only_what_ends_within_a_month_is_told() -> None:
    ends = {"ours": NOW + 31 * DAY, "theirs": NOW + 3.5 * DAY, "old": NOW - DAY}
    told = find_ending(ends, NOW)
    assert [line.split(":")[0] for line in told] == ["old ends in 0 days", "theirs ends in 3 days"]
