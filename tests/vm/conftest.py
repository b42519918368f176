"""What the tests of the image stand on: the image that was built, and a VM of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.qemu import Vm, VmSpec, missing_tools, run_vm

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


@pytest.fixture
def boot(image: Path, tmp_path: Path) -> Iterator[Callable[..., Vm]]:
    """Boots VMs of the image: `boot(cores=1, ...)` as `VmSpec` has it. All are off at the test's end."""
    with ExitStack() as running:

        def start(name: str = "vm", **wanted: Any) -> Vm:
            spec = VmSpec(**{"disk": image, "directory": tmp_path / name, **wanted})
            return running.enter_context(run_vm(spec))

        yield start
