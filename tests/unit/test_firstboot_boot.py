"""First boot with real files: all or nothing, what is kept, and what is left when something fails."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appliance.cli import build_app
from appliance.firstboot.door import read_credentials, read_directory
from appliance.firstboot.faults import Fault, SeedRefused, read_report, render_report
from appliance.firstboot.offer import SEED_LIMIT, Offered
from appliance.firstboot.places import find_places
from appliance.firstboot.write import write_file
from appliance.settings import read_settings
from steering.errors import HairpinError, WrongInput
from tests.support.certificates import issue
from tests.support.seed import (
    DEVICES,
    TOKEN,
    Machine,
    add_fault,
    build_seed,
    change,
    offer,
    with_disk,
)

CONFIG = "/run/hairpin-config"
MANAGEMENT = "/run/systemd/network/10-hairpin-management.network"
SETTINGS = f"{CONFIG}/settings.yaml"
FAULTS = f"{CONFIG}/faults.json"
KEPT = "/var/lib/hairpin-firstboot/accepted.json"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def find_active(machine: Machine) -> set[str]:
    """Files of `/run`: what is in force at this boot."""
    return {path for path in machine.list_files() if path.startswith("/run")}


def test_a_right_seed_is_in_force_whole(machine: Machine) -> None:
    plan = machine.boot(offer(build_seed()))
    settings = read_settings(machine.places.settings)
    assert settings.name == plan.name == "rack-12"
    assert machine.names == ["rack-12"]
    assert find_active(machine) == {
        SETTINGS, MANAGEMENT, "/run/systemd/network/20-hairpin-lanes.network",
        *(f"{CONFIG}/{name}" for name in (
            "api.pem", "api.key", "switch-ca.pem", "switch.pem", "switch.key", "boot.json", "client.json",
        )),
    }  # fmt: skip
    files = machine.list_files()
    assert files["/var/lib/hairpin/token"] == f"{TOKEN}\n"
    for path in machine.root.glob("**/*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.suffix == ".key" or path.name in ("token", "accepted.json", "api.key"):
            assert mode == 0o600, path
        assert not mode & 0o022, path
    assert stat.S_IMODE(machine.places.kept_dir.stat().st_mode) == 0o700
    assert "hairpin" in machine.owners
    secret = build_seed()["switch"]["key"]
    assert {path for path, text in files.items() if secret in text} == {f"{CONFIG}/switch.key"}
    assert not list(machine.root.glob("**/.*"))  # nothing half written is left


def test_a_disk_does_as_well(machine: Machine) -> None:
    machine.boot(with_disk(build_seed(), meta_data="instance-id: rack-12\n"))
    assert read_settings(machine.places.settings).name == "rack-12"


def test_without_a_seed_nothing_is_in_force_and_it_is_said(machine: Machine) -> None:
    faults = machine.refuse(Offered({}))
    assert list(faults) == ["(seed)"]
    assert find_active(machine) == {FAULTS}
    report = machine.read_report()
    assert (report.reachable, report.port, report.name) == (False, 8470, "hairpin")
    assert "CIDATA" in report.faults[0].reason
    assert report.faults[0].mend


WRONG = [
    ("lanes.0.vlan", 0),
    ("name", "Rack 12"),
    ("api.token", "short"),
    ("switch.key", issue("other").key),
    ("switch.ca", "-----BEGIN x"),
    ("canary.mac", "52:54:00:99:99:99"),
    ("lanes.0.queues", [0, 2]),
    ("color", "red"),
]


@pytest.mark.parametrize(("path", "value"), WRONG)
@pytest.mark.parametrize("before", [False, True])
def test_with_a_fault_nothing_is_in_force_but_the_management_network(
    machine: Machine, path: str, value: object, before: bool
) -> None:
    if before:
        machine.boot(offer(build_seed()))
    kept = machine.list_files().get(KEPT)
    machine.names.clear()
    assert machine.refuse(offer(change(path, value)))
    assert find_active(machine) == {FAULTS, MANAGEMENT}
    assert machine.names == []
    report = machine.read_report()
    assert report.reachable
    assert TOKEN not in str(report)
    # What was accepted is not touched: taking the wrong seed away brings it back.
    assert machine.list_files().get(KEPT) == kept
    if before:
        assert machine.boot(Offered({})).name == "rack-12"


def test_without_a_management_network_the_faults_are_for_the_console(machine: Machine) -> None:
    for path, value in (("management.mac", "52:54:00:99:99:99"), ("management.address", "x")):
        machine.refuse(offer(change(path, value)))
        assert find_active(machine) == {FAULTS}
        assert not machine.read_report().reachable


def test_what_was_accepted_is_kept_when_the_seed_is_taken_away(machine: Machine) -> None:
    machine.boot(offer(build_seed()))
    first = machine.list_files()
    machine.now += 86400.0
    machine.boot(Offered({}))
    again = machine.list_files()
    changed = {path for path in first if first[path] != again[path]}
    assert set(first) == set(again)
    assert changed == {f"{CONFIG}/boot.json"}
    assert '"origin": "kept"' in again[f"{CONFIG}/boot.json"]
    assert f'"acceptedAt": {machine.now - 86400.0}' in again[f"{CONFIG}/boot.json"]


def test_the_same_seed_is_no_new_one_and_a_changed_one_is_taken_at_the_next_boot(
    machine: Machine,
) -> None:
    machine.boot(offer(build_seed()))
    kept = machine.list_files()[KEPT]
    machine.now += 60.0
    machine.boot(offer(build_seed()))
    assert machine.list_files()[KEPT] == kept
    machine.boot(offer(change("name", "rack-13")))
    assert read_settings(machine.places.settings).name == "rack-13"
    assert machine.list_files()[KEPT] != kept
    machine.boot(Offered({}))
    assert read_settings(machine.places.settings).name == "rack-13"


def test_a_token_may_be_changed_by_itself(machine: Machine) -> None:
    machine.boot(offer(change("api.token", ...), token=TOKEN))
    machine.boot(offer(None, token="fedcba98" * 4))
    assert machine.list_files()["/var/lib/hairpin/token"] == "fedcba98" * 4 + "\n"
    machine.boot(Offered({}))
    assert machine.list_files()["/var/lib/hairpin/token"] == "fedcba98" * 4 + "\n"


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", None])
def test_what_was_accepted_and_is_damaged_is_not_used(
    machine: Machine, damage: bytes | None
) -> None:
    machine.boot(offer(build_seed()))
    kept = machine.places.kept
    data = kept.read_bytes()
    kept.write_bytes(data.replace(b"rack-12", b"rack-13") if damage is None else damage)
    faults = machine.refuse(Offered({}))
    assert "what was accepted" in faults["(seed)"].reason
    assert find_active(machine) == {FAULTS}
    # The seed itself mends it.
    machine.boot(offer(build_seed()))
    assert kept.read_bytes() == data.replace(b"rack-13", b"rack-12")
    machine.boot(Offered({}))


def test_a_seed_that_can_not_be_read_is_wrong_and_not_missing(machine: Machine) -> None:
    machine.boot(offer(build_seed()))
    broken = add_fault(Offered({}), Fault("disk CIDATA", "can't be read", "make it anew"))
    assert list(machine.refuse(broken)) == ["disk CIDATA"]
    # The network of what was accepted: else nobody could ask for the fault.
    assert find_active(machine) == {FAULTS, MANAGEMENT}
    assert list(machine.refuse(Offered({"hairpin.seed": b"["}))) == [
        "credential hairpin.seed, line 2, column 1"
    ]
    machine.refuse(Offered({"hairpin.tokn": b"x"}))
    assert find_active(machine) == {FAULTS, MANAGEMENT}


def test_an_expired_certificate_stops_no_lane_that_was_accepted(machine: Machine) -> None:
    machine.boot(offer(build_seed()))
    machine.now += 60 * 86400.0
    plan = machine.boot()
    assert any("switch.certificate: expired" in note for note in plan.notes)
    assert SETTINGS in find_active(machine)
    fresh = Machine(machine.root / "fresh", offer(build_seed()), now=machine.now)
    assert "switch.certificate" in fresh.refuse()


def test_our_own_certificate_is_made_once(machine: Machine) -> None:
    first = machine.boot(offer(build_seed())).fingerprint
    assert machine.boot().fingerprint == first
    moved = change("management.address", "192.0.2.11/24")
    assert machine.boot(offer(moved)).fingerprint != first
    pem = machine.places.kept_dir / "api.pem"
    pem.write_text("damaged")
    assert machine.boot().fingerprint
    assert pem.read_text().startswith("-----BEGIN")


@pytest.mark.parametrize("name", ["accepted.json", "api.pem", "api.key"])
@pytest.mark.parametrize("kind", ["pipe", "link", "directory"])
def test_what_is_kept_is_read_from_plain_files_only(machine: Machine, name: str, kind: str) -> None:
    """/var is not signed: what was put there must not hold up the boot, nor divert what is written."""
    machine.boot(offer(build_seed()))
    path = machine.places.kept_dir / name
    path.unlink()
    victim = machine.root / "victim"
    victim.write_text("as it was")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(victim)
    else:
        path.mkdir()
    if name == "accepted.json":
        assert "(seed)" in machine.refuse(Offered({}))
    elif kind == "directory":
        assert "(first boot)" in machine.refuse()
    else:
        machine.boot()
    assert victim.read_text() == "as it was"
    assert (SETTINGS in find_active(machine)) != (FAULTS in find_active(machine))


def test_a_refused_seed_does_not_cost_our_own_certificate(machine: Machine) -> None:
    first = machine.boot(offer(build_seed())).fingerprint
    before = machine.list_files()
    assert machine.refuse(offer(change("canary.mac", "52:54:00:99:99:99", change("name", "other"))))
    assert machine.boot(offer(build_seed())).fingerprint == first
    kept = "/var/lib/hairpin-firstboot/api.key"
    assert machine.list_files()[kept] == before[kept]


def test_run_again_in_the_same_boot_it_leaves_nothing_of_the_run_before(machine: Machine) -> None:
    receiver = {"name": "old", "host": "h", "ca": build_seed()["switch"]["ca"]}
    machine.boot(offer(change("export", [receiver])))
    assert f"{CONFIG}/export-old-ca.pem" in find_active(machine)
    machine.run(offer(build_seed()))
    assert f"{CONFIG}/export-old-ca.pem" not in find_active(machine)
    with pytest.raises(SeedRefused):
        machine.run(offer(change("lanes", [])))
    assert find_active(machine) == {FAULTS, MANAGEMENT}
    machine.run(offer(build_seed()))
    assert FAULTS not in find_active(machine)


# What fails on the way


@pytest.mark.parametrize("after", range(14))
def test_a_write_that_fails_at_any_place_leaves_nothing_in_force(
    machine: Machine, after: int
) -> None:
    """A user that vanishes stands for a full disk: both fail at a file, anywhere in the row."""
    asked = 0

    def find_owner(name: str) -> tuple[int, int]:
        nonlocal asked
        asked += 1
        if asked == after + 1:
            raise HairpinError("no such user", "use an image with its users")
        return os.geteuid(), os.getegid()

    machine.find_owner = find_owner
    try:
        machine.boot(offer(build_seed()))
    except SeedRefused as refused:
        told = [fault.path for fault in refused.told]
    else:
        told = []
    assert bool(told) == (asked > after), "a write that failed was not told"
    if told:
        assert told == ["(first boot)"]
        assert machine.read_report().faults[0].reason == "no such user"
        assert SETTINGS not in find_active(machine)
        assert find_active(machine) <= {FAULTS, MANAGEMENT}
        machine.find_owner = None
        machine.boot()
    assert SETTINGS in find_active(machine)


def test_where_not_even_the_faults_can_be_written_the_seed_is_refused_all_the_same(
    machine: Machine,
) -> None:
    run = machine.root / "run"
    run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_blocks=1", "full", str(run)], check=True)
    try:
        (run / "hairpin-config").mkdir()
        with contextlib.suppress(OSError), open(run / "filler", "wb") as filler:
            filler.write(bytes(2**16))
        with pytest.raises(SeedRefused):
            machine.run(offer(change("lanes", [])))
        assert not machine.places.settings.exists()
    finally:
        subprocess.run(["umount", str(run)], check=True)


def test_a_place_that_can_not_be_written_is_told(machine: Machine) -> None:
    (machine.root / "var/lib").mkdir(parents=True)
    (machine.root / "var/lib/hairpin-firstboot").write_text("a file where a directory must be")
    faults = machine.refuse(offer(build_seed()))
    assert "can't be kept" in faults["(first boot)"].reason
    assert find_active(machine) == {FAULTS, MANAGEMENT}


def test_a_fault_of_the_program_is_told_and_leaves_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **more: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("appliance.firstboot.main.build_plan", fail)
    with pytest.raises(ZeroDivisionError):
        machine.boot(offer(build_seed()))
    assert find_active(machine) == {FAULTS, MANAGEMENT}
    assert "a fault of the program: ZeroDivisionError" in machine.read_report().faults[0].reason


def test_a_link_in_the_services_own_directory_diverts_nothing(machine: Machine) -> None:
    target = machine.root / "precious"
    target.write_text("as it was")
    state = machine.root / "var/lib/hairpin"
    state.mkdir(parents=True)
    (state / "token").symlink_to(target)
    machine.boot(offer(build_seed()))
    assert target.read_text() == "as it was"
    assert not (state / "token").is_symlink()
    linked = machine.root / "linked"
    linked.symlink_to(state)
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        write_file(linked / "token", "x", 0o600, (os.geteuid(), os.getegid()))


# Doors


def test_credentials_are_read_as_systemd_hands_them_over(tmp_path: Path) -> None:
    assert read_credentials(tmp_path / "absent") == ({}, ())
    (tmp_path / "hairpin.name").write_text("rack-12")
    (tmp_path / "other.secret").write_text("not ours")
    (tmp_path / "hairpin.seed").write_bytes(b"x" * (SEED_LIMIT + 100))
    values, faults = read_credentials(tmp_path)
    assert faults == ()
    assert {name: len(data) for name, data in values.items()} == {
        "hairpin.name": 7,
        "hairpin.seed": SEED_LIMIT + 1,
    }
    os.mkfifo(tmp_path / "hairpin.token")
    (tmp_path / "hairpin.api-key").symlink_to("/etc/shadow")
    _, faults = read_credentials(tmp_path)
    assert [fault.path for fault in faults] == [
        "credential hairpin.api-key",
        "credential hairpin.token",
    ]
    for number in range(70):
        (tmp_path / f"hairpin.x{number}").touch()
    values, faults = read_credentials(tmp_path)
    assert values == {}
    assert "that begin with hairpin." in faults[0].reason


def test_of_a_disk_only_its_own_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "user-data").write_text("hairpin: {}\n")
    (tmp_path / "README").write_text("nothing")
    assert read_directory(tmp_path) == {"user-data": b"hairpin: {}\n"}
    (tmp_path / "meta-data").symlink_to("/etc/shadow")
    with pytest.raises(OSError, match="Too many levels"):
        read_directory(tmp_path)


def test_the_services_own_credentials_go_before_the_systems(tmp_path: Path) -> None:
    assert find_places(tmp_path, {}).credentials == tmp_path / "run/credentials/@system"
    own = find_places(tmp_path, {"CREDENTIALS_DIRECTORY": "/run/credentials/hairpin"})
    assert own.credentials == Path("/run/credentials/hairpin")


def test_the_report_of_faults_is_bounded_and_read_back(machine: Machine) -> None:
    machine.refuse(Offered({}))
    report = machine.read_report()
    many = replace(report, faults=tuple(Fault(f"a[{n}]", "wrong", "mend it") for n in range(500)))
    machine.places.faults.write_text(render_report(many))
    found = machine.read_report()
    assert len(found.faults) == 201
    assert found.faults[-1].reason == "and 300 more faults"
    odd = Fault("k" * 10_000, "not \ud800", "mend it")
    machine.places.faults.write_text(render_report(replace(report, faults=(odd,) * 200)))
    assert "ud800" in machine.read_report().faults[0].reason
    assert read_report(machine.root / "absent") is None
    machine.places.faults.write_text("{")
    with pytest.raises(HairpinError, match=r"faults\.json can't be read"):
        read_report(machine.places.faults)


def test_the_command_ends_with_2_and_names_each_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real doors: this machine has neither these credentials nor these devices."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "hairpin.seed").write_bytes(offer(build_seed()).credentials["hairpin.seed"])
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    monkeypatch.setattr("appliance.firstboot.door.DEVICE_SECONDS", 0.1)
    monkeypatch.setattr("appliance.firstboot.door.wait_for_devices.__defaults__", (0.1,))
    root = tmp_path / "root"
    done = CliRunner().invoke(build_app(), ["firstboot", "--root", str(root)])
    assert isinstance(done.exception, WrongInput)
    assert "no directory" in str(done.exception)
    assert not root.exists()
    root.mkdir()
    done = CliRunner().invoke(build_app(), ["firstboot", "--root", str(root)])
    assert isinstance(done.exception, SeedRefused)
    assert done.exception.exit_status == 2
    paths = [fault.path for fault in done.exception.told]
    assert paths == ["management.mac", "lanes[0].legA.mac", "lanes[0].legB.mac", "canary.mac"]
    assert not (root / "run/hairpin-config/settings.yaml").exists()
    assert len(DEVICES) == 5
