"""What becomes of traffic between VMs: inspected, recorded, denied or passed, on every kind of way."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from appliance.lab import LabState
from steering.pipeline import Table
from tests.support.appliance import (
    BLOCKED,
    EXPLOIT,
    EXPLOIT_SID,
    Appliance,
    build_base,
    build_policy,
    inspect,
)
from tests.support.lab import wait_until

pytestmark = pytest.mark.lab


def build_documents(lab: LabState) -> list[dict[str, Any]]:
    redis = [{"protocol": "tcp", "ports": [6379]}]
    return [
        *build_base(lab),
        build_policy("web-to-app", "web", "app", inspect("prevent")),
        build_policy("app-to-web", "app", "web", inspect("prevent")),
        build_policy("app-to-db", "app", "db", inspect("detect", "open")),
        build_policy("db-to-web", "db", "web", {"direct": {"reason": "backups"}}),
        build_policy("no-redis", "web", "db", {"deny": {"reason": "not yours"}}, services=redis),
    ]


@pytest.fixture(scope="module")
def appliance(lab: LabState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    appliance = Appliance(lab, tmp_path_factory.mktemp("servers"))
    try:
        appliance.start_web("web-1", "app-1", "db-1")
        appliance.start("app-1", "redis-server", "--port", "6379", "--protected-mode", "no",
                        "--bind", "*", "-::*", "--save", "", role="redis-app")  # fmt: skip
        appliance.start("db-1", "redis-server", "--port", "6379", "--protected-mode", "no",
                        "--bind", "*", "-::*", "--save", "", role="redis-db")  # fmt: skip
        appliance.apply(build_documents(lab))
        assert wait_until(lambda: all(map(appliance.is_forwarding, ("prevent", "detect"))))
        yield appliance
    finally:
        appliance.stop_all()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("source", "destination"), [("web-1", "app-1"), ("app-1", "web-1")])
def test_an_exploit_is_blocked_and_what_is_benign_is_answered(
    appliance: Appliance, source: str, destination: str, family: int
) -> None:
    before = appliance.find_latest_alert()
    assert (
        appliance.curl(source, destination, family=family).stdout == f"hello from {destination}\n"
    )
    blocked = appliance.attack(source, destination, family=family)
    assert (blocked.status, blocked.stdout) == (BLOCKED, "")
    alert = appliance.wait_alerts(before)[0]
    assert alert["verdict"] == "blocked"
    assert alert["lane"] == "prevent"
    assert alert["policy"] == f"{source[:3]}-to-{destination[:3]}"
    assert alert["signature"]["sid"] == EXPLOIT_SID
    assert {"CVE-2021-44228", "CVE-2021-45046"} == set(alert["signature"]["cves"])
    assert alert["source"]["vm"]["name"] == source
    assert alert["destination"]["vm"]["name"] == destination
    assert alert["source"]["zones"] == [source[:3]]
    assert alert["destination"]["zones"] == [destination[:3]]
    assert alert["source"]["address"] == appliance.address(source, family)
    assert alert["destination"]["port"] == 80
    assert alert["application"] == "http"
    assert EXPLOIT in alert["payload"]


def test_an_exploit_of_redis_is_blocked(appliance: Appliance) -> None:
    before = appliance.find_latest_alert()
    redis = ("redis-cli", "-h", appliance.address("app-1"))
    assert appliance.run("web-2", *redis, "PING").stdout == "PONG\n"
    script = 'return package.loadlib("/usr/lib/liblua5.1.so.0", "luaopen_io")'
    done = appliance.run("web-2", "timeout", "2", *redis, "EVAL", script, "0")
    assert (done.status, done.stdout) == (124, "")
    alerts = appliance.wait_alerts(before)
    assert {alert["verdict"] for alert in alerts} == {"blocked"}
    assert {"CVE-2022-0543"} == {cve for alert in alerts for cve in alert["signature"]["cves"]}


@pytest.mark.parametrize("family", [4, 6])
def test_the_detect_lane_records_and_lets_pass(appliance: Appliance, family: int) -> None:
    before = appliance.find_latest_alert()
    assert appliance.attack("app-1", "db-1", family=family).stdout == "hello from db-1\n"
    alert = appliance.wait_alerts(before)[0]
    assert (alert["verdict"], alert["lane"], alert["policy"]) == ("allowed", "detect", "app-to-db")


def test_deny_drops_what_it_names_and_no_more(appliance: Appliance) -> None:
    redis = ("timeout", "1", "redis-cli", "-h", appliance.address("db-1"), "PING")
    assert appliance.run("web-1", *redis).status == 124
    assert appliance.run("db-2", *redis).stdout == "PONG\n"
    assert appliance.curl("web-1", "db-1").stdout == "hello from db-1\n"


@pytest.mark.parametrize(("source", "destination"), [("db-1", "web-1"), ("web-1", "db-1")])
def test_direct_and_unnamed_pass_uninspected(
    appliance: Appliance, source: str, destination: str
) -> None:
    before = appliance.find_latest_alert()
    assert appliance.attack(source, destination).stdout == f"hello from {destination}\n"
    # A blocked one after it, so that an alert of the first would be there by now.
    appliance.attack("web-2", "app-1", path="/after")
    assert all("/after" in alert["payload"] for alert in appliance.wait_alerts(before))


def request(path: str, agent: str, connection: str = "keep-alive") -> str:
    return f"GET {path} HTTP/1.1\r\nHost: shop\r\nUser-Agent: {agent}\r\nConnection: {connection}\r\n\r\n"


def test_an_exploit_split_over_segments_is_blocked(appliance: Appliance) -> None:
    before = appliance.find_latest_alert()
    whole = request("/split", EXPLOIT)
    middle = whole.index("jndi") + 2
    pieces = (whole[:10], whole[10:middle], whole[middle : middle + 1], whole[middle + 1 :])
    assert appliance.talk("web-1", appliance.address("app-1"), pieces) == [None]
    assert appliance.wait_alerts(before)[0]["verdict"] == "blocked"
    harmless = request("/split", "curl")
    (answer,) = appliance.talk("web-1", appliance.address("app-1"), (harmless[:30], harmless[30:]))
    assert answer is not None
    assert answer.startswith("HTTP/1.1 200")


@pytest.mark.parametrize("family", [4, 6])
def test_an_exploit_in_a_later_request_of_a_connection_is_blocked(
    appliance: Appliance, family: int
) -> None:
    before = appliance.find_latest_alert()
    first, later = appliance.talk(
        "web-1",
        appliance.address("app-1", family),
        (request("/first", "curl"),),
        (request("/later", EXPLOIT),),
    )
    assert first is not None
    assert first.startswith("HTTP/1.1 200")
    assert later is None
    assert "/later" in appliance.wait_alerts(before)[0]["payload"]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("source", "destination"), [("web-1", "app-1"), ("app-1", "db-1")])
def test_large_datagrams_pass_in_fragments(
    appliance: Appliance, source: str, destination: str, family: int
) -> None:
    address = appliance.address(destination, family)
    ping = appliance.run(source, "ping", "-n", "-c3", "-i0.2", "-W1", "-s", "4000", address)
    assert ping.status == 0, ping.stdout
    assert " 0% packet loss" in ping.stdout


@pytest.mark.parametrize("family", [4, 6])
def test_a_large_udp_datagram_arrives_whole(appliance: Appliance, family: int) -> None:
    receive = (
        "import hashlib, socket, sys\n"
        "with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:\n"
        "    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)\n"
        "    s.bind(('::', 5353)); s.settimeout(5)\n"
        "    data, peer = s.recvfrom(65536)\n"
        "    s.sendto(hashlib.sha256(data).hexdigest().encode(), peer)\n"
    )
    send = (
        "import hashlib, os, socket, sys\n"
        "data = os.urandom(9000)\n"
        "family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET\n"
        "with socket.socket(family, socket.SOCK_DGRAM) as s:\n"
        "    s.settimeout(2); s.sendto(data, (sys.argv[1], 5353))\n"
        "    answer = s.recv(1000).decode()\n"
        "sys.exit(answer != hashlib.sha256(data).hexdigest())\n"
    )
    appliance.start("app-2", "python3", "-c", receive)
    assert wait_until(lambda: ":5353" in appliance.run("app-2", "ss", "-Hlun").stdout, 5)
    done = appliance.run("web-1", "python3", "-c", send, appliance.address("app-2", family))
    assert done.status == 0, done.stderr


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("source", "destination"), [("web-1", "app-1"), ("app-1", "db-1")])
def test_a_large_transfer_arrives_intact_both_ways(
    appliance: Appliance, tmp_path: Path, source: str, destination: str, family: int
) -> None:
    data = os.urandom(10 * 2**20)
    www = appliance.directory / f"nginx-{destination}/www"
    (www / "big").write_bytes(data)
    (www / "big").chmod(0o644)
    got = tmp_path / "got"
    done = appliance.curl(
        source, destination, "-m", "30", "-o", str(got), path="/big", family=family
    )
    assert done.status == 0, done.stderr
    assert hashlib.sha256(got.read_bytes()).digest() == hashlib.sha256(data).digest()


def test_every_alert_tells_all_there_is(appliance: Appliance) -> None:
    before = appliance.find_latest_alert()
    appliance.attack("web-1", "app-1", path="/all")
    alert = appliance.wait_alerts(before)[0]
    detail = appliance.read("alerts", "--id", str(alert["id"]))
    event = detail.pop("event")
    assert detail == alert
    assert event["event_type"] == "alert"
    assert event["alert"]["signature_id"] == alert["signature"]["sid"]
    assert alert["signature"]["affectedProducts"] == ["Apache_Log4j2"]
    assert abs(time.time() - datetime.fromisoformat(alert["time"]).timestamp()) < 30
    plain = appliance.cli("alerts", "--limit", "1").stdout
    assert all(word in plain for word in ("web-1", "app-1", "blocked", "prevent")), plain


def test_alerts_are_paged_and_filtered(appliance: Appliance) -> None:
    before = appliance.find_latest_alert()
    for number, pair in enumerate([("web-1", "app-1"), ("app-1", "db-1"), ("app-2", "web-1")]):
        appliance.attack(*pair, path=f"/n{number}", family=6 if number == 2 else 4)
    wanted = appliance.wait_alerts(before, 3)

    def ids(query: str) -> list[int]:
        items = appliance.api(f"/alerts?limit=1000&{query}").document["items"]
        return [item["id"] for item in items if item["id"] > before]

    by_pair = {alert["policy"]: alert["id"] for alert in wanted}
    assert ids("policy=app-to-db") == [by_pair["app-to-db"]]
    assert ids("lane=detect") == [by_pair["app-to-db"]]
    assert ids("verdict=allowed") == [by_pair["app-to-db"]]
    assert ids("vm=app-2") == [by_pair["app-to-web"]]
    assert ids(f"vm={appliance.lab.vm('app-2').vm_id}") == [by_pair["app-to-web"]]
    assert ids("zone=db") == [by_pair["app-to-db"]]
    assert ids(f"address={appliance.address('app-2', 6)}") == [by_pair["app-to-web"]]
    assert len(ids(f"sid={EXPLOIT_SID}&cve=CVE-2021-44228")) == 3
    assert ids("sid=1") == ids("cve=CVE-1999-0001") == []
    last = max(wanted, key=lambda alert: datetime.fromisoformat(alert["time"]))
    assert ids(f"since={last['time']}") == [last["id"]]
    assert last["id"] not in ids(f"until={last['time']}")
    paged: list[int] = []
    cursor = ""
    while True:
        page = appliance.api(f"/alerts?limit=2{cursor}").document
        assert len(page["items"]) <= 2
        paged += [item["id"] for item in page["items"]]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    whole = [item["id"] for item in appliance.api("/alerts?limit=1000").document["items"]]
    assert paged == whole == sorted(set(whole), reverse=True)


def test_without_the_token_nothing_is_told(appliance: Appliance) -> None:
    for path in ("/alerts", "/vms", "/policies", "/alerts/stream"):
        for token in (None, "wrong", appliance.token + "x"):
            answer = appliance.api(path, token=token)
            assert answer.status == 401
            assert "items" not in answer.document
    wrong = appliance.directory / "wrong-token"
    wrong.write_text("wrong-wrong-wrong-wrong\n")
    wrong.chmod(0o600)
    done = appliance.cli("vms", "--token-file", str(wrong))
    assert done.status == 1
    assert "token" in done.stderr


QUERIES = {"/explain": "?source=web-1&destination=app-1"}


def test_every_reading_endpoint_answers_what_it_says(appliance: Appliance) -> None:
    described = appliance.api("/openapi.json", token=None).document
    assert described["openapi"].startswith("3.1")
    paths = {path: one["get"] for path, one in described["paths"].items() if "get" in one}
    before = appliance.find_latest_alert()
    appliance.attack("web-1", "app-1")
    newest = appliance.wait_alerts(before)[0]["id"]
    checked = 0
    for path, operation in paths.items():
        plain = path.removeprefix("/api/v1")
        if plain == "/alerts/stream":
            continue
        asked = plain.replace("{alertId}", str(newest)) + QUERIES.get(plain, "")
        answer = appliance.api(asked, base=path.removesuffix(plain))
        assert answer.status == 200, (asked, answer)
        (kind, content), *more = operation["responses"]["200"]["content"].items()
        assert not more
        assert answer.headers["content-type"].startswith(kind.partition(";")[0])
        schema = {**content["schema"], "components": described["components"]}
        jsonschema.Draft202012Validator(schema).validate(answer.document)
        checked += 1
    assert checked >= 12


def test_explain_says_what_the_switch_does(appliance: Appliance) -> None:
    lab = appliance.lab

    def trace(source: str, destination: str, port: int, *, answer: bool = False) -> str:
        one, other = lab.vm(source), lab.vm(destination)
        ports = f"tcp_src={port},tcp_dst=40000" if answer else f"tcp_src=40000,tcp_dst={port}"
        flags = "0x012" if answer else "0x002"
        state = "trk,est,rpl" if answer else "trk,new"
        flow = (
            f"in_port={one.ofport},tcp,dl_src={one.mac},dl_dst={other.mac},"
            f"nw_src={one.address4},nw_dst={other.address4},nw_ttl=64,{ports},tcp_flags={flags}"
        )
        return appliance.trace(flow, "--ct-next", state)

    def count_legs(traced: str) -> dict[str, int]:
        sent = traced.rpartition("Datapath actions:")[2]
        return {profile: sent.count(f"push_vlan(vid={vlan}") for profile, vlan in vlans.items()}

    def find_tables(traced: str) -> list[str]:
        """Those that were passed, in order; each once (conntrack comes back to its own)."""
        names = {table.number: table.name for table in Table}
        numbers = re.findall(r"^ *(\d+)\. (?:\S.*, )?priority \d", traced, re.MULTILINE)
        return list(dict.fromkeys(names[int(number)] for number in numbers))

    vlans = {lane.profile: lane.vlan for lane in lab.lanes}
    cases = [
        ("web-1", "app-1", 80, "prevent", "inspect"),
        ("app-2", "web-2", 443, "prevent", "inspect"),
        ("app-1", "db-2", 5432, "detect", "inspect"),
        ("db-1", "web-1", 80, None, "direct"),
        ("web-1", "db-1", 6379, None, "deny"),
        ("web-1", "db-1", 80, None, "unnamed"),
    ]
    for source, destination, port, profile, treatment in cases:
        said = appliance.read("explain", source, destination, "--port", str(port))
        assert (said["inspected"], said["profile"]) == (profile is not None, profile)
        assert said["treatment"] == treatment
        traced = trace(source, destination, port)
        wanted = {one: int(one == profile) for one in vlans}
        assert count_legs(traced) == wanted, traced
        passed = find_tables(traced)
        told = [step["table"] for step in said["tables"] if step["table"] in passed]
        assert list(dict.fromkeys(told)) == passed
        assert ("DIRECT" in passed) == (treatment in ("direct", "unnamed"))
        if profile is not None:
            answer = trace(destination, source, port, answer=True)
            assert count_legs(answer) == wanted, answer


@pytest.mark.slow
def test_flow_records_name_vms_and_are_held_against_the_switch(appliance: Appliance) -> None:
    for _ in range(3):
        assert appliance.curl("web-1", "app-1", path="/flow").status == 0
        assert appliance.curl("web-1", "db-1", path="/flow", family=6).status == 0

    def find(source: str, destination: str) -> list[dict[str, Any]]:
        items = appliance.read("flows", "--vm", source, "--port", "80", "--limit", "1000")["items"]
        return [
            item
            for item in items
            if (item["source"]["vm"] or {}).get("name") == source
            and (item["destination"]["vm"] or {}).get("name") == destination
            and item["application"] == "HTTP"
        ]

    assert wait_until(lambda: find("web-1", "app-1") and find("web-1", "db-1"), 60)
    inspected, blind = find("web-1", "app-1")[0], find("web-1", "db-1")[0]
    assert (inspected["treatment"], inspected["policy"]) == ("inspect", "web-to-app")
    assert (blind["treatment"], blind["policy"]) == ("unnamed", None)
    assert max(one["packetsReceived"] for one in find("web-1", "app-1")) >= 3
    # The switch tells its count every 5 s, the observer every 2: many packets, and time for both to be told.
    flood = ("ping", "-n", "-q", "-i", "0.002", "-c", "1000", appliance.address("app-1"))
    assert appliance.run("web-1", *flood).status == 0

    def read_accounting() -> dict[str, Any]:
        found: dict[str, Any] = appliance.read("flows")["accounting"]
        return found

    wait_until(
        lambda: (now := read_accounting())["switchPackets"] >= 2000 and now["missedPercent"] <= 5,
        30,
    )
    accounting = read_accounting()
    assert accounting["switchPackets"] >= 2000
    assert accounting["recordedPackets"] > 0
    missed = accounting["switchPackets"] - accounting["recordedPackets"]
    assert accounting["missedPackets"] == max(0, missed)
    assert accounting["missedPercent"] <= 5, accounting
