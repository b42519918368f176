"""Files on a host: the script and the door do the same, touch nothing of others, and follow no link."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.hosting.door import carry_out
from appliance.hosting.ops import Drop, Folder, Look, Op, Put
from appliance.hosting.script import END, render_script
from steering.errors import HairpinError

SIGN = "[hairpin-host hv-1]"
Do = Callable[..., bool]


@pytest.fixture(params=["script", "door"])
def do(request: pytest.FixtureRequest) -> Iterator[Do]:
    """Carries operations out; False where they are refused. With a umask as careful as some have."""

    def by_script(*ops: Op) -> bool:
        script = render_script("a test", ops)
        done = subprocess.run(
            ["sh"], input=script, capture_output=True, text=True, timeout=20, check=False
        )
        return done.returncode == 0

    def by_door(*ops: Op) -> bool:
        try:
            carry_out(ops, print)
        except HairpinError:
            return False
        return True

    former = os.umask(0o077)
    yield by_script if request.param == "script" else by_door
    os.umask(former)


def find_mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_is_made_with_those_above_it_for_all_to_look_into(do: Do, tmp_path: Path) -> None:
    """The switch's own user must reach its key."""
    assert do(Folder(f"{tmp_path}/a/b/c", str(tmp_path)))
    assert {find_mode(tmp_path / one) for one in ("a", "a/b", "a/b/c")} == {0o755}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_that_is_there_stays_its_owner_s(do: Do, tmp_path: Path) -> None:
    like, folder = tmp_path / "conf.db", tmp_path / "private"
    like.touch()
    os.chown(like, 12345, 12345)
    folder.mkdir(mode=0o700)
    assert do(Folder(str(folder), str(like)))
    assert (folder.stat().st_uid, find_mode(folder)) == (os.geteuid(), 0o700)
    assert do(Folder(f"{tmp_path}/fresh", str(like)))
    assert (tmp_path / "fresh").stat().st_uid == 12345


def test_a_link_in_the_way_diverts_nothing(do: Do, tmp_path: Path) -> None:
    """The folder belongs to the switch's user, and root writes to it."""
    shadow = tmp_path / "shadow"
    shadow.write_text("root's\n")
    shadow.chmod(0o600)
    (tmp_path / "host.key.new").symlink_to(shadow)
    assert do(Put(f"{tmp_path}/host.key", 0o640, "a key\n", like=str(tmp_path)))
    assert (shadow.read_text(), find_mode(shadow)) == ("root's\n", 0o600)
    assert (tmp_path / "host.key").read_text() == "a key\n"
    assert find_mode(tmp_path / "host.key") == 0o640
    assert not (tmp_path / "host.key").is_symlink()


def test_what_is_there_and_is_no_text_is_refused_as_any_other(do: Do, tmp_path: Path) -> None:
    (tmp_path / "seed").write_bytes(b"\xff\x00")
    assert not do(Put(f"{tmp_path}/seed", 0o600, "a seed\n"))
    assert [path.name for path in tmp_path.iterdir()] == ["seed"]
    assert (tmp_path / "seed").read_bytes() == b"\xff\x00"
    ours = Look(("echo", "ours"))
    assert do(Put(f"{tmp_path}/seed", 0o600, "a seed\n", ours=ours, equals="ours"))


def test_only_what_is_signed_is_removed_with_what_was_broken_off(do: Do, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    texts = {
        "a": f"# {SIGN}\nours\n",
        "a.new": f"# {SIGN}\nhalf of",
        "b.new": "",
        "c": "somebody's\n",
        "c.new": "somebody's, too\n",
        "d": "# [hairpin-host hv-10]\nanother host's\n",
        "e": f"somebody's\n# {SIGN}\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    drop = Drop(tuple(f"{folder}/{name}" for name in "abcdef"), str(folder), SIGN)
    assert do(drop)
    assert sorted(path.name for path in folder.iterdir()) == ["c", "c.new", "d", "e"]
    for path in folder.iterdir():
        path.unlink()
    assert do(drop)
    assert not folder.exists()
    assert do(drop)


def test_a_text_that_would_end_its_own_part_of_the_script_is_refused() -> None:
    with pytest.raises(HairpinError, match="can't stand in a script"):
        render_script("a test", [Put("/x", 0o600, f"-----BEGIN\n{END}\nreboot\n")])
