"""The doctor on a real machine: it sees a whole lab as whole, and what was broken on purpose."""

from __future__ import annotations

import pytest

from appliance.doctor import Finding, run_checks
from appliance.lab import LabState
from appliance.settings import InspectionSettings, Settings
from steering.run import run

pytestmark = pytest.mark.lab


def read_settings_of(lab: LabState) -> Settings:
    """The lab's settings, naming the service host, as no `hairpin inspect` tells where it is."""
    inspection = InspectionSettings.model_validate({"netns": lab.service_host})
    return lab.settings.model_copy(update={"inspection": inspection})


def check(lab: LabState) -> dict[str, Finding]:
    return {finding.name: finding for finding in run_checks(read_settings_of(lab))}


def test_a_machine_that_was_set_up_with_a_lab_on_it_fails_nothing(bare_lab: LabState) -> None:
    findings = check(bare_lab)
    assert [one for one in findings.values() if one.level == "fail"] == []
    assert findings["kernel queues"].found.startswith("dialects that work")
    assert findings["offloads"].ok
    assert findings["mtu"].ok
    assert findings["suricata hyperscan"].ok


def test_what_is_broken_is_found_and_its_mend_mends_it(bare_lab: LabState) -> None:
    device = bare_lab.lanes[0].device_a
    inside = ["ip", "netns", "exec", bare_lab.service_host]
    run([*inside, "ethtool", "-K", device, "tx", "off", "tso", "off", "gso", "off"])
    run([*inside, "ip", "link", "set", "dev", device, "mtu", "1500"])
    run(bare_lab.vsctl_argv(["del-fail-mode", "br-int"]))
    try:
        findings = check(bare_lab)
        assert {one.name for one in findings.values() if one.level == "fail"} == {
            "fail mode",
            "mtu",
        }
        # Slow, but nothing is lost.
        assert findings["offloads"].level == "warn"
        assert device in findings["offloads"].found
        assert f"{device} 1500" in findings["mtu"].found
    finally:
        run([*inside, "ethtool", "-K", device, "tx", "on", "tso", "on", "gso", "on"])
        run([*inside, "ip", "link", "set", "dev", device, "mtu", "1504"])
        run(bare_lab.vsctl_argv(["set-fail-mode", "br-int", "secure"]))
    assert not any(one.level == "fail" for one in check(bare_lab).values())


def test_a_switch_that_is_not_there_is_said_so() -> None:
    from appliance.doctor_probe import read_switch
    from appliance.settings_switch import SwitchSettings

    seen = read_switch(SwitchSettings(ovsdb="unix:/run/no-such-switch/db.sock"))
    assert not seen.reachable
    assert seen.reason
