"""The manifest of an image as it was built: made only of one in which all else is signed already."""

from __future__ import annotations

from cryptography.x509 import Certificate

from appliance.image.fat import read_tree
from appliance.image.gpt import read_table
from appliance.image.layout import find_layout
from appliance.image.manifest import Manifest, build_manifest, seal_manifest
from appliance.image.model import ImageError, Progress, Source, Status
from appliance.image.signing import PrivateKey
from appliance.image.verify import (
    Wanted,
    compute_root,
    compute_table,
    hash_source,
    strip_tries,
    verify_image,
)


def build_from(
    disk: Source, key: PrivateKey, certificate: Certificate, now: float, progress: Progress
) -> tuple[bytes, Manifest]:
    """The manifest's file, and what is in it. Raises ImageError where the image is not whole."""
    verdict = verify_image(disk, Wanted((certificate,)), progress)
    # What nobody signed is what the manifest is for, but for programs: they must be signed by the firmware's key.
    wrong = [
        one
        for one in verdict.findings
        if not one.good and not (one.status is Status.UNSIGNED and _is_for_manifest(one.place))
    ]
    if wrong:
        first = wrong[0]
        raise ImageError(
            f"{first.place} is {first.status}: {first.detail}"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            "a manifest is made of an image as it was built; see `hairpin image verify`",
        )
    table = read_table(disk)
    layout = find_layout(table)
    progress("signing the boot partition and /var")
    esp = layout.esp.of(disk)
    manifest = build_manifest(
        version=verdict.versions[0] if verdict.versions else "",
        created=now,
        size=disk.size,
        table=compute_table(table, disk.size),
        esp=hash_source(esp),
        var=hash_source(layout.var.of(disk)) if layout.var else None,
        files={strip_tries(one.path): hash_source(one) for one in read_tree(esp).files},
        roots=dict(compute_root(disk, one) for one in layout.roots if not one.empty),
    )
    return seal_manifest(manifest, key, certificate), manifest


def _is_for_manifest(place: str) -> bool:
    return place == "var" or (place.startswith("esp /") and not place.upper().endswith(".EFI"))
