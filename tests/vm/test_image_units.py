"""The units of the image: what they may do, by systemd's own measure and by their text."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTRA = ROOT / "image-build/mkosi.extra"
UNITS = sorted((EXTRA / "usr/lib/systemd/system").glob("hairpin-*.service"))
TOOLS = ROOT / "image-build/cache/tools"
MOST = 2.5
IDS = [unit.stem for unit in UNITS]
WITHOUT_CAPABILITIES = ("serve", "console", "setup-health")
BY_UDEV = ("hairpin-update",)
"""Started when a disk appears."""

pytestmark = pytest.mark.vm


def read_values(unit: Path, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", unit.read_text(), re.MULTILINE)


@pytest.mark.parametrize("unit", UNITS, ids=IDS)
def test_a_unit_exposes_little(unit: Path, tmp_path: Path) -> None:
    """By Debian 13's systemd, that of the image, in the tools tree that built it."""
    inside = TOOLS / "tmp" / tmp_path.name
    inside.mkdir(parents=True)
    try:
        shutil.copy(unit, inside)
        done = subprocess.run(
            [
                "chroot", str(TOOLS), "systemd-analyze", "security", "--offline=true", "--no-pager",
                f"--threshold={MOST * 10:.0f}", f"/tmp/{tmp_path.name}/{unit.name}",
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip
    finally:
        shutil.rmtree(inside)
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= MOST
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", WITHOUT_CAPABILITIES)
def test_what_talks_to_clients_has_a_user_and_no_capability(name: str) -> None:
    unit = next(one for one in UNITS if one.stem == f"hairpin-{name}")
    assert read_values(unit, "User") == ["hairpin"]
    assert read_values(unit, "CapabilityBoundingSet") == [""]
    assert all(value == "" for value in read_values(unit, "AmbientCapabilities"))
    assert read_values(unit, "NoNewPrivileges") == ["yes"]


def test_only_what_needs_links_and_rules_may_change_the_network() -> None:
    admins = {
        unit.stem
        for unit in UNITS
        for value in read_values(unit, "(?:CapabilityBoundingSet|AmbientCapabilities)")
        if "CAP_NET_ADMIN" in value
    }
    assert admins == {"hairpin-inspect"}


@pytest.mark.parametrize("unit", UNITS, ids=IDS)
def test_a_unit_is_started_at_boot_or_by_a_disk(unit: Path) -> None:
    wanted = read_values(unit, "(?:WantedBy|RequiredBy)")
    assert bool(wanted) != (unit.stem in BY_UDEV)


@pytest.mark.parametrize("name", BY_UDEV)
def test_a_rule_of_udev_starts_it(name: str) -> None:
    rules = (EXTRA / "usr/lib/udev/rules.d").glob("*.rules")
    assert any(f'ENV{{SYSTEMD_WANTS}}+="{name}.service"' in path.read_text() for path in rules)
