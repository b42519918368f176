"""The image that `make image` built on this machine, if it is there: the same, on the real thing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from appliance.cli import run_cli
from tests.support.disk_images import find_partition, flipped, run

ROOT = Path(__file__).resolve().parents[3]
OUT = Path(os.environ.get("HAIRPIN_IMAGE_OUT", ROOT / "image-build" / "out"))
KEYS = Path(os.environ.get("HAIRPIN_IMAGE_KEYS", ROOT / "image-build" / "keys"))

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = sorted(OUT.glob("hairpin_*.qcow2"))
    if not built or not (KEYS / "image.crt").exists():
        pytest.fail(f"no image in {OUT}: `make image`")
    disk = tmp_path_factory.mktemp("real") / "disk.raw"
    run("qemu-img", "convert", "-O", "raw", built[-1], disk)
    return disk


def test_it_is_signed_whole_and_a_flip_in_each_part_is_told(
    disk: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest"
    certificate = ["--certificate", str(KEYS / "image.crt")]
    argv = ["image", "sign", str(disk), "--key", str(KEYS / "image.key"), *certificate]
    assert run_cli([*argv, "--output", str(manifest)]) == 0
    verify = ["image", "verify", str(disk), *certificate, "--manifest", str(manifest), "--json"]
    capsys.readouterr()
    assert run_cli(verify) == 0, capsys.readouterr().out
    told = json.loads(capsys.readouterr().out)
    version = told["versions"][0]
    wanted = {
        f"hairpin_{version}": "root A data",
        f"hairpin_{version}_verity": "root A tree",
        f"hairpin_{version}_sig": "root A signature",
        "hairpin-rules": "rules copy 1",
        "hairpin-var": "var",
    }
    for label, place in wanted.items():
        with flipped(disk, find_partition(disk, label).offset + 8 * 4096 // 3):
            assert run_cli(verify) == 1
        bad = [
            one for one in json.loads(capsys.readouterr().out)["findings"] if one["status"] != "ok"
        ]
        assert place in {one["place"] for one in bad}


def test_an_update_is_taken_out_of_it(
    disk: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["image", "extract", str(disk), "--output", str(tmp_path / "out")]
    assert run_cli([*argv, "--certificate", str(KEYS / "image.crt"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["files"]) == 4
    assert f"hairpin_{told['version']}.efi" in told["files"]
