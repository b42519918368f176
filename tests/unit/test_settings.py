"""The settings file: its page is true, its example is whole, and what is wrong is told with its path."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from appliance.cli import build_app
from appliance.commands.settings_reference import EXAMPLE, find_sections, render_reference
from appliance.settings import Settings, parse_settings, read_settings
from steering.errors import WrongInput
from steering.model import Profile
from steering.tls import TlsFiles

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = Settings.model_json_schema(by_alias=True)


def change(path: str, value: object) -> str:
    """The example with ``value`` at a dotted path; numbers are places in a list."""
    document = yaml.safe_load(EXAMPLE)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at: Any = document
    for part in way:
        at = at[part]
    at[last] = value
    return yaml.safe_dump(document)


def find_faults(text: str) -> dict[str, str]:
    with pytest.raises(WrongInput) as told:
        parse_settings(text)
    assert told.value.exit_status == 2
    return {fault.path: fault.reason for fault in told.value.faults}


def find_keys(value: object, at: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{at}.{key}".removeprefix(".")
            yield from find_keys(inner, f"{at}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from find_keys(inner, f"{at}[]")


def test_the_page_is_that_of_the_program() -> None:
    assert (ROOT / "docs/settings.md").read_text() == render_reference()


def test_the_page_names_every_key_with_its_meaning() -> None:
    page = render_reference()
    for path, part in find_sections("", SCHEMA):
        for key, value in part["properties"].items():
            assert value.get("description"), f"{path}.{key}"
            assert f"| `{key}` |" in page


def test_the_example_is_taken_and_shows_every_key() -> None:
    settings = parse_settings(EXAMPLE)
    assert settings.name == "rack-12"
    assert [lane.profile for lane in settings.build_lanes()] == [Profile.PREVENT, Profile.DETECT]
    known = {
        f"{path}.{key}".removeprefix(".")
        for path, part in find_sections("", SCHEMA)
        for key in part["properties"]
    }
    assert set(find_keys(yaml.safe_load(EXAMPLE))) == known


def test_only_lanes_must_be_given_and_the_rest_has_the_defaults_of_the_page() -> None:
    lanes = {"lanes": yaml.safe_load(EXAMPLE)["lanes"]}
    settings = parse_settings(yaml.safe_dump(lanes))
    assert settings == Settings.model_validate(lanes)
    assert settings.switch.openflow == "unix:/run/openvswitch/br-int.mgmt"
    assert settings.token_file == Path("/var/lib/hairpin/token")
    assert find_faults("") == {"lanes": "must be given"}


def test_the_openflow_connection_is_that_of_the_bridge() -> None:
    document = yaml.safe_load(EXAMPLE)
    document["switch"] = {"bridge": "br0"}
    assert (
        parse_settings(yaml.safe_dump(document)).switch.openflow == "unix:/run/openvswitch/br0.mgmt"
    )
    document["switch"] = {"bridge": "no bridge/../"}
    assert list(find_faults(yaml.safe_dump(document))) == ["switch.bridge"]


TAKEN = [
    "unix:/run/a.sock",
    "ssl:10.0.0.1:6640",
    "ssl:[fd00::1]:6640",
    "tcp:127.0.0.1:6640",
    "tcp:127.8.8.8:6640",
    "tcp:[::1]:6640",
]
REFUSED = [
    "tcp:10.0.0.1:6640",
    "tcp:127.0.0.1.example.org:6640",
    "tcp:127.example.org:6640",
    "tcp:localhost:6640",
    "tcp:[::1]x.example.org:6640",
    "tcp:[fd00::1]:6640",
    "ssl:",
    "ssl:10.0.0.1",
    "ssl:10.0.0.1:0",
    "ssl:10.0.0.1:65536",
    "ssl:fd00::1:6640",
    "ssl:hv-1.example.org:6640",
    "tcp:127.8.8.8",
    "tcp:0.0.0.0:6640",
    "ptcp:6640",
    "pssl:6640",
    "unix:relative",
    "http://127.0.0.1",
]


@pytest.mark.parametrize("connection", TAKEN)
@pytest.mark.parametrize("key", ["ovsdb", "openflow"])
def test_connections_that_are_proven_or_stay_on_the_machine_are_taken(
    key: str, connection: str
) -> None:
    settings = parse_settings(change(f"switch.{key}", connection))
    assert getattr(settings.switch, key) == connection


def test_tls_files_come_with_an_ssl_connection_and_only_with_one() -> None:
    settings = parse_settings(EXAMPLE).switch
    assert settings.tls_files == TlsFiles(
        Path("/etc/hairpin/switch/ca.pem"),
        Path("/etc/hairpin/switch/appliance.pem"),
        Path("/etc/hairpin/switch/appliance.key"),
        "hv-1.example.org",
    )
    document = yaml.safe_load(EXAMPLE)
    for plain in ({"ovsdb": "unix:/a"}, {"openflow": "unix:/a"}):
        document["switch"] = {**yaml.safe_load(EXAMPLE)["switch"], **plain}
        assert parse_settings(yaml.safe_dump(document)).switch.tls_files is not None
        document["switch"]["tls"] = None
        assert "needs tls" in find_faults(yaml.safe_dump(document))["switch"]
    document["switch"] = {"tls": yaml.safe_load(EXAMPLE)["switch"]["tls"]}
    assert "begin with ssl:" in find_faults(yaml.safe_dump(document))["switch"]


def test_plain_tcp_to_another_machine_is_refused_with_the_reason() -> None:
    fault = find_faults(change("switch.ovsdb", "tcp:10.0.0.1:6640"))["switch.ovsdb"]
    assert "loopback only" in fault
    assert "ssl:" in fault


@pytest.mark.parametrize(
    "connection", [*REFUSED, "", "unix:/a b", "unix:/a\n", "unix:/a,tcp:192.0.2.1:6640"]
)
@pytest.mark.parametrize("key", ["ovsdb", "openflow"])
def test_a_connection_that_nothing_proves_is_refused(key: str, connection: str) -> None:
    assert list(find_faults(change(f"switch.{key}", connection))) == [f"switch.{key}"]


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("lanes.1.vlan", 101, "vlan 101 is used more than once"),
        ("lanes.1.profile", "prevent", "profile prevent is used more than once"),
        ("lanes.1.queues", [1], "queue 1 is used more than once"),
        ("lanes.1.legA.interface", "leg-prevent-b", "leg interface leg-prevent-b is used"),
        ("lanes.1.legB.interface", "leg-detect-a", "leg interface leg-detect-a is used"),
        ("lanes.0.legB.device", "detect-a", "leg device detect-a is used"),
        ("lanes", [], "at least 1 item"),
    ],
)
def test_lanes_share_nothing(path: str, value: object, reason: str) -> None:
    faults = find_faults(change(path, value))
    assert list(faults) == ["lanes"]
    assert reason in faults["lanes"]


@pytest.mark.parametrize("queues", [[0, 2], [1, 0], [0, 0], [3, 4, 6]])
def test_the_queues_of_a_lane_are_numbers_in_a_row(queues: list[int]) -> None:
    faults = find_faults(change("lanes.0.queues", queues))
    assert faults == {"lanes[0].queues": "not consecutive numbers in rising order, as in [0, 1, 2]"}


@pytest.mark.parametrize(
    ("path", "value", "at"),
    [
        ("lanes.0.vlan", 4095, "lanes[0].vlan"),
        ("lanes.0.vlan", 0, "lanes[0].vlan"),
        ("lanes.0.queues", [], "lanes[0].queues"),
        ("lanes.0.queues", [7, 65536], "lanes[0].queues[1]"),
        ("lanes.0.profile", "watch", "lanes[0].profile"),
        ("lanes.0.legA.device", "sixteen-letters-", "lanes[0].legA.device"),
        ("lanes.0.legA", None, "lanes[0].legA"),
        ("lanes.0.leg_a", {}, "lanes[0].leg_a"),
        ("lanes", {}, "lanes"),
        ("apiVersion", "hairpin/v2", "apiVersion"),
        ("name", "Rack 12", "name"),
        ("stateDir", "var/lib/hairpin", "stateDir"),
        ("nonsense", 1, "nonsense"),
        ("switch.nonsense", 1, "switch.nonsense"),
        ("switch", "br-int", "switch"),
        ("switch.bridge", "br int", "switch.bridge"),
        ("inspection.dialect", "ipfw", "inspection.dialect"),
        ("inspection.netns", "../root", "inspection.netns"),
        ("inspection.eveLimitBytes", 1, "inspection.eveLimitBytes"),
        ("rules.sources.1.url", "http://rules.example.org/", "rules.sources[1].url"),
        ("rules.sources.1.name", "../up", "rules.sources[1].name"),
        ("rules.sources.1.name", "et/open", "rules.sources"),
        ("rules.floor", 0, "rules.floor"),
        ("api.port", 70000, "api.port"),
        ("api.listen", "", "api.listen"),
        ("api.certFile", None, "api"),
        ("api.keyFile", None, "api"),
        ("api.keyFile", "api.key", "api.keyFile"),
        ("rules.staleAfterDays", 0, "rules.staleAfterDays"),
        ("export.0.transport", "udp", "export[0].transport"),
        ("export.0.keyFile", None, "export[0]"),
        ("export.0.certFile", None, "export[0]"),
        ("export.0.transport", "tcp", "export[0]"),
        ("visibility.idleSeconds", 0, "visibility.idleSeconds"),
    ],
)
def test_what_is_wrong_is_told_with_its_path(path: str, value: object, at: str) -> None:
    assert list(find_faults(change(path, value))) == [at]


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_plain_http_stays_on_the_machine(listen: str) -> None:
    assert parse_settings(change("api", {"listen": listen})).api.cert_file is None


@pytest.mark.parametrize(
    "listen",
    [
        "0.0.0.0",
        "::",
        "192.0.2.1",
        "fd00::1",
        "hv-1",
        "localhost.example.org",
        "127.1",
        "::ffff:0:0",
    ],
)
def test_plain_http_elsewhere_must_be_asked_for(listen: str) -> None:
    faults = find_faults(change("api", {"listen": listen}))
    assert list(faults) == ["api"]
    assert "the token would pass in the clear" in faults["api"]
    parse_settings(change("api", {"listen": listen, "allowPlainHttp": True}))
    parse_settings(change("api", {"listen": listen, "certFile": "/c", "keyFile": "/k"}))


def test_rules_become_stale_where_something_could_refresh_them() -> None:
    rules = {"sources": [{"name": "et/open"}]}
    assert parse_settings(change("rules", rules)).rules.stale_seconds == 7 * 86400
    assert parse_settings(change("rules", {})).rules.stale_seconds is None
    assert parse_settings(change("rules", {"staleAfterDays": 2})).rules.stale_seconds == 2 * 86400


@pytest.mark.parametrize("key", ["interface", "device"])
def test_the_canary_has_a_port_of_its_own(key: str) -> None:
    leg = yaml.safe_load(EXAMPLE)["lanes"][0]["legA"][key]
    canary = {"interface": "canary0", "device": "canary", key: leg}
    assert "is a leg's" in find_faults(change("canary", canary))["(file)"]


def test_two_receivers_never_share_a_cursor() -> None:
    document = yaml.safe_load(EXAMPLE)
    document["export"] *= 2
    assert find_faults(json.dumps(document)) == {"export": "name siem is used more than once"}


def test_all_faults_are_told_at_once_even_beside_a_key_given_twice() -> None:
    text = EXAMPLE.replace("port: 8470", "port: 1\n  port: 70000").replace("vlan: 101", "vlan: no")
    faults = find_faults(text + "color: red\n")
    assert set(faults) == {"api.port", "lanes[0].vlan", "color"}
    assert faults["color"] == "unknown key"
    assert find_faults(EXAMPLE.replace("port: 8470", "port: 1\n  port: 2")) == {
        "api.port": "stands here more than once"
    }


@pytest.mark.parametrize(
    "text", ["a: [", "\tx: 1", "- 1", "5", "a: &x 1\nb: *x", "a: 1\n---\nb: 2"]
)
def test_what_is_no_single_mapping_of_yaml_is_refused(text: str) -> None:
    assert find_faults(text)


def test_a_file_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=r"absent\.yaml: No such file"):
        read_settings(tmp_path / "absent.yaml")
    with pytest.raises(WrongInput, match="Is a directory"):
        read_settings(tmp_path)
    (tmp_path / "latin").write_bytes(b"name: \xe9\n")
    with pytest.raises(WrongInput, match="not UTF-8"):
        read_settings(tmp_path / "latin")


@pytest.mark.parametrize("command", ["serve", "inspect", "observe"])
def test_no_process_starts_with_wrong_settings(command: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(change("stateDir", str(tmp_path / "state")) + "color: red\n")
    done = CliRunner().invoke(build_app(), [command, "--config", str(path)])
    assert isinstance(done.exception, WrongInput)
    assert "color: unknown key" in str(done.exception)
    assert os.listdir(tmp_path) == ["settings.yaml"]
