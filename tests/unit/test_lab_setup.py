"""Set-up: a suite is added by the machine's own source, and the locks name no host."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / "image-build/setup.sh"


def render_backports(source: Path, codename: str = "bookworm") -> str:
    argv = ["bash", "-c", 'source "$1"; render_backports "$2" "$3"', "bash", str(SETUP)]
    done = subprocess.run(
        [*argv, codename, str(source)], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_deb822_source_keeps_its_uri_and_inline_key_and_only_the_suite_changes(
    tmp_path: Path,
) -> None:
    source = tmp_path / "debian.sources"
    source.write_text(
        "# security first\n"
        "Types: deb\nURIs: file:/mirror/security\nSuites: bookworm-security\nComponents: main\n"
        "\n"
        "Types: deb deb-src\nURIs: file:/mirror/debian\nSuites: bookworm bookworm-updates\n"
        "Components: main contrib\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"
    )
    assert render_backports(source) == (
        "Types: deb deb-src\nURIs: file:/mirror/debian\nSuites: bookworm-backports\n"
        "Components: main contrib\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"
    )


def test_a_classic_source_keeps_its_uri_and_options(tmp_path: Path) -> None:
    source = tmp_path / "sources.list"
    source.write_text(
        "# deb file:/old bookworm main\n"
        "deb-src file:/mirror/debian bookworm main\n"
        "deb [signed-by=/keys/debian.gpg arch=amd64] file:/mirror/debian bookworm main\n"
        "deb file:/mirror/debian bookworm-updates main\n"
    )
    assert render_backports(source) == (
        "deb [signed-by=/keys/debian.gpg arch=amd64] file:/mirror/debian bookworm-backports main\n"
    )


def test_a_source_of_another_release_gives_nothing(tmp_path: Path) -> None:
    for name in ("other.list", "other.sources"):
        source = tmp_path / name
        source.write_text("deb file:/mirror trixie main\n\nSuites: trixie\n")
        assert render_backports(source) == ""


@pytest.mark.parametrize(
    "name", ["requirements.lock", "requirements-dev.lock", "requirements-build.lock"]
)
def test_the_locks_pin_all_by_hash_and_name_no_host(name: str) -> None:
    text = (ROOT / name).read_text()
    pinned = re.findall(r"^([a-z0-9][a-z0-9._-]*)==", text, re.MULTILINE)
    assert pinned
    for block in re.split(r"\n(?=[a-z0-9])", text):
        assert "--hash=sha256:" in block
    assert not re.search(r"https?://|--index|--find-links|--extra", text)


def test_every_direct_dependency_is_locked() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = set(
        re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE)
    )
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.split(r"[<>=!~\[ ]", one)[0] for one in wanted} - locked == set()
