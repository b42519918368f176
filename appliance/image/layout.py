"""What stands where on Hairpin's disk (image-build/mkosi.repart; Discoverable Partitions Specification). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from appliance.image.gpt import Partition, Table
from appliance.image.model import Damaged

ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
ROOT = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
VERITY = "2c7357ed-ebd2-46d9-aec1-23d437ec2bf5"
SIGNATURE = "41092b05-9fc8-4523-994f-2def0408b176"
VAR = "4d21b016-b534-45c2-a9fb-5c16e091fd2d"
RULES = "7b1f3a52-5d0c-4a0f-9f0a-6d1c2e8b4f90"
EMPTY = "_empty"
RULES_LABEL = "hairpin-rules"
VAR_LABEL = "hairpin-var"
_ROOTS = (ROOT, VERITY, SIGNATURE)


@dataclass(frozen=True, slots=True)
class RootSet:
    """One of the two places of a version: its data, their tree of hashes, the signature of its root."""

    name: str
    root: Partition
    tree: Partition
    signature: Partition

    @property
    def empty(self) -> bool:
        return all(one.name == EMPTY for one in (self.root, self.tree, self.signature))


@dataclass(frozen=True, slots=True)
class Layout:
    """``others`` are partitions that are none of Hairpin's."""

    esp: Partition
    roots: tuple[RootSet, ...]
    rules: Partition | None
    var: Partition | None
    others: tuple[Partition, ...]


def find_layout(table: Table) -> Layout:
    """Raises Damaged where the disk is none of Hairpin's, or a partition stands there twice."""
    kinds: dict[str, list[Partition]] = {}
    for one in sorted(table.partitions, key=lambda one: one.number):
        kinds.setdefault(one.type, []).append(one)
    roots, trees, signatures = (kinds.get(kind, []) for kind in _ROOTS)
    if not roots or len(roots) > 2 or not len(roots) == len(trees) == len(signatures):
        raise Damaged(
            f"{len(roots)} root partitions, {len(trees)} trees of hashes, {len(signatures)} signatures",
            "is it an image of Hairpin?",
        )
    single = {kind: _find_one(kinds, kind) for kind in (ESP, RULES, VAR)}
    esp = single[ESP]
    if esp is None:
        raise Damaged("there is no EFI system partition", "is it an image of Hairpin?")
    known = {*_ROOTS, ESP, RULES, VAR}
    return Layout(
        esp=esp,
        roots=tuple(
            RootSet(name, *three)
            for name, three in zip("AB", zip(roots, trees, signatures, strict=True), strict=False)
        ),
        rules=single[RULES],
        var=single[VAR],
        others=tuple(one for one in table.partitions if one.type not in known),
    )


def _find_one(kinds: dict[str, list[Partition]], kind: str) -> Partition | None:
    found: Sequence[Partition] = kinds.get(kind, [])
    if len(found) > 1:
        raise Damaged(f"partitions {found[0].number} and {found[1].number} are of the same kind")
    return found[0] if found else None
