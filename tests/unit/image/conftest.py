"""One image for all these tests; they flip its bytes and put them back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.x509 import Certificate

from appliance.image.disk import open_device_to_read
from appliance.image.gpt import Partition
from appliance.image.manifest import Manifest
from appliance.image.model import Verdict
from appliance.image.sealing import build_from
from appliance.image.signing import read_certificates, read_pair
from appliance.image.verify import Wanted, verify_image
from tests.support.disk_images import Keys, Root, find_partition, make_image, make_keys, make_root


def quiet(_: str) -> None:
    """Progress that nobody reads."""


@dataclass(frozen=True)
class Image:
    disk: Path
    keys: Keys
    root: Root
    trusted: tuple[Certificate, ...]
    manifest: Manifest
    manifest_file: Path

    def partition(self, label: str) -> Partition:
        return find_partition(self.disk, label)

    def verify(self, *, manifest: bool = True, ran: bool = False) -> Verdict:
        wanted = Wanted(self.trusted, self.manifest if manifest else None, ran)
        with open_device_to_read(self.disk) as opened:
            return verify_image(opened, wanted, quiet)

    def find_bad(self, **how: bool) -> list[tuple[str, str, str]]:
        return [
            (one.place, str(one.status), one.detail)
            for one in self.verify(**how).findings
            if not one.good
        ]


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Image:
    directory = tmp_path_factory.mktemp("image")
    root = make_root(directory, keys, "0.1.0")
    disk = make_image(directory, keys, root)
    key, certificate = read_pair(keys.key, keys.certificate)
    with open_device_to_read(disk) as opened:
        sealed, manifest = build_from(opened, key, certificate, time.time(), quiet)
    manifest_file = directory / "disk.raw.manifest"
    manifest_file.write_bytes(sealed)
    return Image(disk, keys, root, read_certificates(keys.certificate), manifest, manifest_file)
