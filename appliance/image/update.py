"""A new version beside the one that runs: checked, staged, and written by systemd-sysupdate into the empty root.

A release is a signed image, or a directory with its four parts as mkosi and `hairpin image extract` name them. The
parts need no signature of their own: the kernel is signed and names its root, the root hash is signed, and the tree
leads from it to each block. They are copied first and checked then, so that what was checked is what is written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from cryptography.x509 import Certificate

from appliance.image.boots import KERNEL_DIRECTORIES
from appliance.image.disk import open_part_to_read, open_to_read
from appliance.image.fat import read_tree
from appliance.image.gpt import read_table
from appliance.image.layout import RootSet, find_layout
from appliance.image.model import VERSION, Damaged, ImageError, Progress, Source
from appliance.image.signing import check_detached, render_name
from appliance.image.verify import KERNELS, check_kernel, hash_source, strip_tries
from appliance.image.verity import check_tree, parse_signature, parse_superblock
from steering.errors import CommandFailed, FieldError, WrongInput
from steering.run import run

log = structlog.get_logger("image")

SYSUPDATE = Path("/usr/lib/systemd/systemd-sysupdate")
DEFINITIONS = Path("/usr/lib/hairpin/sysupdate.d")
STAGING = Path("/var/lib/hairpin-update")
WRITE_SECONDS = 1800.0
ARCHITECTURE = "x86-64"
PARTS = {
    "root": f"root-{ARCHITECTURE}.raw",
    "tree": f"root-{ARCHITECTURE}-verity.raw",
    "signature": f"root-{ARCHITECTURE}-verity-sig.raw",
    "kernel": "efi",
}
PART_LIMITS = {"root": 2**31, "tree": 2**28, "signature": 2**20, "kernel": 2**29}
"""Bytes: well over what an image has room for. A release comes from outside, and is staged where alerts are kept."""
FREE_SHARE = 20
"""One in so many bytes of that disk stays free, as for health (appliance/assurance/disk.py)."""
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Release:
    """A release that was checked. ``files`` by the names of PARTS; ``kernel_sha256`` of the whole file."""

    version: str
    root_hash: str
    signer: str
    files: dict[str, Path]
    kernel_sha256: str

    @property
    def numbers(self) -> dict[str, str]:
        """The partitions' numbers: root and tree are found by the halves of the root hash."""
        halves = {"root": self.root_hash[:32], "tree": self.root_hash[-32:]}
        numbers = {name: str(uuid.UUID(half)) for name, half in halves.items()}
        return {**numbers, "signature": str(uuid.uuid5(uuid.NAMESPACE_OID, self.root_hash))}


def find_parts(directory: Path) -> dict[str, Path]:
    """The four parts of the one release in a directory. Raises WrongInput."""
    found: dict[str, list[Path]] = {name: [] for name in PARTS}
    try:
        paths = sorted(directory.iterdir())
    except OSError as fault:
        raise WrongInput([FieldError(str(directory), fault.strerror or str(fault))]) from fault
    for path in paths:
        for name, ending in PARTS.items():
            if path.name.startswith("hairpin_") and path.name.endswith(f".{ending}"):
                found[name].append(path)
    faults = [
        FieldError(
            str(directory), f"{len(paths)} files hairpin_VERSION.{PARTS[name]}; one is wanted"
        )
        for name, paths in found.items()
        if len(paths) != 1
    ]
    if faults:
        raise WrongInput(faults, "make it with `hairpin image extract`")
    return {name: paths[0] for name, paths in found.items()}


def find_named_version(source: Path) -> str | None:
    """What a directory's files say that it is; None for an image. Signatures are looked at by `check_release`."""
    if not source.is_dir():
        return None
    return find_parts(source)["kernel"].name.removeprefix("hairpin_").removesuffix(".efi")


def check_release(
    files: dict[str, Path], trusted: Sequence[Certificate], progress: Progress
) -> Release:
    """Raises NotTrusted, Damaged, ImageError: then nothing of it is to be used."""
    with contextlib.ExitStack() as opened:
        part = {name: opened.enter_context(open_part_to_read(path)) for name, path in files.items()}
        kernel, signer = check_kernel(part["kernel"], files["kernel"].name, trusted)
        kernel_sha256 = hash_source(part["kernel"])
        told = parse_signature(part["signature"].read(0, min(part["signature"].size, _CHUNK)))
        certificate = check_detached(told.signature, told.root_hash.encode(), trusted)
        if kernel.root_hash != told.root_hash:
            raise Damaged("the kernel was signed for another root")
        if not VERSION.fullmatch(kernel.version):
            raise Damaged(f"the kernel names its version {kernel.version!r}")
        block = parse_superblock(part["tree"].read(0, 512), part["root"].size, part["tree"].size)
        for damage in check_tree(part["root"], part["tree"], block, told.root_hash, progress):
            raise Damaged(f"the root's {damage.what} is not what was signed: {damage}")
    log.info("release checked", version=kernel.version, signer=render_name(certificate))
    return Release(kernel.version, told.root_hash, signer, dict(files), kernel_sha256)


def extract(disk: Source, target: Path, progress: Progress) -> dict[str, Path]:
    """The parts of an image's newest release, as files. They are not checked yet. Raises ImageError, OSError."""
    layout = find_layout(read_table(disk))
    full = [root for root in layout.roots if not root.empty]
    if len(full) != 1:
        raise ImageError(f"the image has {len(full)} versions", "take an image as it was built")
    kernels = [
        file
        for file in read_tree(layout.esp.of(disk)).files
        if file.path.upper().startswith(KERNELS) and file.path.upper().endswith(".EFI")
    ]
    if len(kernels) != 1:
        raise ImageError(f"the image has {len(kernels)} kernels", "take an image as it was built")
    version = full[0].root.name.rpartition("_")[2]
    if not VERSION.fullmatch(version):
        raise ImageError(f"the root's label {full[0].root.name!r} has no version")
    files = {name: target / f"hairpin_{version}.{ending}" for name, ending in PARTS.items()}
    sources: dict[str, Source] = {**_find_sources(disk, full[0]), "kernel": kernels[0]}
    with contextlib.ExitStack() as undone:
        for name, path in files.items():
            progress(f"writing {path.name}")
            _write_sparse(sources[name], path, PART_LIMITS[name])
            undone.callback(path.unlink, missing_ok=True)
        undone.pop_all()
    return files


def extract_checked(
    disk: Source, target: Path, trusted: Sequence[Certificate], progress: Progress
) -> Release:
    """`extract`, then `check_release`; nothing stays in ``target`` where either fails. Raises as they do."""
    files = extract(disk, target, progress)
    with contextlib.ExitStack() as undone:
        for path in files.values():
            undone.callback(path.unlink, missing_ok=True)
        release = check_release(files, trusted, progress)
        undone.pop_all()
    return release


def _find_sources(disk: Source, root: RootSet) -> dict[str, Source]:
    return {
        "root": root.root.of(disk),
        "tree": root.tree.of(disk),
        "signature": root.signature.of(disk),
    }


def _write_sparse(source: Source, path: Path, limit: int) -> None:
    if source.size > limit:
        raise ImageError(f"{path.name} has {source.size} bytes, more than {limit}")
    with open(path, "xb") as opened, contextlib.ExitStack() as undone:
        undone.callback(path.unlink)
        for at in range(0, source.size, _CHUNK):
            piece = source.read(at, min(_CHUNK, source.size - at))
            if piece.count(0) == len(piece):
                opened.seek(len(piece), 1)
            else:
                _require_space(opened.fileno(), path)
                opened.write(piece)
        opened.truncate(source.size)
        undone.pop_all()


def _require_space(handle: int, path: Path) -> None:
    space = os.fstatvfs(handle)
    if space.f_bavail < space.f_blocks // FREE_SHARE + _CHUNK // space.f_frsize:
        reason = f"{path.parent} would be nearly full: {space.f_bavail * space.f_frsize} bytes left"
        raise ImageError(reason, f"free space there: a {FREE_SHARE}th of it stays free")


@contextlib.contextmanager
def stage(source: Path, staging: Path, progress: Progress) -> Iterator[dict[str, Path]]:
    """The parts of a release, copied where only root can write. Raises WrongInput, ImageError."""
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o700, parents=True)
        if source.is_dir():
            copied = {}
            for name, path in find_parts(source).items():
                with open_part_to_read(path) as part:
                    copied[name] = staging / path.name
                    _write_sparse(part, copied[name], PART_LIMITS[name])
            yield copied
        else:
            with open_to_read(source, progress) as disk:
                files = extract(disk, staging, progress)
            yield files
    except OSError as fault:
        reason = f"the release can't be staged: {fault.strerror or fault}"
        raise ImageError(reason, f"free space under {staging.parent}") from fault
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def name_for_sysupdate(release: Release) -> dict[str, Path]:
    """Rename the staged parts as the transfer files look for them: with version and number."""
    named = {}
    for name, path in release.files.items():
        number = release.numbers.get(name)
        middle = f"{release.version}_{number}" if number else release.version
        named[name] = path.rename(path.with_name(f"hairpin_{middle}.{name}"))
    return named


def compare_versions(one: str, other: str) -> int:
    """-1, 0 or 1, as systemd and Debian order versions (`systemd-analyze compare-versions`). Raises CommandFailed."""
    ended = run(["systemd-analyze", "compare-versions", one, other], check=False)
    verdict = {0: 0, 11: 1, 12: -1}.get(ended.status)
    if verdict is None:
        raise CommandFailed("systemd-analyze compare-versions", ended.status, ended.stderr)
    return verdict


def check_newer(release: Release, running: str) -> None:
    """Raises ImageError for a version that is not newer than the running one: old faults are not to come back."""
    if compare_versions(release.version, running) <= 0:
        raise ImageError(
            f"version {release.version} is not newer than {running}, which runs",
            "to go back to the version before, choose it in the boot menu",
        )


def run_sysupdate(
    version: str, sysupdate: Path = SYSUPDATE, definitions: Path = DEFINITIONS
) -> str:
    """Write it. systemd-sysupdate takes the root that does not run, and marks it as whole last. Raises ImageError."""
    if not sysupdate.exists():
        raise ImageError(f"there is no {sysupdate}", "this is done on the appliance itself")
    argv = [
        str(sysupdate),
        f"--definitions={definitions}",
        "--verify=no",
        "--no-pager",
        "update",
        version,
    ]
    return run(argv, timeout=WRITE_SECONDS).stdout


def find_disk(label: Path = Path("/dev/disk/by-partlabel/hairpin-rules")) -> Path:
    """The disk that the appliance runs on, by a partition of its. Raises ImageError."""
    try:
        partition = label.resolve(strict=True)
        parent = Path("/sys/class/block", partition.name).resolve(strict=True).parent
    except OSError as fault:
        raise ImageError(f"{label}: {fault.strerror}", "name the disk with --disk") from fault
    return Path("/dev", parent.name)


def check_written(
    disk: Source, release: Release, trusted: Sequence[Certificate], progress: Progress
) -> None:
    """Read back what was written, all of it: each block of the root, and the kernel. Raises ImageError."""
    layout = find_layout(read_table(disk))
    numbers = release.numbers
    found = next((one for one in layout.roots if one.root.guid == numbers["root"]), None)
    if found is None or found.tree.guid != numbers["tree"]:
        raise ImageError(
            "the new root is not there", "see `journalctl`; the running version goes on"
        )
    parts = _find_sources(disk, found)
    told = parse_signature(parts["signature"].read(0, min(parts["signature"].size, _CHUNK)))
    check_detached(told.signature, release.root_hash.encode(), trusted)
    block = parse_superblock(parts["tree"].read(0, 512), parts["root"].size, parts["tree"].size)
    for damage in check_tree(parts["root"], parts["tree"], block, release.root_hash, progress):
        raise ImageError(
            f"the new root's {damage.what} was not written well: {damage}", "update again"
        )
    _check_kernel_written(layout.esp.of(disk), release)


def _check_kernel_written(esp: Source, release: Release) -> None:
    name = f"{KERNELS}hairpin_{release.version}.efi".upper()
    found = [one for one in read_tree(esp).files if strip_tries(one.path).upper() == name]
    if len(found) != 1:
        reason = f"the new kernel is {len(found)} times in the boot partition"
        raise ImageError(reason, "update again; the running version goes on")
    if hash_source(found[0]) != release.kernel_sha256:
        reason = f"the new kernel was not written well: {found[0].path} is not what was signed"
        raise ImageError(reason, "update again; the running version goes on")


def forget_cached(device: Path) -> None:
    """What is read from the disk next comes from the disk: what is still in memory is written, then dropped.

    Raises ImageError.
    """
    os.sync()
    try:
        handle = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    except OSError as fault:
        raise ImageError(f"{device}: {fault.strerror}", "check the disk") from fault


def withdraw(version: str, directories: Sequence[Path] = KERNEL_DIRECTORIES) -> None:
    """Take its kernel away: it is not tried, and may be written again. Raises ImageError."""
    for directory in directories:
        for path in (
            directory / f"hairpin_{version}.efi",
            *directory.glob(f"hairpin_{version}+*.efi"),
        ):
            try:
                path.unlink(missing_ok=True)
            except OSError as fault:
                raise ImageError(f"{path} can't be removed: {fault.strerror}") from fault
            log.warning("kernel withdrawn", path=str(path))
