"""What of an image has no signature of its own, signed: table, files of the boot partition, the first /var. Pure.

Programs, roots and rules are signed where they stand. The manifest stands beside the image; with it nothing is left
that could change unseen before an appliance has run.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from cryptography.x509 import Certificate
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.image.model import Damaged
from appliance.image.signing import PrivateKey, build_key_id, check_plain, sign

MANIFEST_LIMIT = 4 * 2**20
_MEND = "name what `hairpin image sign` made"
_Digest = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """``files`` are path -> SHA-256 of what stands in the EFI system partition. ``size`` is the disk's, in bytes.

    ``roots`` are root hash -> SHA-256 of what tells of a root, beside the hash itself: a superblock has a number, and
    a signature has ways to be written, that no signature covers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: str = Field(pattern=r"^hairpin-image/1$")
    version: str = Field(max_length=100)
    created: datetime
    size: int = Field(ge=0)
    table_sha256: str = _Digest
    esp_sha256: str = _Digest
    var_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    files: Mapping[str, str]
    roots: Mapping[str, str]


def build_manifest(
    *,
    version: str,
    created: float,
    size: int,
    table: str,
    esp: str,
    var: str | None,
    files: Mapping[str, str],
    roots: Mapping[str, str],
) -> Manifest:
    return Manifest(
        format="hairpin-image/1",
        version=version,
        created=datetime.fromtimestamp(int(created), UTC),
        size=size,
        table_sha256=table,
        esp_sha256=esp,
        var_sha256=var,
        files=dict(files),
        roots=dict(roots),
    )


def _encode(manifest: Manifest) -> bytes:
    return json.dumps(
        manifest.model_dump(mode="json"), sort_keys=True, separators=(",", ":")
    ).encode()


def seal_manifest(manifest: Manifest, key: PrivateKey, certificate: Certificate) -> bytes:
    """The manifest's file."""
    document = {
        "signed": json.loads(_encode(manifest)),
        "key": build_key_id(certificate),
        "signature": base64.b64encode(sign(key, _encode(manifest))).decode(),
    }
    return json.dumps(document, sort_keys=True, indent=1).encode() + b"\n"


def open_manifest(data: bytes, trusted: Sequence[Certificate]) -> tuple[Manifest, str]:
    """The manifest of a file, and who signed it. Raises Damaged, NotTrusted."""
    if len(data) > MANIFEST_LIMIT:
        raise Damaged(f"the manifest is longer than {MANIFEST_LIMIT} bytes", _MEND)
    try:
        document = json.loads(data)
        manifest = Manifest.model_validate_json(json.dumps(document["signed"]))
        signature = base64.b64decode(document["signature"], validate=True)
        key = str(document["key"])
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        ValidationError,
        binascii.Error,
    ) as fault:
        raise Damaged("the manifest can't be read", _MEND) from fault
    return manifest, check_plain(_encode(manifest), signature, key, trusted)
