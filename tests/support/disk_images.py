"""Small images of the real form, made by the real tools: erofs, veritysetup, sbsign, mtools, sgdisk, openssl."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from appliance.image.disk import open_device_to_read
from appliance.image.gpt import Partition, read_table
from appliance.image.layout import ESP, ROOT, RULES, SIGNATURE, VAR, VERITY

EFI = Path("/usr/lib/systemd/boot/efi")
MIB = 2**20
BLOCK = 4096
ROOT_SIZE, TREE_SIZE, ESP_SIZE, RULES_SIZE, VAR_SIZE = 4 * MIB, MIB, 36 * MIB, 2 * MIB, MIB


def run(*argv: object) -> str:
    done = subprocess.run(
        [str(one) for one in argv], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
    return done.stdout


@dataclass(frozen=True)
class Keys:
    key: Path
    certificate: Path


def make_keys(directory: Path, name: str = "image", kind: str = "rsa:2048") -> Keys:
    keys = Keys(directory / f"{name}.key", directory / f"{name}.crt")
    argv = ["openssl", "req", "-x509", "-newkey", *kind.split(), "-noenc", "-days", "3650"]
    if kind.startswith("rsa"):
        argv.append("-sha256")
    argv += ["-subj", f"/CN={name} of a test", "-keyout", keys.key, "-out", keys.certificate]
    run(*argv)
    return keys


@dataclass(frozen=True)
class Root:
    """A version's parts, each a file."""

    version: str
    root_hash: str
    data: Path
    tree: Path
    signature: Path
    kernel: Path


def make_root(directory: Path, keys: Keys, version: str) -> Root:
    """erofs, its tree, the signed root hash, and a signed kernel image that names it."""
    work = directory / f"root-{version}"
    content = work / "content"
    content.mkdir(parents=True)
    (content / "etc").mkdir()
    (content / "etc" / "os-release").write_text(f"ID=hairpin\nIMAGE_VERSION={version}\n")
    (content / "program").write_bytes(
        b"".join(hashlib.sha256(f"{version}{n}".encode()).digest() for n in range(30_000))
    )
    data, tree = work / "data", work / "tree"
    run("mkfs.erofs", "-U", "00000000-0000-0000-0000-000000000001", "-T0", data, content)
    with open(data, "r+b") as opened:
        opened.truncate(ROOT_SIZE)
    tree.touch()
    salt = hashlib.sha256(version.encode()).hexdigest()
    number = str(uuid.uuid5(uuid.NAMESPACE_OID, version))
    told = run("veritysetup", "format", data, tree, f"--salt={salt}", f"--uuid={number}")
    root_hash = next(line.split()[-1] for line in told.splitlines() if line.startswith("Root hash"))
    with open(tree, "r+b") as opened:
        opened.truncate(TREE_SIZE)
    return Root(
        version,
        root_hash,
        data,
        tree,
        sign_root(work, keys, root_hash),
        make_kernel(work, keys, version, root_hash),
    )


def sign_root(work: Path, keys: Keys, root_hash: str) -> Path:
    """As systemd-repart does it: PKCS #7 over the hash as text, without certificates and attributes."""
    text = work / "root-hash"
    text.write_text(root_hash)
    signed = work / "root-hash.p7s"
    run(
        "openssl", "smime", "-sign", "-binary", "-noattr", "-nocerts", "-in", text, "-outform", "DER",
        "-signer", keys.certificate, "-inkey", keys.key, "-out", signed,
    )  # fmt: skip
    der = subprocess.run(
        ["openssl", "x509", "-in", str(keys.certificate), "-outform", "DER"],
        capture_output=True,
        check=True,
    ).stdout
    target = work / "signature"
    document = {
        "rootHash": root_hash,
        "certificateFingerprint": hashlib.sha256(der).hexdigest(),
        "signature": base64.b64encode(signed.read_bytes()).decode(),
    }
    target.write_bytes(json.dumps(document).encode().ljust(16 * 1024, b"\0"))
    return target


def make_kernel(work: Path, keys: Keys, version: str, root_hash: str) -> Path:
    parts = {
        ".osrel": f'ID=hairpin\nIMAGE_ID=hairpin\nIMAGE_VERSION="{version}"\n'.encode(),
        ".cmdline": f"console=ttyS0 roothash={root_hash}\0".encode(),
        ".linux": b"no kernel " * 3000,
        ".initrd": b"no initrd " * 3000,
    }
    argv: list[object] = ["objcopy"]
    for number, (name, content) in enumerate(parts.items()):
        piece = work / name.strip(".")
        piece.write_bytes(content)
        argv += ["--add-section", f"{name}={piece}"]
        argv += ["--change-section-vma", f"{name}={0x1000000 * (number + 1):#x}"]
    bare, signed = work / "bare.efi", work / "kernel.efi"
    run(*argv, EFI / "linuxx64.efi.stub", bare)
    run("sbsign", "--key", keys.key, "--cert", keys.certificate, "--output", signed, bare)
    return signed


def make_esp(target: Path, keys: Keys, root: Root) -> None:
    with open(target, "wb") as opened:
        opened.truncate(ESP_SIZE)
    run("mkfs.vfat", "-F", "32", "-s", "1", "-i", "12345678", "-n", "ESP", target)
    loader = target.with_name("loader.efi")
    boot = EFI / "systemd-bootx64.efi"
    run("sbsign", "--key", keys.key, "--cert", keys.certificate, "--output", loader, boot)
    conf = target.with_name("loader.conf")
    conf.write_text("timeout 3\neditor no\n")
    for folder in ("EFI", "EFI/BOOT", "EFI/Linux", "loader"):
        run("mmd", "-i", target, f"::/{folder}")
    run("mcopy", "-i", target, loader, "::/EFI/BOOT/BOOTX64.EFI")
    run("mcopy", "-i", target, root.kernel, f"::/EFI/Linux/hairpin_{root.version}+3.efi")
    run("mcopy", "-i", target, conf, "::/loader/loader.conf")


def make_image(directory: Path, keys: Keys, root: Root) -> Path:
    """A disk with everything at its place: root A full, root B and rules empty."""
    esp, var = directory / "esp", directory / "var"
    make_esp(esp, keys, root)
    run("mkfs.ext4", "-q", "-F", var, f"{VAR_SIZE // 1024}k")
    halves = [str(uuid.UUID(half)) for half in (root.root_hash[:32], root.root_hash[-32:])]
    name = f"hairpin_{root.version}"
    table: list[tuple[int, str, str, str, Path | None]] = [
        (ESP_SIZE, ESP, "", "esp", esp),
        (ROOT_SIZE, ROOT, halves[0], name, root.data),
        (TREE_SIZE, VERITY, halves[1], f"{name}_verity", root.tree),
        (16 * 1024, SIGNATURE, "", f"{name}_sig", root.signature),
        (ROOT_SIZE, ROOT, "", "_empty", None),
        (TREE_SIZE, VERITY, "", "_empty", None),
        (16 * 1024, SIGNATURE, "", "_empty", None),
        (RULES_SIZE, RULES, "", "hairpin-rules", None),
        (VAR_SIZE, VAR, "", "hairpin-var", var),
    ]
    disk = directory / "disk.raw"
    with open(disk, "wb") as opened:
        opened.truncate(sum(max(size, MIB) for size, *_ in table) + 4 * MIB)
    argv: list[object] = ["sgdisk", "-a", "8", "-U", "11111111-2222-3333-4444-555555555555"]
    start = 2048
    places = []
    for number, (size, kind, guid, label, content) in enumerate(table, start=1):
        argv += ["-n", f"{number}:{start}:{start + size // 512 - 1}", "-t", f"{number}:{kind}"]
        argv += ["-c", f"{number}:{label}"]
        argv += [
            "-u",
            f"{number}:{guid or uuid.uuid5(uuid.NAMESPACE_OID, f'{root.version}{number}')}",
        ]
        places.append((start * 512, content))
        start += max(size, MIB) // 512
    run(*argv, disk)
    with open(disk, "r+b") as opened:
        for offset, content in places:
            if content is not None:
                opened.seek(offset)
                opened.write(content.read_bytes())
    return disk


def find_partition(disk: Path, label: str) -> Partition:
    with open_device_to_read(disk) as opened:
        return next(one for one in read_table(opened).partitions if one.name == label)


def flip_byte(path: Path, offset: int, mask: int = 0x01) -> None:
    with open(path, "r+b", buffering=0) as opened:
        opened.seek(offset)
        before = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([before[0] ^ mask]))


@contextlib.contextmanager
def flipped(path: Path, offset: int, mask: int = 0x01) -> Iterator[None]:
    """One byte is another one for so long."""
    flip_byte(path, offset, mask)
    try:
        yield
    finally:
        flip_byte(path, offset, mask)


def find_in(path: Path, needle: bytes) -> int:
    """Where these bytes are, once."""
    data = path.read_bytes()
    at = data.find(needle)
    assert at >= 0, needle
    return at
