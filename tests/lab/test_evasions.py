"""The same exploit in frames that try to slip past: none arrives; the same frames, benign, do.

The policy names tcp/80 only, so that every trick with ports, fragments and headers could lead to DIRECT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.lab import LabState
from tests.support import attacker
from tests.support.appliance import Appliance, build_base, build_policy, inspect
from tests.support.lab import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(300)]

HOSTILE = "User-Agent: () { :; }; /bin/bash -c id"
BENIGN = "User-Agent: curl"

BOTH = (
    "fragments-1400",
    "plain", "fragments-24", "fragments-64", "bytewise", "bad-checksum", "short-ttl", "overlap", "urgent",
    "reset-first", "vlan-0", "vlan-7", "vlan-3901", "broadcast", "forged-opener-0", "forged-opener-1",
    "forged-opener-2",
)  # fmt: skip
MODES = {
    4: (*BOTH, "reversed-fragments-24"),
    6: (*BOTH, "hop-by-hop", "destination-options", "atomic-fragment"),
}
# What a target takes when nobody is in between, and must go on taking. Not tiny fragments: the
# switch's userspace conntrack holds those below 1,200 bytes (1,280 in IPv6) back.
USUAL = {
    4: ("plain", "fragments-1400", "reversed-fragments-1400", "bytewise"),
    6: ("plain", "fragments-1400", "hop-by-hop", "destination-options"),
}


@pytest.fixture(scope="module")
def appliance(lab: LabState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    appliance = Appliance(lab, tmp_path_factory.mktemp("servers"))
    http = [{"protocol": "tcp", "ports": [80]}]
    # The attacker's kernel knows nothing of these connections and would reset them.
    quiet = ("OUTPUT", "-p", "tcp", "--tcp-flags", "RST", "RST", "-j", "DROP")
    try:
        appliance.start_web("app-1")
        for program in ("iptables", "ip6tables"):
            appliance.run("web-1", program, "-A", *quiet)
        documents = [
            *build_base(lab),
            build_policy("http", "web", "app", inspect("prevent"), services=http),
        ]
        appliance.apply(documents)
        assert wait_until(lambda: appliance.is_forwarding("prevent"))
        yield appliance
    finally:
        for program in ("iptables", "ip6tables"):
            appliance.run("web-1", program, "-D", *quiet)
        appliance.stop_all()


def send(
    appliance: Appliance, family: int, header: str, modes: tuple[str, ...]
) -> dict[str, tuple[str, str]]:
    web, app = appliance.lab.vm("web-1"), appliance.lab.vm("app-1")

    def address(vm: object) -> str:
        return str(getattr(vm, f"address{family}"))

    told = {
        "source": [web.mac, address(web)],
        "target": [app.mac, address(app)],
        "accomplices": [appliance.lab.vm(name).mac for name in ("db-1", "app-2", "app-1")],
        "modes": modes,
        "header": header,
    }
    run = appliance.run("web-1", sys.executable, attacker.__file__, json.dumps(told), timeout=120)
    assert run.status == 0, run.stderr
    found: dict[str, tuple[str, str]] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("family", [4, 6])
def test_no_frame_carries_the_exploit_past(
    appliance: Appliance, family: int, tmp_path: Path
) -> None:
    found = send(appliance, family, HOSTILE, MODES[family])
    assert set(found) == set(MODES[family])
    answered = [mode for mode, (answer, _) in found.items() if answer == "answered"]
    assert answered == []
    # The handshake is benign and passes: what was silenced is the request.
    assert [mode for mode, (answer, _) in found.items() if answer == "refused"] == []
    seen = appliance.read_requests("app-1")
    assert [path for _, path in found.values() if path in seen] == []


@pytest.mark.parametrize("family", [4, 6])
def test_what_a_target_takes_still_arrives_when_it_is_benign(
    appliance: Appliance, family: int
) -> None:
    found = send(appliance, family, BENIGN, USUAL[family])
    assert {mode: answer for mode, (answer, _) in found.items()} == dict.fromkeys(
        USUAL[family], "answered"
    )
    seen = appliance.read_requests("app-1")
    assert all(path in seen for _, path in found.values()), "so the log above would have told"
