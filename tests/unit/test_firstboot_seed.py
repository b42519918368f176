"""The seed: its page is true, hostile text ends in faults, and no fault shows a secret."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.commands.seed_reference import EXAMPLE, TAKEN_OVER, render_reference
from appliance.commands.settings_reference import find_sections
from appliance.firstboot.document import DEFAULT_PORT, SECRET, SeedDocument
from appliance.firstboot.offer import (
    SEED_LIMIT,
    SINGLES,
    Offered,
    build_kept,
    build_mapping,
    choose,
    parse_kept,
    read_offer,
    render_kept,
)
from appliance.firstboot.parse import find_example, find_keys, read_seed
from steering.documents import parse_text
from tests.support.seed import TOKEN, build_seed, change, find_switch_pair, offer, with_disk

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = SeedDocument.model_json_schema(by_alias=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=20,
)


def find_faults(seed: Any) -> dict[str, str]:
    reading = read_seed(seed)
    assert (reading.document is None) == bool(reading.faults)
    assert all(fault.path and fault.reason and fault.mend for fault in reading.faults)
    return {fault.path: fault.reason for fault in reading.faults}


def read_faults(offered: Offered) -> dict[str, str]:
    _, faults = read_offer(offered)
    assert all(fault.path and fault.reason and fault.mend for fault in faults)
    return {fault.path: fault.reason for fault in faults}


def test_the_page_is_that_of_the_program() -> None:
    assert (ROOT / "docs/first-boot.md").read_text() == render_reference()


def test_the_page_names_every_key_and_shows_every_value() -> None:
    page = render_reference()
    for path, part in find_sections("", SCHEMA):
        if path.partition(".")[0].partition("[")[0] in TAKEN_OVER:
            continue
        for key, value in part["properties"].items():
            assert value.get("description"), f"{path}.{key}"
            assert f"| `{key}` |" in page
            plain = "$ref" not in str(value)
            assert bool(value.get("examples")) == plain or key == "profile", f"{path}.{key}"
    assert all(f"`{name}`" in page for name in SINGLES)


def test_what_the_page_shows_as_values_are_some() -> None:
    for path, part in find_sections("", SCHEMA):
        for key, value in part["properties"].items():
            examples = value.get("examples", ["(PEM)"])
            own = (path, key) != ("canary", "mac")  # its example is the leg's: one declaration
            if path.startswith(TAKEN_OVER) or str(examples[0]).startswith("(") or not own:
                continue
            seed = change("visibility", {"mac": "52:54:00:10:03:01"})
            for section in ("lanes.0", "export.0"):
                if path == section.replace(".0", "[]"):
                    seed = change(f"{section}.{key}", examples[0], seed)
            if path in ("", "management", "api", "switch", "canary", "visibility"):
                if key in ("dhcp",):
                    seed["management"] = {"mac": seed["management"]["mac"]}
                seed = change(f"{path}.{key}".removeprefix("."), examples[0], seed)
            assert find_faults(seed) == {}, f"{path}.{key}"


def test_the_example_is_taken_as_yaml_and_as_json() -> None:
    reading = read_seed(parse_text(EXAMPLE)[0])  # type: ignore[arg-type]
    assert reading.faults == ()
    assert reading.document is not None
    assert reading.document.name == "rack-12"
    as_json = read_seed(json.loads(json.dumps(yaml.safe_load(EXAMPLE))))
    assert as_json.document == reading.document


@pytest.mark.parametrize(
    ("path", "value", "at", "reason"),
    [
        ("name", "Rack 12", "name", "must be of the form"),
        ("name", 12, "name", "must be text, not 12: put it in quotes"),
        ("name", ..., "name", "must be given"),
        ("color", "red", "color", "unknown key"),
        ("apiVersion", "hairpin/v2", "apiVersion", "must be 'hairpin/v1'"),
        ("management", ..., "management", "must be given"),
        ("management", "dhcp", "management", "must be a mapping"),
        ("management.mac", "52:54:00:10:00", "management.mac", "must be of the form"),
        ("management.mac", "01:00:5e:00:00:01", "management.mac", "a group's address"),
        ("management.dhcp", True, "management", "either `address` or `dhcp"),
        ("management.dhcp", "yes", "management.dhcp", "must be a valid boolean"),
        ("management.address", ..., "management", "either `address` or `dhcp"),
        ("management.address", "192.0.2.10", "management.address", "without a prefix length"),
        ("management.address", "192.0.2.0/24", "management.address", "not an address that a host"),
        ("management.address", "192.0.2.255/24", "management.address", "not an address that a"),
        ("management.address", "127.0.0.1/8", "management.address", "not an address that a host"),
        ("management.address", "fe80::1/64", "management.address", "not an address that a host"),
        *(
            ("management.address", text, "management.address", "not an address that a host")
            for text in (
                "2001:db8::1%ens3/64", "2001:db8::1%x\nDHCP=yes/64", "::ffff:192.0.2.1/120",
                "255.255.255.255/32", "240.0.0.1/24", "0.1.2.3/24", "192.0.2.10/0",
            )
        ),
        ("management.address", "0x7f.1/8", "management.address", "not an IP address"),
        ("management.gateway", "198.51.100.1", "management", "the gateway is not in 192.0.2.0/24"),
        ("management.gateway", "192.0.2.10", "management", "the gateway has the appliance's own"),
        ("management.gateway", "fe80::1", "management", "the gateway is not in"),
        ("management.gateway", "192.0.2.0", "management", "no host's address"),
        ("management.gateway", "192.0.2.255", "management", "no host's address"),
        ("management.dns", ["255.255.255.255"], "management.dns", "not the address of a host"),
        ("management.dns", ["0.0.0.1"], "management.dns", "not the address of a host"),
        ("api.token", "changeme" * 4, "api.token", "too few different characters"),
        ("management.gateway", "router", "management.gateway", "not an IP address"),
        ("management.dns", "192.0.2.53", "management.dns", "must be a list"),
        ("management.dns", ["ns1"], "management.dns", "not an IP address"),
        ("api.token", "short", "api.token", "must be of the form"),
        ("api.token", ..., "api.token", "must be given"),
        ("api.port", 443, "api.port", "greater than or equal to 1024"),
        ("api.port", "8470", "api.port", "must be a valid integer"),
        ("api.certificate", "-----BEGIN CERTIFICATE-----", "api", "given together"),
        ("switch.ovsdb", "tcp:192.0.2.2:6640", "switch.ovsdb", "must be of the form"),
        ("switch.ovsdb", "unix:/run/db.sock", "switch.ovsdb", "must be of the form"),
        ("switch.ovsdb", "ssl:hv-1:6640", "switch.ovsdb", "must be of the form"),
        ("switch.ovsdb", "ssl:999.0.2.2:6640", "switch.ovsdb", "not an IP address"),
        ("switch.openflow", "ssl:192.0.2.2:66530", "switch.openflow", "the port is not"),
        ("switch.openflow", "ssl:192.0.2.2", "switch.openflow", "must be of the form"),
        ("switch.ca", "/etc/ca.pem", "switch.ca", "not PEM"),
        ("switch.key", ..., "switch.key", "must be given"),
        ("switch.key", "-----BEGIN " + "x" * 70_000, "switch.key", "at most 65536 characters"),
        ("lanes", [], "lanes", "at least 1 item"),
        ("lanes.0.vlan", 4095, "lanes[0].vlan", "less than or equal to 4094"),
        ("lanes.0.legA.device", "ens4", "lanes[0].legA.device", "unknown key"),
        ("lanes.0.legB", None, "lanes[0].legB", "must be a mapping"),
        ("lanes.0.leg_b", {}, "lanes[0].leg_b", "unknown key"),
        ("lanes.0.legB.mac", "52:54:00:10:01:0A", "(seed)", "legB.mac and lanes[0].legA.mac have"),
        ("canary.mac", "52:54:00:10:00:01", "(seed)", "canary.mac and management.mac have"),
        ("export.0.transport", "udp", "export[0].transport", "must be 'tcp' or 'tls'"),
        ("rules.sources.0.url", "http://x/", "rules.sources[0].url", "must be of the form"),
        ("store", {"keepDays": 0}, "store.keepDays", "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_path(
    path: str, value: object, at: str, reason: str
) -> None:
    faults = find_faults(change(path, value))
    assert list(faults) == [at]
    assert reason in faults[at]


def test_all_faults_are_told_at_once_each_with_how_to_mend_it() -> None:
    seed = change("name", "Rack 12", change("lanes.0.vlan", 0, change("swich", {})))
    mends = {fault.path: fault.mend for fault in read_seed(seed).faults}
    assert list(mends) == ["name", "lanes[0].vlan", "swich"]
    assert mends["name"].startswith("as in `name: rack-12`")
    assert mends["lanes[0].vlan"].startswith("as in `lanes[0].vlan: 101`")
    assert "did you mean switch?" in mends["swich"]
    assert "known here: apiVersion, kind, name" in mends["swich"]


def test_examples_and_keys_are_found_where_they_stand() -> None:
    assert find_example(("lanes", 3, "legA", "mac")) == "52:54:00:10:01:0a"
    assert find_example(("canary", "everySeconds")) == "30"
    assert find_example(("lanes", 0, "legA")) == ""
    assert find_example(("nowhere", "x")) == ""
    assert find_keys(("export", 1))[:3] == ("name", "transport", "host")
    assert find_keys(("name", "x")) == ()


def test_keys_that_stand_twice_are_told() -> None:
    text = EXAMPLE.replace("  port: 8470\n", "  port: 8470\n  port: 8471\n")
    assert find_faults(parse_text(text)[0]) == {"api.port": "stands here more than once"}
    with_single = build_mapping(read_offer(Offered({"hairpin.seed": text.encode()}))[0])
    assert find_faults(with_single) == {"api.port": "stands here more than once"}


def test_the_management_network_is_known_of_a_seed_that_is_refused_elsewhere() -> None:
    reading = read_seed(change("lanes", [], change("api.port", 8471)))
    assert (reading.name, reading.port) == ("rack-12", 8471)
    assert reading.management is not None
    assert reading.management.address == "192.0.2.10/24"
    for path, value in (("management.dns", [1]), ("management.mac", None), ("management", 5)):
        assert read_seed(change(path, value)).management is None
    odd = read_seed(change("name", [], change("api.port", "x")))
    assert (odd.name, odd.port) == ("hairpin", DEFAULT_PORT)


def find_paths(value: object, at: str = "") -> list[str]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)  # type: ignore[arg-type]
    found = []
    for key, one in inner:
        found.append(f"{at}.{key}".removeprefix("."))
        if isinstance(one, dict | list):
            found += find_paths(one, f"{at}.{key}")
    return found


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_value_anywhere_makes_it_fail_otherwise_than_by_faults(data: st.DataObject) -> None:
    seed = build_seed()
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(find_paths(seed)))
        value = data.draw(VALUES)
        try:
            seed = change(path, value, seed)
        except (KeyError, TypeError, IndexError):
            continue  # what stood there was taken away by the change before
    find_faults(seed)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(max_size=12), VALUES, max_size=6))
def test_anything_that_is_a_mapping_is_read_or_refused(mapping: dict[str, object]) -> None:
    assert find_faults(mapping)


SECRET_TEXT = "Sesam-oeffne-dich"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_fault_shows_a_secret(data: st.DataObject) -> None:
    seed = change("export.0.key", SECRET_TEXT)
    for path in ("api.token", "api.key", "switch.key"):
        broken = data.draw(
            st.sampled_from([SECRET_TEXT, [SECRET_TEXT], {SECRET_TEXT[:4]: SECRET_TEXT}, 7])
        )
        seed = change(path, broken, seed)
    told = str(read_seed(seed).faults)
    assert SECRET_TEXT not in told
    assert TOKEN not in str(read_seed(change("name", "", build_seed())).faults)
    assert SECRET.search("switch.key")
    reading = read_seed(build_seed())
    assert TOKEN not in repr(reading)
    assert "PRIVATE KEY" not in repr(reading)


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(["hairpin.seed", *SINGLES, "hairpin.other"]), st.binary(max_size=200)
    ),
    st.none()
    | st.dictionaries(
        st.sampled_from(["user-data", "meta-data", "network-config", "vendor-data"]),
        st.binary(max_size=200) | st.text(max_size=80).map(str.encode),
    ),
)
def test_any_bytes_are_an_offer_or_faults(
    credentials: dict[str, bytes], disk: dict[str, bytes] | None
) -> None:
    found, faults = read_offer(Offered(credentials, disk))
    assert all(fault.path and fault.reason and fault.mend for fault in faults)
    if found.document is not None and not faults:
        read_seed(build_mapping(found))


# Where it comes from


def test_a_disk_gives_the_same_seed_as_a_credential() -> None:
    by_disk, faults = read_offer(with_disk(build_seed(), meta_data="instance-id: 1\n"))
    assert faults == ()
    assert by_disk.digest == read_offer(offer(build_seed()))[0].digest
    assert build_mapping(by_disk) == build_seed()


def test_one_file_does_as_a_credential_and_as_a_disks_user_data() -> None:
    wrapped, faults = read_offer(offer({"hairpin": build_seed()}))
    assert faults == ()
    assert wrapped.digest == read_offer(offer(build_seed()))[0].digest
    path = "credential hairpin.seed"
    assert read_faults(offer({"hairpin": []})) == {f"{path}, hairpin": "must be a mapping"}
    twice = Offered({"hairpin.seed": b"hairpin: {}\nhairpin: {}\n"})
    assert read_faults(twice) == {path: "a key stands twice"}
    beside, _ = read_offer(offer({"hairpin": {}, "name": "rack-12"}))
    assert "hairpin" in find_faults(build_mapping(beside))


def test_single_values_stand_for_their_places_and_never_beside_them() -> None:
    seed = change("api.token", ..., change("switch.key", ..., change("name", ...)))
    key = build_seed()["switch"]["key"]
    found, faults = read_offer(offer(seed, token=f"{TOKEN}\n", switch_key=key, name="rack-13"))
    assert faults == ()
    assert build_mapping(found) == change("name", "rack-13")
    twice = read_faults(offer(build_seed(), token=TOKEN))
    assert twice == {"credential hairpin.token": "`api.token` stands in the seed, too"}
    assert "api" not in change("api", ...)
    alone, _ = read_offer(offer(change("api", ...), token=TOKEN))
    assert build_mapping(alone)["api"] == {"token": TOKEN}
    odd, _ = read_offer(offer(change("api", 5), token=TOKEN))
    assert find_faults(build_mapping(odd))["api"].startswith("must be a mapping")


def test_the_name_may_come_from_the_disks_meta_data() -> None:
    nameless = change("name", ...)
    found, faults = read_offer(with_disk(nameless, meta_data="local-hostname: rack-9\n"))
    assert (faults, build_mapping(found)["name"]) == ((), "rack-9")
    both = with_disk(nameless, meta_data="local-hostname: rack-9\n")
    found, faults = read_offer(Offered({"hairpin.name": b"rack-8"}, both.disk))
    assert (faults, build_mapping(found)["name"]) == ((), "rack-8")
    found, _ = read_offer(with_disk(build_seed(), meta_data="local-hostname: rack-9\n"))
    assert build_mapping(found)["name"] == "rack-12"


@pytest.mark.parametrize(
    ("files", "at"),
    [
        ({"user_data": ""}, "disk CIDATA, user-data"),
        ({"user_data": "#!/bin/sh\nreboot\n"}, "disk CIDATA, user-data"),
        ({"user_data": "hairpin: [1]\n"}, "disk CIDATA, user-data, hairpin"),
        ({"user_data": "hairpin: {}\nusers: []\n"}, "disk CIDATA, user-data, users"),
        ({"user_data": "hairpin: {}\nhairpin: {}\n"}, "disk CIDATA, user-data"),
        ({"user_data": "hairpin: {a: &b 1, c: *b}\n"}, "disk CIDATA, user-data, line 1, column 14"),
        ({"user_data": "x" * (SEED_LIMIT + 1)}, "disk CIDATA, user-data"),
        ({"meta_data": "public-keys: x\n"}, "disk CIDATA, meta-data, public-keys"),
        ({"meta_data": "- 1\n"}, "disk CIDATA, meta-data"),
        ({"network_config": "version: 2\n"}, "disk CIDATA, network-config"),
        ({"vendor_data": "#cloud-config\n"}, "disk CIDATA, vendor-data"),
    ],
)
def test_what_a_disk_asks_for_beside_the_seed_is_told_and_not_passed_over(
    files: dict[str, str], at: str
) -> None:
    assert at in read_faults(with_disk(build_seed(), **files))


def test_two_seeds_and_strange_credentials_are_refused() -> None:
    both = Offered(offer(build_seed()).credentials, with_disk(build_seed()).disk)
    assert "there are two seeds" in read_faults(both)["credential hairpin.seed"]
    strange = read_faults(Offered({"hairpin.tokn": b"x"}))
    assert strange == {"credential hairpin.tokn": "unknown"}
    packed = read_faults(Offered({"hairpin.seed": b"\x1f\x8b\x08"}))
    assert packed == {"credential hairpin.seed": "not UTF-8"}
    long = read_faults(Offered({"hairpin.token": b"x" * 70_000}))
    assert "more than 65536 bytes" in long["credential hairpin.token"]


# What was accepted before


def test_what_is_offered_goes_before_what_was_accepted() -> None:
    first, _ = read_offer(offer(build_seed()))
    other, _ = read_offer(offer(change("name", "rack-13")))
    nothing, _ = read_offer(Offered({}))
    kept = build_kept(first, 1.0, "0.1.0")
    assert choose(nothing, None) is None

    def origin(found: Any, before: Any) -> str:
        chosen = choose(found, before)
        assert chosen is not None
        return chosen.origin

    assert origin(first, None) == "new"
    assert origin(first, kept) == "same"
    assert origin(other, kept) == "new"
    assert origin(nothing, kept) == "kept"


def test_a_single_value_changes_what_was_accepted_and_leaves_the_rest() -> None:
    seed = change("api.token", ...)
    first, _ = read_offer(offer(seed, token=TOKEN))
    kept = build_kept(first, 1.0, "0.1.0")
    same, _ = read_offer(offer(None, token=TOKEN))
    chosen = choose(same, kept)
    assert chosen is not None
    assert (chosen.origin, chosen.offer.digest) == ("kept", kept.digest)
    other, _ = read_offer(offer(None, token="f" * 32))
    chosen = choose(other, kept)
    assert chosen is not None
    assert chosen.origin == "new"
    assert build_mapping(chosen.offer) == change("api.token", "f" * 32)


def test_what_is_kept_is_whole_or_is_told_to_be_damaged() -> None:
    found, _ = read_offer(offer(change("api.token", ...), token=TOKEN))
    data = render_kept(build_kept(found, 1.5, "0.1.0")).encode()
    assert parse_kept(data).offer == found
    # Every single byte: changed, it is refused, or it says the same.
    for place in range(0, len(data), max(1, len(data) // 300)):
        broken = copy.copy(bytearray(data))
        broken[place] ^= 0x01
        try:
            assert parse_kept(bytes(broken)).offer == found
        except ValueError:
            continue
    with pytest.raises(ValueError, match="can't be read"):
        parse_kept(data[: len(data) // 2])
    with pytest.raises(ValueError, match="what its digest says"):
        parse_kept(data.replace(TOKEN.encode(), b"f" * 32))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("api", f"token {TOKEN}"),  # a colon that was forgotten
        ("api", {f"token {TOKEN}": None}),
        ("api", {TOKEN: "token"}),
        ("api", {TOKEN: {TOKEN: 1}}),
        ("switch", find_switch_pair().key),
        ("switch.serverName", find_switch_pair().key),
        ("switch.bridge", TOKEN),
        ("name", f"{TOKEN}!"),
        ("management.address", TOKEN),
        ("lanes", [TOKEN]),
    ],
)
def test_no_fault_shows_a_secret_that_stands_in_the_wrong_place(path: str, value: object) -> None:
    faults = find_faults(change(path, value))
    assert faults
    assert TOKEN not in str(faults)
    assert find_switch_pair().key[30:60] not in str(faults)


def test_a_name_that_may_be_a_token_is_not_shown() -> None:
    """Two credentials that were swapped: a token of 32 characters can be a name."""
    reading = read_seed(change("api.token", "rack-12", change("name", TOKEN)))
    assert reading.faults
    assert reading.name == "hairpin"


def test_of_a_seed_that_is_no_unicode_name_and_port_are_still_checked() -> None:
    port = read_seed({**build_seed(), "color": "\ud800", "api": {"port": 10**9}})
    assert (port.document, port.port) == (None, 8470)
    assert read_seed(change("name", "\ud800")).name == "hairpin"


@pytest.mark.parametrize(
    ("path", "at"),
    [
        ("canary", "canary"),
        ("visibility", "visibility"),
        ("lanes.0.legC", "lanes[0].legC"),
        ("management.gateway", "management.gateway"),
    ],
)
def test_a_key_without_a_value_is_told(path: str, at: str) -> None:
    """`canary:` at the end of a seed that was cut off is no wish to have none."""
    assert find_faults(change(path, None)) == {at: "stands there without a value"}


def test_keys_that_stand_twice_in_meta_data_are_told() -> None:
    offered = with_disk(change("name", ...), meta_data="local-hostname: a\nlocal-hostname: b\n")
    assert "more than once" in read_faults(offered)["disk CIDATA, meta-data, local-hostname"]


@pytest.mark.parametrize("depth", [20, 500, 5000])
def test_json_is_refused_at_the_depth_that_yaml_is(depth: int) -> None:
    for before, after in (('{"a":', "}"), ("[", "]")):
        text = f'{{"b": {before * depth}1{after * depth}}}'
        assert "nested deeper" in str(read_faults(Offered({"hairpin.seed": text.encode()})))
