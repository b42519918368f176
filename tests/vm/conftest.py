"""What the tests of the image stand on: the image that was built, and a VM of it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from appliance.cli import run_cli
from tests.support.qemu import Vm, VmSpec, missing_tools, run_vm
from tests.support.vm_seed import write_iso

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "image-build/out"


@pytest.fixture(scope="session")
def image() -> Path:
    """The raw disk of the newest image in image-build/out, or the one that HAIRPIN_IMAGE names."""
    if missing := missing_tools():
        pytest.fail(f"not installed: {', '.join(missing)}; run image-build/setup-image.sh")
    if named := os.environ.get("HAIRPIN_IMAGE"):
        return Path(named)
    built = sorted(OUT.glob("hairpin_*.raw"), key=lambda path: path.stat().st_mtime)
    if not built:
        pytest.fail("no image was built; run `make image`")
    return built[-1]


@pytest.fixture(scope="session")
def keys() -> tuple[Path, Path]:
    """What the image was signed with on this machine: the private key and its certificate."""
    at = Path(os.environ.get("HAIRPIN_IMAGE_KEYS", ROOT / "image-build/keys"))
    if not (at / "image.key").exists():
        pytest.fail(f"no {at}/image.key: the tests sign rules with the key of a development image")
    return at / "image.key", at / "image.crt"


@pytest.fixture(scope="session")
def newer(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image once more, of the next version; HAIRPIN_NEXT_IMAGE names one that is there."""
    if named := os.environ.get("HAIRPIN_NEXT_IMAGE"):
        return Path(named)
    out = tmp_path_factory.mktemp("newer")
    major, minor, patch = re.findall(r"\d+", image.name)[:3]
    version = f"{major}.{minor}.{int(patch) + 1}"
    subprocess.run(
        [str(ROOT / "image-build/build.sh")],
        env={**os.environ, "OUT": str(out), "VERSION": version},
        check=True,
        timeout=1700,
        capture_output=True,
    )
    return out / f"hairpin_{version}.raw"


@pytest.fixture(scope="session")
def update_disk(
    newer: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """As docs/update.md has it made."""
    at = tmp_path_factory.mktemp("release")
    argv = ["image", "extract", str(newer), "--output", str(at / "parts")]
    assert run_cli([*argv, "--certificate", str(keys[1])]) == 0
    parts: dict[str, str | Path] = {path.name: path for path in (at / "parts").iterdir()}
    return write_iso(at / "update.iso", parts, "HAIRPIN_UPDATE")


@pytest.fixture
def boot(image: Path, tmp_path: Path) -> Iterator[Callable[..., Vm]]:
    """Boots VMs of the image: `boot(cores=1, ...)` as `VmSpec` has it. All are off at the test's end."""
    with ExitStack() as running:

        def start(name: str = "vm", **wanted: Any) -> Vm:
            spec = VmSpec(**{"disk": image, "directory": tmp_path / name, **wanted})
            return running.enter_context(run_vm(spec))

        yield start
