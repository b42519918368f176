"""The same exploit in frames that try to slip past: none arrives; the same frames, benign, do.

Each trick is tried on a pair that is inspected for tcp/80 only (so that tricks with ports, fragments and
headers could lead to DIRECT), on one inspected for all of IP, and on one that no policy names: what
arrives there with the exploit in it is what a target takes, and must arrive when it is benign.
"""

from __future__ import annotations

import pytest

from tests.support import evasion_tools as tools
from tests.support.evasion_modes import (
    DATAGRAMS,
    DIRECT,
    FAMILIES,
    REQUESTS,
    find_reason,
    is_delivered,
)
from tests.support.evasion_tools import Stage

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(400)]

INSPECTED = (tools.HTTP_ONLY, tools.ALL_IP)


@pytest.fixture(scope="module")
def stage(evasions: Stage) -> Stage:
    return evasions


@pytest.mark.parametrize("family", FAMILIES)
def test_no_request_carries_the_exploit_past(stage: Stage, family: int) -> None:
    potent = stage.request(tools.CONTROL, family, tools.HOSTILE_HEADER, REQUESTS[family])
    for target in INSPECTED:
        found = stage.request(target, family, tools.HOSTILE_HEADER, REQUESTS[family])
        assert set(found) == set(REQUESTS[family])
        assert [mode for mode, arrived in found.items() if arrived] == []
        print(
            f"\nIPv{family} {target}: 0 of {len(found)} ({sum(map(bool, potent.values()))} potent)"
        )
    # What a target takes must arrive when it is benign: all of it, but for what has a reason.
    wanted = [mode for mode, arrived in potent.items() if arrived and not find_reason(mode)]
    assert len(wanted) > 25
    for target in INSPECTED:
        found = stage.request(target, family, tools.BENIGN_HEADER, wanted)
        again = [mode for mode, arrived in found.items() if not arrived]
        assert len(again) < 4  # a busy machine loses a handshake
        found = stage.request(target, family, tools.BENIGN_HEADER, again)
        assert [mode for mode, arrived in found.items() if not arrived] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_datagram_carries_the_mark_past(stage: Stage, family: int) -> None:
    modes = DATAGRAMS[family]
    potent = stage.send(tools.CONTROL, family, tools.MARK, modes)
    found = stage.send(tools.ALL_IP, family, tools.MARK, modes)
    assert [mode for mode, arrival in found.items() if is_delivered(mode, arrival)] == []
    taken = [mode for mode, arrival in potent.items() if arrival == "socket"]
    print(f"\nIPv{family}: 0 of {len(modes)} ({len(taken)} potent)")
    assert len(taken) > 40
    wanted = [mode for mode in taken if not find_reason(mode)]
    benign = stage.send(tools.ALL_IP, family, tools.NO_MARK, wanted)
    assert [mode for mode, arrival in benign.items() if arrival != "socket"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_no_policy_names_goes_direct_as_the_docs_say(stage: Stage, family: int) -> None:
    """Broadcast, multicast, and what is not IP: a limit, told in docs/pipeline.md."""
    found = stage.send(tools.ALL_IP, family, tools.MARK, DIRECT[family])
    assert [mode for mode, arrival in found.items() if not arrival] == []
