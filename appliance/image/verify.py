"""Every difference between an image and what was signed. Pure: reads the disk by its door alone.

A part is `ok` when a signature covers each of its bytes. What nobody signs is told as such, and never passed over.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import Certificate

from appliance.image import bundle as bundles
from appliance.image.fat import File, Tree, read_tree
from appliance.image.gpt import Table, find_gaps, read_table
from appliance.image.layout import Layout, RootSet, find_layout
from appliance.image.manifest import Manifest
from appliance.image.model import (
    Damaged,
    Finding,
    ImageError,
    Kernel,
    Part,
    Progress,
    Source,
    Status,
    Verdict,
    find_nonzero,
)
from appliance.image.pe import compute_checksum, compute_digest, parse_program, read_section
from appliance.image.signing import NotTrusted, check_detached, check_program, render_name
from appliance.image.verity import (
    DAMAGE_LIMIT,
    RootSignature,
    Superblock,
    check_tree,
    parse_signature,
    parse_superblock,
)

BOOT_LOADER = "/EFI/BOOT/BOOTX64.EFI"
BOOT_LOADERS = (BOOT_LOADER, "/EFI/SYSTEMD/SYSTEMD-BOOTX64.EFI")
KERNELS = "/EFI/LINUX/"
UNUSED_LIMIT = 5
_SIGNATURE_ROOM = 2**20
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an image is measured by. ``ran``: an appliance has run on it, and wrote what it writes."""

    trusted: tuple[Certificate, ...]
    manifest: Manifest | None = None
    ran: bool = False


def verify_image(disk: Source, wanted: Wanted, progress: Progress) -> Verdict:
    """Raises ImageError where the disk can't be read at all; all else is a finding."""
    findings: list[Finding] = []
    try:
        table = read_table(disk)
        layout = find_layout(table)
    except Damaged as fault:
        return Verdict((Finding("partition table", Status.CHANGED, fault.reason),))
    findings += _check_table(disk, table, wanted)
    progress("checking the boot partition")
    kernels: list[Kernel] = []
    findings += _check_esp(layout.esp.of(disk), wanted, kernels)
    roots: set[str] = set()
    for root in layout.roots:
        progress(f"checking root {root.name}")
        findings += _check_root(disk, root, kernels, roots, wanted, progress)
    for kernel in kernels:
        if kernel.root_hash not in roots:
            detail = "the root that it starts is not there, or nobody signed it"
            findings.append(Finding(f"esp {kernel.path}", Status.CHANGED, detail))
    serials: list[int] = []
    findings += _check_rules(disk, layout, wanted, serials)
    findings += _check_var(disk, layout, wanted, progress)
    for other in layout.others:
        place = f"partition {other.number}"
        findings.append(Finding(place, Status.UNEXPECTED, f"{other.name!r} of type {other.type}"))
    return Verdict(tuple(findings), tuple(kernels), tuple(serials))


# The table, and all that lies in no partition


def compute_table(table: Table, size: int) -> str:
    """A digest of all bytes of the partition table, also those that no checksum covers, and of the disk's size."""
    return hashlib.sha256(f"{size}\n".encode() + table.raw).hexdigest()


def _check_table(disk: Source, table: Table, wanted: Wanted) -> Iterator[Finding]:
    place = "partition table"
    good = True
    for fault in table.faults:
        good = False
        yield Finding(place, Status.CHANGED, fault)
    manifest = None if wanted.ran else wanted.manifest
    if table.enlarged and not wanted.ran:
        good = False
        yield Finding(place, Status.CHANGED, "the disk is larger than the table says")
    if manifest and compute_table(table, disk.size) != manifest.table_sha256:
        good = False
        yield Finding(place, Status.CHANGED, "not the one of the manifest")
    if good:
        covered = "as the manifest says" if manifest else "whole"
        yield Finding(place, Status.OK, f"{len(table.partitions)} partitions, {covered}")
    for start, size in find_gaps(table, disk.size):
        at = find_nonzero(disk, start, size)
        if at is not None:
            detail = f"at {at}, in {size} bytes that belong to no partition"
            yield Finding("between partitions", Status.UNEXPECTED, detail)


# The EFI system partition


def hash_source(source: Source) -> str:
    digest = hashlib.sha256()
    for at in range(0, source.size, _CHUNK):
        digest.update(source.read(at, min(_CHUNK, source.size - at)))
    return digest.hexdigest()


def _check_esp(esp: Part, wanted: Wanted, kernels: list[Kernel]) -> Iterator[Finding]:
    try:
        tree = read_tree(esp)
    except Damaged as fault:
        yield Finding("esp", Status.CHANGED, fault.reason)
        return
    for fault_text in tree.faults:
        yield Finding("esp", Status.CHANGED, fault_text)
    manifest = wanted.manifest
    listed = (
        {strip_tries(path): digest for path, digest in manifest.files.items()} if manifest else {}
    )
    good = not tree.faults
    for file in tree.files:
        name = strip_tries(file.path)
        finding = _check_file(file, listed.get(name), wanted, kernels)
        good = good and finding.good
        yield finding
    present = {strip_tries(file.path).upper() for file in tree.files}
    missing = [path for path in sorted(listed) if path.upper() not in present]
    if BOOT_LOADER not in present:
        missing.append(BOOT_LOADER)
    for path in dict.fromkeys(missing):
        good = False
        yield Finding(f"esp {path}", Status.MISSING, "it was there when the image was signed")
    if not kernels:
        good = False
        yield Finding(f"esp {KERNELS}", Status.MISSING, "there is no signed kernel to boot")
    yield from _check_esp_rest(esp, tree, wanted, good)


def _check_esp_rest(esp: Part, tree: Tree, wanted: Wanted, good: bool) -> Iterator[Finding]:
    """Bytes of the file system that are in no file."""
    if wanted.ran:
        return
    for at in tree.unused[:UNUSED_LIMIT]:
        yield Finding("esp", Status.UNEXPECTED, f"bytes at {at} that belong to no file")
    manifest = wanted.manifest
    if manifest and good and not tree.unused and hash_source(esp) != manifest.esp_sha256:
        reason = "all files are as signed, but not what the file system says of them"
        yield Finding("esp", Status.CHANGED, reason)


def strip_tries(path: str) -> str:
    """A kernel's path without the boot loader's count of tries: `hairpin_0.1.0+3-0.efi` is hairpin_0.1.0.efi."""
    folder, _, name = path.rpartition("/")
    if f"{folder}/".upper() != KERNELS:
        return path
    stem, dot, ending = name.rpartition(".")
    base, plus, tries = stem.rpartition("+")
    if plus and dot and tries and all(part.isdecimal() for part in tries.split("-", 1)):
        return f"{folder}/{base}.{ending}"
    return path


def _check_file(file: File, digest: str | None, wanted: Wanted, kernels: list[Kernel]) -> Finding:
    place = f"esp {file.path}"
    if file.path.upper().endswith(".EFI"):
        return _check_program(place, file, digest, wanted, kernels)
    if digest is not None:
        if hash_source(file) == digest:
            return Finding(place, Status.OK, "as the manifest says")
        return Finding(place, Status.CHANGED, "not as the manifest says")
    if wanted.manifest is None:
        return Finding(place, Status.UNSIGNED, f"{file.size} bytes, and there is no manifest")
    if wanted.ran and file.path.lower() == "/loader/random-seed":
        return Finding(place, Status.STATE, "written at each boot")
    return Finding(place, Status.UNEXPECTED, f"{file.size} bytes that nobody signed")


def _check_program(
    place: str, file: File, digest: str | None, wanted: Wanted, kernels: list[Kernel]
) -> Finding:
    try:
        signer = check_signature(file, wanted.trusted)
        kernel = read_kernel(file, file.path)
    except NotTrusted as fault:
        return Finding(place, Status.UNSIGNED, fault.reason)
    except Damaged as fault:
        return Finding(place, Status.CHANGED, fault.reason)
    # Signed is not enough: by the same key there are older programs, and addons to a kernel's command line.
    if digest is not None and hash_source(file) != digest:
        return Finding(place, Status.CHANGED, "signed, but not what the manifest says", signer)
    if not _has_place(file.path, kernel):
        return Finding(place, Status.UNEXPECTED, "signed, but it does not belong there", signer)
    if kernel is not None:
        kernels.append(kernel)
    later = kernel is not None and wanted.ran  # an update brings a kernel
    if wanted.manifest is not None and digest is None and not later:
        return Finding(place, Status.UNEXPECTED, "signed, but not in the manifest", signer)
    if kernel is None:
        return Finding(place, Status.OK, "boot loader", signer)
    return Finding(place, Status.OK, f"kernel of version {kernel.version or 'unknown'}", signer)


def _has_place(path: str, kernel: Kernel | None) -> bool:
    """Whether the boot loader, or the firmware, looks for such a program there."""
    if kernel is None:
        return path.upper() in BOOT_LOADERS
    return f"{path.rpartition('/')[0]}/".upper() == KERNELS


def check_signature(file: Source, trusted: Sequence[Certificate]) -> str:
    """Who signed an EFI program. Raises NotTrusted (also where nobody did), Damaged."""
    program = parse_program(file)
    if not program.signatures:
        raise NotTrusted("a program that nobody signed")
    signers = []
    for signature in program.signatures:
        told = check_program(signature, trusted)
        if compute_digest(file, program, told.algorithm) != told.digest:
            raise Damaged("it is not the program that was signed")
        signers.append(told.signer)
    if program.checksum not in (0, compute_checksum(file)):
        raise Damaged("its checksum is wrong")
    return signers[0]


def read_kernel(file: Source, path: str) -> Kernel | None:
    """What a kernel image says of itself; None where it is another program. Raises Damaged."""
    program = parse_program(file)
    if program.find(".linux") is None:
        return None
    release, line = (read_section(file, program, name) for name in (".osrel", ".cmdline"))
    return Kernel(path, _find_value(release, "IMAGE_VERSION"), _find_root_hash(line))


def check_kernel(file: Source, path: str, trusted: Sequence[Certificate]) -> tuple[Kernel, str]:
    """A signed kernel image, and who signed it. Raises NotTrusted, Damaged."""
    signer = check_signature(file, trusted)
    kernel = read_kernel(file, path)
    if kernel is None:
        raise Damaged(f"{path} is no kernel image")
    return kernel, signer


def _find_value(release: bytes, name: str) -> str:
    """Of an os-release file."""
    for line in release.decode(errors="replace").splitlines():
        key, _, value = line.partition("=")
        if key == name:
            return "".join(letter for letter in value.strip("\"'") if letter.isprintable())[:100]
    return ""


def _find_root_hash(line: bytes) -> str:
    words = line.decode(errors="replace").strip("\0\n ").split()
    found = [word.partition("=")[2] for word in words if word.startswith("roothash=")]
    return found[-1].lower() if found else ""


# Root partitions


def _check_root(
    disk: Source,
    root: RootSet,
    kernels: Sequence[Kernel],
    found: set[str],
    wanted: Wanted,
    progress: Progress,
) -> Iterator[Finding]:
    place = f"root {root.name}"
    if root.empty:
        if not wanted.ran:
            for one in (root.root, root.tree, root.signature):
                if (at := find_nonzero(one.of(disk), 0, one.size)) is not None:
                    yield Finding(
                        place, Status.UNEXPECTED, f"empty by its label, but bytes at {at}"
                    )
                    return
        yield Finding(place, Status.OK, "empty: the next version's place")
        return
    data, tree = root.root.of(disk), root.tree.of(disk)
    try:
        told = parse_signature(_read_signature(root.signature.of(disk)))
        certificate = check_detached(told.signature, told.root_hash.encode(), wanted.trusted)
    except NotTrusted as fault:
        yield Finding(f"{place} signature", Status.UNSIGNED, fault.reason)
        return
    except Damaged as fault:
        yield Finding(f"{place} signature", Status.CHANGED, fault.reason)
        return
    signer = render_name(certificate)
    faults = [
        *_check_names(root, told, certificate, kernels),
        *_check_bytes(disk, root, told, wanted),
    ]
    yield from faults
    found.add(told.root_hash)
    if not faults:
        version = next(one.version for one in kernels if one.root_hash == told.root_hash)
        detail = f"version {version or 'unknown'}, root hash {told.root_hash[:16]}"
        yield Finding(f"{place} signature", Status.OK, detail, signer)
    try:
        block = parse_superblock(tree.read(0, 512), data.size, tree.size)
    except Damaged as fault:
        yield Finding(f"{place} tree", Status.CHANGED, fault.reason)
        return
    yield from _check_blocks(place, data, tree, block, told.root_hash, signer, progress)


def _check_blocks(
    place: str,
    data: Source,
    tree: Source,
    block: Superblock,
    root_hash: str,
    signer: str,
    progress: Progress,
) -> Iterator[Finding]:
    found = iter(check_tree(data, tree, block, root_hash, progress))
    bad = set()
    for damage in itertools.islice(found, DAMAGE_LIMIT):
        bad.add(damage.what)
        yield Finding(f"{place} {damage.what}", Status.CHANGED, str(damage))
    if more := sum(1 for _ in found):
        yield Finding(place, Status.CHANGED, f"{more} further stretches of blocks")
    for what in ("data", "tree"):
        if what not in bad:
            count = block.data_blocks if what == "data" else sum(n for _, n in block.levels)
            yield Finding(f"{place} {what}", Status.OK, f"{count} blocks", signer)


def _check_names(
    root: RootSet, told: RootSignature, certificate: Certificate, kernels: Sequence[Kernel]
) -> Iterator[Finding]:
    """What finds a root: its numbers are made of the root hash, and a signed kernel names it."""
    place = f"root {root.name} signature"
    halves = told.root_hash[:32], told.root_hash[-32:]
    if (root.root.guid.replace("-", ""), root.tree.guid.replace("-", "")) != halves:
        yield Finding(
            place, Status.CHANGED, "the partitions' numbers are not those of the root hash"
        )
    if told.fingerprint.lower() != certificate.fingerprint(SHA256()).hex():
        yield Finding(place, Status.CHANGED, "it names another certificate than its signer's")
    if not any(one.root_hash == told.root_hash for one in kernels):
        yield Finding(place, Status.CHANGED, "no signed kernel is for this root")


def compute_root(disk: Source, root: RootSet) -> tuple[str, str]:
    """The root hash that is signed, and a digest of all bytes that tell of it. Raises Damaged."""
    text = _read_signature(root.signature.of(disk))
    block = root.tree.of(disk).read(0, 512)
    return parse_signature(text).root_hash, hashlib.sha256(text.rstrip(b"\0") + block).hexdigest()


def _check_bytes(
    disk: Source, root: RootSet, told: RootSignature, wanted: Wanted
) -> Iterator[Finding]:
    place = f"root {root.name} signature"
    manifest = wanted.manifest
    if manifest is None or (wanted.ran and told.root_hash not in manifest.roots):
        return  # a version that came later
    if manifest.roots.get(told.root_hash) != compute_root(disk, root)[1]:
        detail = "signed, but it or the superblock is not byte for byte what the manifest says"
        yield Finding(place, Status.CHANGED, detail)


def _read_signature(part: Source) -> bytes:
    if find_nonzero(part, _SIGNATURE_ROOM, part.size - _SIGNATURE_ROOM) is not None:
        raise Damaged(f"bytes after the first {_SIGNATURE_ROOM}")
    return part.read(0, min(part.size, _SIGNATURE_ROOM))


# Rules and state


def _check_rules(
    disk: Source, layout: Layout, wanted: Wanted, serials: list[int]
) -> Iterator[Finding]:
    if layout.rules is None:
        yield Finding("rules", Status.MISSING, "there is no partition for them")
        return
    partition = layout.rules.of(disk)
    number = 0
    empty = 0
    headers = []
    for number in range(bundles.SLOTS):
        place = f"rules copy {number + 1}"
        slot = bundles.find_slot(partition, number)
        try:
            found = bundles.parse_slot(slot, wanted.trusted)
            leftover = bundles.find_leftover(found, slot)
        except bundles.NoBundle:
            empty += 1
            at = find_nonzero(slot, 0, slot.size)
            if at is not None:
                yield Finding(place, Status.UNEXPECTED, f"bytes at {at}, and no bundle")
            continue
        except NotTrusted as fault:
            yield Finding(place, Status.UNSIGNED, fault.reason)
            continue
        except ImageError as fault:
            yield Finding(place, Status.CHANGED, fault.reason)
            continue
        headers.append(found.header)
        serials.append(found.header.serial)
        if leftover is not None:
            yield Finding(place, Status.UNEXPECTED, f"bytes at {leftover}, after the bundle")
        detail = f"serial {found.header.serial}, {found.header.rules} rules"
        yield Finding(place, Status.OK, detail, found.signer)
    if empty == bundles.SLOTS:
        yield Finding("rules", Status.OK, "empty: the starter rules of the root are used")
    elif empty or (len(headers) > 1 and headers[0] != headers[1]):
        yield Finding("rules", Status.CHANGED, "the two copies differ: a refresh was cut off")
    end = bundles.SLOTS * bundles.slot_size(partition.size)
    if (at := find_nonzero(partition, end, partition.size - end)) is not None:
        yield Finding("rules", Status.UNEXPECTED, f"bytes at {at}")


def _check_var(
    disk: Source, layout: Layout, wanted: Wanted, progress: Progress
) -> Iterator[Finding]:
    if layout.var is None:
        yield Finding("var", Status.MISSING, "there is no partition for it")
    elif wanted.ran:
        yield Finding("var", Status.STATE, "what the appliance wrote; nobody signs it")
    elif wanted.manifest is None or wanted.manifest.var_sha256 is None:
        yield Finding("var", Status.UNSIGNED, "there is no manifest that tells of it")
    else:
        progress("checking /var")
        same = hash_source(layout.var.of(disk)) == wanted.manifest.var_sha256
        detail = (
            "as the manifest says" if same else "not as the manifest says, or the appliance has run"
        )
        yield Finding("var", Status.OK if same else Status.CHANGED, detail)
