"""A lane's directory: whose it is, and that where nobody may set a set-group-id it is inherited."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from appliance.inspection.files import Owner, write_lane_directory

OWNER = Owner(uid=23811, gid=23810)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


def read_modes(directory: Path) -> list[tuple[int, int, int]]:
    seen = (directory.stat(), (directory / "test").stat())
    return [(stat.S_IMODE(one.st_mode), one.st_uid, one.st_gid) for one in seen]


RIGHT = [(0o2770, OWNER.uid, OWNER.gid), (0o2750, OWNER.uid, OWNER.gid)]


def test_a_lanes_directory_is_the_engines_and_of_the_management_group(tmp_path: Path) -> None:
    write_lane_directory(tmp_path / "lanes/prevent", OWNER)
    assert read_modes(tmp_path / "lanes/prevent") == RIGHT


def test_a_set_group_id_that_is_inherited_is_not_set_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the image, whose unit has RestrictSUIDSGID; a mode that is right is left."""
    lanes = tmp_path / "lanes"
    lanes.mkdir()
    os.chown(lanes, 0, OWNER.gid)
    lanes.chmod(0o2755)

    def refuse(descriptor: int, mode: int) -> None:
        raise PermissionError(f"{mode:o}")

    monkeypatch.setattr(os, "fchmod", refuse)
    before = os.umask(0o007)
    try:
        for _ in range(2):
            write_lane_directory(lanes / "prevent", OWNER)
    finally:
        os.umask(before)
    assert read_modes(lanes / "prevent") == RIGHT


def test_a_wrong_mode_is_mended(tmp_path: Path) -> None:
    write_lane_directory(tmp_path / "lanes/prevent", OWNER)
    (tmp_path / "lanes/prevent").chmod(0o777)
    write_lane_directory(tmp_path / "lanes/prevent", OWNER)
    assert read_modes(tmp_path / "lanes/prevent") == RIGHT
