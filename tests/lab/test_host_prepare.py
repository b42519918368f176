"""`hairpin host` on a real switch: the script and `--apply` do the same, leave nothing behind, and refuse.

A real ovsdb-server and ovs-vswitchd (dummy datapath); listeners on loopback.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from appliance.cli import run_cli
from appliance.hosting.door import carry_out
from appliance.hosting.keeping import keep
from appliance.hosting.ops import HostPlan, Op, When
from appliance.hosting.plan import BASE_FLOW, build_plan
from appliance.hosting.script import render_script
from appliance.hosting.spec import HostSpec, build_ports, parse_spec
from appliance.hosting.vm import render_domain, render_seed
from appliance.settings import Settings
from steering.errors import HairpinError
from steering.events import SteeringEvent
from steering.model import PolicySet
from steering.peer import find_peer_fault
from steering.reconcile import Reconciler
from steering.tls import TlsFiles
from tests.support.dummy_switch import BRIDGE, DummySwitch, open_dummy_switch
from tests.support.host_specs import render_local_spec
from tests.support.shortcut_world import VMS, attach_vms, build_policies
from tests.support.tls_switch import find_free_ports
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]


_ROW = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# What counts, and what a port that is made anew has of its own.
VOLATILE = {
    "_uuid", "cur_cfg", "next_cfg", "statistics", "status", "bfd_status", "mac_in_use", "ifindex",
    "link_resets", "is_connected",
}  # fmt: skip


@dataclass
class Host:
    switch: DummySwitch
    spec_file: Path
    keys: Path

    @property
    def spec(self) -> HostSpec:
        return parse_spec(self.spec_file.read_text())

    @property
    def plan(self) -> HostPlan:
        spec, kept = self.spec, keep(self.spec, self.keys, time.time())
        ports = build_ports(spec, kept.secret)
        domain, seed = render_domain(spec, ports), render_seed(spec, ports, kept.pki, kept.token)
        return build_plan(spec, ports, kept.pki, domain, seed)

    def change(self, before: str, after: str) -> None:
        text = self.spec_file.read_text()
        assert before in text
        self.spec_file.write_text(text.replace(before, after))

    def vsctl(self, *argv: str) -> str:
        return self.switch.vsctl(*argv)

    def ofctl(self, command: str, *argv: str) -> str:
        return self.switch.run(
            "ovs-ofctl", "-O", "OpenFlow13,OpenFlow15", command, self.switch.target, *argv
        )

    def flows(self) -> list[str]:
        shown = self.ofctl("dump-flows", "--no-stats") + self.ofctl("dump-groups")
        return [line.strip() for line in shown.splitlines() if "actions=" in line]

    def dump(self) -> dict[str, object]:
        """The whole database but its counters and names of rows, which no one can take back."""
        remote = f"unix:{self.switch.directory}/db.sock"
        text = self.switch.run("ovsdb-client", "--format=json", "dump", remote, "Open_vSwitch")
        tables: dict[str, object] = {}
        for line in text.splitlines():
            table = json.loads(line)
            kept = [n for n, name in enumerate(table["headings"]) if name not in VOLATILE]
            rows = (json.dumps([row[n] for n in kept], sort_keys=True) for row in table["data"])
            tables[table["caption"]] = sorted(_ROW.sub("row", row) for row in rows)
        return tables

    def state(self) -> tuple[dict[str, object], list[str], list[str]]:
        files = sorted(
            f"{path.relative_to(self.switch.directory)} {stat.filemode(path.stat().st_mode)}"
            for folder in ("tls", "vm")
            for path in (self.switch.directory / folder).rglob("*")
        )
        return self.dump(), self.flows(), files

    def run_script(self, ops: tuple[Op, ...]) -> subprocess.CompletedProcess[str]:
        script = self.switch.directory / "script.sh"
        script.write_text(render_script("a test", ops))
        return subprocess.run(
            ["sh", str(script)], capture_output=True, text=True, timeout=60, check=False
        )

    def prepare(self) -> int:
        return run_cli(
            ["host", "prepare", str(self.spec_file), "--keys", str(self.keys), "--apply"]
        )

    def restore(self) -> int:
        return run_cli(["host", "restore", str(self.spec_file), "--apply"])


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A plain bridge in fail mode standalone, as libvirt's hosts have it."""
    with tempfile.TemporaryDirectory(prefix="hp-") as name:
        directory = Path(name)
        monkeypatch.setenv("OVS_RUNDIR", name)
        with open_dummy_switch(directory, VMS) as switch:
            spec = directory / "host.yaml"
            spec.write_text(render_local_spec(directory, BRIDGE, *find_free_ports(2)))
            one = Host(switch, spec, directory / "keys")
            one.vsctl("set-fail-mode", BRIDGE, "standalone")
            yield one


def test_the_script_and_the_door_do_the_same_and_leave_no_trace(host: Host) -> None:
    before = host.state()
    assert before[1] == ["priority=0 actions=NORMAL"]
    done = host.run_script(host.plan.prepare)
    assert (done.returncode, done.stderr) == (0, ""), done
    by_script = host.state()
    assert by_script[1] == [BASE_FLOW.replace(",", ", ", 1).replace(",actions", " actions")]
    assert len(by_script[2]) == 5
    assert host.run_script(host.plan.restore).returncode == 0
    assert host.state() == before
    assert host.prepare() == 0
    assert host.state() == by_script
    assert host.restore() == 0
    assert host.state() == before


def test_what_is_done_twice_changes_nothing(host: Host) -> None:
    before = host.state()
    assert host.prepare() == 0
    prepared = host.state()
    assert host.prepare() == 0
    assert host.run_script(host.plan.prepare).returncode == 0
    assert host.state() == prepared
    assert host.restore() == 0
    assert host.restore() == 0
    assert host.run_script(host.plan.restore).returncode == 0
    assert host.state() == before


def test_the_ports_are_kept_as_the_lab_has_them(host: Host) -> None:
    assert host.prepare() == 0
    assert host.vsctl("get", "Port", "hp-prev-a", "tag", "protected").split() == ["3901", "true"]
    assert host.vsctl("get", "Port", "hp-canary", "tag", "protected").split() == ["3901", "false"]
    for leg in ("hp-prev-a", "hp-prev-b", "hp-det-a"):
        assert host.vsctl("get", "Interface", leg, "bfd:enable").strip() == '"true"'
    assert host.vsctl("get", "Interface", "hp-prev-c", "bfd").strip() == "{}"
    assert host.vsctl("get", "Interface", "hp-prev-b", "ofport").strip() == "65001"
    macs = {host.vsctl("get", "Interface", leg, "bfd:bfd_local_dst_mac") for leg in
            ("hp-prev-a", "hp-prev-b", "hp-det-a", "hp-det-b")}  # fmt: skip
    assert len(macs) == 2
    key = host.switch.directory / "tls" / "host.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_bridge_that_was_secure_keeps_its_flows(host: Host) -> None:
    host.vsctl("set-fail-mode", BRIDGE, "secure")
    host.ofctl("add-flow", "priority=7,in_port=1,actions=drop")
    host.ofctl("add-group", "group_id=9,type=all,bucket=output:1")
    before = host.state()
    assert host.prepare() == 0
    assert host.flows() == before[1]
    assert host.restore() == 0
    assert host.state() == before


def test_a_bridge_without_a_fail_mode_gets_none_back(host: Host) -> None:
    host.vsctl("del-fail-mode", BRIDGE)
    before = host.state()
    assert host.prepare() == 0
    assert host.vsctl("get-fail-mode", BRIDGE).strip() == "secure"
    assert host.restore() == 0
    assert host.state() == before


def test_other_managers_and_controllers_stay(host: Host) -> None:
    other, another = find_free_ports(2)
    host.vsctl("set-manager", f"ptcp:{other}:127.0.0.1")
    host.vsctl("set-controller", BRIDGE, f"ptcp:{another}:127.0.0.1")
    before = host.state()
    assert host.prepare() == 0
    assert len(host.vsctl("get-manager").split()) == 2
    assert len(host.vsctl("get-controller", BRIDGE).split()) == 2
    assert host.restore() == 0
    assert host.vsctl("get-manager").strip() == f"ptcp:{other}:127.0.0.1"
    assert host.vsctl("get-controller", BRIDGE).strip() == f"ptcp:{another}:127.0.0.1"
    # Whoever listens has a status of its own.
    assert host.state()[1:] == before[1:]


REFUSED: dict[str, tuple[Callable[[Host], object], str]] = {
    "no such bridge": (lambda host: host.change(f"bridge: {BRIDGE}", "bridge: br-none"), "no bridge"),
    "a port of a leg's name": (
        lambda host: host.vsctl("add-port", BRIDGE, "hp-det-b"), "a port of the name of a leg"
    ),
    "a port with a leg's number": (
        lambda host: host.vsctl(
            "add-port", BRIDGE, "x1", "--", "set", "Interface", "x1", "ofport_request=65004"
        ),
        "one of the numbers",
    ),
    "certificates of others": (
        lambda host: host.vsctl("set-ssl", "/a/key", "/a/cert", "/a/ca"), "has certificates already"
    ),
    "no certificates to use": (
        lambda host: host.spec_file.write_text(host.spec_file.read_text() + "tls: existing\n"),
        "has no certificates",
    ),
    "flows that would be lost": (
        lambda host: host.ofctl("add-flow", "priority=7,in_port=1,actions=drop"), "has flows of its own"
    ),
    "groups that would be lost": (
        lambda host: host.ofctl("add-group", "group_id=9,type=all,bucket=output:1"),
        "has flows of its own",
    ),
    "an old OpenFlow": (
        lambda host: host.vsctl("set", "Bridge", BRIDGE, "protocols=OpenFlow13"), "OpenFlow 1.5"
    ),
    "a listener at the port": (
        lambda host: host.vsctl("set-manager", f"ptcp:{host.spec.ovsdb_port}:127.0.0.1"),
        "listens at port",
    ),
    "a file of others": (
        lambda host: (
            (host.switch.directory / "tls").mkdir(),
            (host.switch.directory / "tls" / "ca.pem").write_text("another\n"),
        ),
        "with other contents",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_overwritten_is_refused_by_both(
    host: Host, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = REFUSED[name]
    spoil(host)
    before = host.state()
    assert host.prepare() == 1
    assert reason in capsys.readouterr().err
    done = host.run_script(host.plan.prepare)
    assert done.returncode == 1
    assert reason in done.stderr
    after = host.state()
    assert after[:2] == before[:2]
    assert set(before[2]) <= set(after[2])


def test_another_plan_on_a_prepared_bridge_is_refused(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    assert host.prepare() == 0
    host.change("vlan: 3902", "vlan: 3903")
    before = host.state()
    assert host.prepare() == 1
    assert "prepared already, by another plan" in capsys.readouterr().err
    assert host.state() == before
    assert host.restore() == 0  # by what the database has recorded, not by the plan
    assert "hairpin" not in json.dumps(host.dump())


def test_keys_of_another_folder_cut_no_appliance_off(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when it is run again in another directory: the folder has the host's name only."""
    assert host.prepare() == 0
    before = host.state()
    host.keys = host.switch.directory / "other"
    assert host.prepare() == 1
    assert "with other keys" in capsys.readouterr().err
    assert host.run_script(host.plan.prepare).returncode == 1
    assert host.state() == before


def test_a_listener_that_does_not_come_up_is_told(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    before = host.state()
    host.change("address: 127.0.0.1", "address: 192.0.2.77")
    assert host.prepare() == 1
    assert "nobody listens" in capsys.readouterr().err
    assert host.restore() == 0
    assert host.state() == before


def test_a_switch_that_does_not_answer_is_not_taken_for_one_without_hairpin(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.prepare() == 0
    before = host.state()
    monkeypatch.setenv("OVS_RUNDIR", str(host.switch.directory / "nowhere"))
    for ops in (host.plan.restore, host.plan.prepare):
        with pytest.raises(HairpinError):
            carry_out(ops, print)
        assert host.run_script(ops).returncode != 0
    assert host.state() == before


def test_restore_refuses_while_flows_of_others_would_be_lost(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    assert host.prepare() == 0
    for cookie in ("0", "0x48501"):  # neither is Hairpin's
        host.ofctl("add-flow", f"cookie={cookie},priority=7,in_port=1,actions=drop")
        before = host.state()
        assert host.restore() == 1
        assert "flows of others" in capsys.readouterr().err
        assert host.run_script(host.plan.restore).returncode == 1
        assert host.state() == before
        host.ofctl("del-flows", f"cookie={cookie}/-1,in_port=1")
    host.ofctl("add-flow", "cookie=0x4850010000000001,priority=7,in_port=1,actions=drop")
    assert host.restore() == 0


def test_restore_refuses_while_groups_of_others_would_be_lost(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    assert host.prepare() == 0
    host.ofctl("add-group", "group_id=7,type=all,bucket=output:1")
    before = host.state()
    assert host.restore() == 1
    assert "groups of others" in capsys.readouterr().err
    assert host.run_script(host.plan.restore).returncode == 1
    assert host.state() == before
    host.ofctl("del-groups", "group_id=7")
    assert host.restore() == 0


def test_restore_leaves_files_of_others(host: Host) -> None:
    """As where `prepare` refused, since they were there."""
    folder = host.switch.directory / "tls"
    folder.mkdir(mode=0o750)
    (folder / "host.key").write_text("somebody's key\n")
    before = host.state()
    for restore in (host.restore, lambda: host.run_script(host.plan.restore).returncode):
        assert host.prepare() == 1
        assert restore() == 0
        assert host.state() == before


def find_runs(ops: tuple[Op, ...], number: int) -> tuple[tuple[Op, ...], int]:
    """The first ``number`` operations that change something; what follows is cut off."""
    kept: list[Op] = []
    for op in ops:
        if isinstance(op, When):
            then, left = find_runs(op.then, number)
            otherwise, left_otherwise = find_runs(op.otherwise, number)
            kept.append(When(op.look, op.equals, then, otherwise))
            number = min(left, left_otherwise)
        elif type(op).__name__ in ("Run", "Put", "Each", "Drop"):
            if number == 0:
                return tuple(kept), 0
            kept.append(op)
            number -= 1
        else:
            kept.append(op)
    return tuple(kept), number


@pytest.mark.parametrize("number", range(8))
def test_one_that_was_interrupted_goes_on_or_is_taken_back(host: Host, number: int) -> None:
    before = host.state()
    plan = host.plan
    cut, _ = find_runs(plan.prepare, number)
    host.run_script(cut)
    assert host.prepare() == 0
    whole = host.state()
    assert host.restore() == 0
    assert host.state() == before
    assert host.prepare() == 0
    assert host.state() == whole
    cut, _ = find_runs(plan.restore, number)
    host.run_script(cut)
    assert host.restore() == 0
    assert host.state() == before
    host.run_script(find_runs(plan.prepare, number)[0])
    assert host.restore() == 0
    assert host.state() == before


async def test_the_appliance_steers_by_what_was_issued_and_restore_ends_it(host: Host) -> None:
    before = host.state()
    assert host.prepare() == 0
    document = json.loads(
        _run_json(["host", "prepare", str(host.spec_file), "--keys", str(host.keys)])
    )
    seed = yaml.safe_load(document["seed"])["hairpin"]
    files = TlsFiles(*(host.keys / name for name in ("ca.pem", "appliance.pem", "appliance.key")))
    assert seed["switch"]["certificate"] == files.certificate.read_text()
    settings = Settings.model_validate(
        {
            "switch": {
                **{key: seed["switch"][key] for key in ("ovsdb", "openflow", "bridge")},
                "tls": {"caFile": files.ca, "certFile": files.certificate, "keyFile": files.key},
            },
            "lanes": [
                {
                    "profile": lane["profile"],
                    "vlan": lane["vlan"],
                    **{leg: {"interface": lane[leg]["interface"], "device": f"{lane['profile'][:4]}-{leg}"}
                       for leg in ("legA", "legB", "legC") if leg in lane},
                }
                for lane in seed["lanes"]
            ],
            "canary": {"interface": seed["canary"]["interface"]},
        }
    )  # fmt: skip
    attach_vms(host.switch)
    told: list[SteeringEvent] = []
    reconciler = Reconciler(
        ovsdb=settings.switch.ovsdb,
        openflow=settings.switch.openflow,
        bridge=settings.switch.bridge,
        lanes=settings.build_lanes(2),
        canary=settings.canary.interface,
        on_event=told.append,
        tls=settings.switch.tls_files,
    )
    try:
        await reconciler.start(PolicySet())
        await wait_until(lambda: len(reconciler.machines()) == len(VMS))
        await reconciler.apply(build_policies())
        assert reconciler.status.problems == ()
        assert any("watch_port:65000" in line for line in host.flows())
        # While it runs: it must not put back what is taken away.
        assert host.restore() == 0
        await wait_until(lambda: not reconciler.status.reachable, 15.0)
    finally:
        await reconciler.close()
    for vm in VMS:
        host.vsctl("clear", "Interface", f"p{vm}", "external_ids")
    assert host.state() == before


def _run_json(argv: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run_cli([*argv, "--json"]) == 0
    return out.getvalue()


async def test_renewed_certificates_are_taken_without_a_restart(host: Host) -> None:
    assert host.prepare() == 0
    former = (host.switch.directory / "tls" / "host.pem").read_text()
    argv = ["host", "prepare", str(host.spec_file), "--keys", str(host.keys), "--apply", "--renew"]
    assert run_cli(argv) == 0
    assert (host.switch.directory / "tls" / "host.pem").read_text() != former
    files = TlsFiles(*(host.keys / name for name in ("ca.pem", "appliance.pem", "appliance.key")))
    target = f"ssl:127.0.0.1:{host.spec.openflow_port}"
    await wait_until(lambda: find_peer_fault("openflow", target, files) is None)


def test_only_root_applies(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    before = host.state()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # the tests run as root
    assert host.prepare() == 1
    assert host.state() == before
