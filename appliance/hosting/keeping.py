"""The folder in which an administrator keeps what was issued for a host: keys, and nothing that is not needed.

It is made once and read ever after, so that the same spec gives the same plan. For its owner only.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from appliance.hosting.pki import Issued, Pki, find_fault, find_other_host, issue, renew
from appliance.hosting.spec import HostSpec
from steering.errors import HairpinError

ENDS = ("ca", "host", "appliance", "api")


@dataclass(frozen=True, slots=True)
class Kept:
    """``secret`` makes the BFD addresses; ``pki`` None with `tls: existing`. ``issued``: just now.

    ``token``: for the appliance's API.
    """

    secret: bytes = field(repr=False)
    token: str = field(repr=False)
    pki: Pki | None
    issued: bool


def find_folder(spec: HostSpec, given: Path | None) -> Path:
    """Where a host's keys are kept unless told otherwise: beside one's own files, by the host's name."""
    return given if given is not None else Path(f"hairpin-{spec.name}")


def keep(spec: HostSpec, folder: Path, now: float, *, renewed: bool = False) -> Kept:
    """Read what is there, issue what is not. Raises HairpinError for what is of no use (any more)."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.geteuid():
            raise HairpinError(
                f"{folder} is another user's, who could read the private keys in it",
                "name a folder of your own by --keys",
            )
        if folder.stat().st_mode & 0o077:
            raise HairpinError(
                f"others may look into {folder}, where private keys are kept",
                f"chmod 700 {folder}; issue new keys if somebody did",
            )
        secret = _keep_secret(folder / "secret")
        token = _keep_token(folder / "token")
        if spec.tls == "existing":
            return Kept(secret, token, None, False)
        pki, issued = _keep_pki(spec, folder, now, renewed=renewed)
        return Kept(secret, token, pki, issued)
    except (OSError, UnicodeDecodeError) as fault:
        raise HairpinError(
            f"{folder}: {fault}", "mend it, or name another folder by --keys"
        ) from fault


def find_api_address(spec: HostSpec) -> str | None:
    """The appliance's own; None where DHCP gives it one."""
    address = spec.vm.management.address
    return None if address is None else address.partition("/")[0]


def _keep_secret(path: Path) -> bytes:
    if not path.exists():
        _write(path, secrets.token_hex(32) + "\n")
    try:
        secret = bytes.fromhex(path.read_text().strip())
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise HairpinError(
            f"{path} does not hold 32 bytes in hexadecimal",
            "restore the host, begin in a new folder",
        )
    return secret


def _keep_token(path: Path) -> str:
    if not path.exists():
        _write(path, secrets.token_urlsafe(32) + "\n")
    token = path.read_text().strip()
    if not re.fullmatch(r"[A-Za-z0-9._~+/-]{32,512}=*", token):
        raise HairpinError(
            f"{path} does not hold a token of 32 characters or more",
            "put it back, or remove it to have another one made",
        )
    return token


def _keep_pki(spec: HostSpec, folder: Path, now: float, *, renewed: bool) -> tuple[Pki, bool]:
    files = {end: (folder / f"{end}.pem", folder / f"{end}.key") for end in ENDS}
    there = [path for pair in files.values() for path in pair if path.exists()]
    if not there:
        pki = issue(spec.name, spec.names, spec.address, now, find_api_address(spec))
        # The CA last: with it a half-written folder is known for one, without it all is issued anew.
        _write_pki(files, pki)
        return pki, True
    if len(there) != 2 * len(ENDS):
        missing = [str(path) for pair in files.values() for path in pair if not path.exists()]
        raise HairpinError(
            f"{', '.join(missing)} is missing beside the others",
            f"put it back, or remove *.pem and *.key in {folder} to issue all anew",
        )
    have = Pki(*(Issued(one.read_text(), key.read_text()) for one, key in files.values()))
    _refuse_other_host(spec, folder, have.ca)
    if renewed:
        pki = renew(have.ca, spec.name, spec.names, spec.address, now, find_api_address(spec))
        _write_pki(files, pki)
        return pki, True
    try:
        names = [spec.name, *spec.names]
        fault = find_fault(have, names, spec.address, now, find_api_address(spec))
    except (ValueError, TypeError) as wrong:
        fault = f"a file can't be read: {wrong}"
    if fault:
        raise HairpinError(
            f"the certificates in {folder} are of no use: {fault}",
            "issue new ones by the same CA with --renew, on the host and in the appliance",
        )
    return have, False


def _refuse_other_host(spec: HostSpec, folder: Path, ca: Issued) -> None:
    """With --renew, too: one CA for two hosts would let each stand for the other."""
    with contextlib.suppress(ValueError):  # what can't be read is told of by whoever uses it
        if other := find_other_host(ca, spec.name):
            raise HairpinError(
                f"the keys in {folder} are those of another host, {other}, and this one is {spec.name}",
                f"name its own folder by --keys ({find_folder(spec, None)} if none is named), or a new one",
            )


def _write_pki(files: dict[str, tuple[Path, Path]], pki: Pki) -> None:
    for end in reversed(ENDS):
        issued: Issued = getattr(pki, end)
        certificate, key = files[end]
        _write(key, issued.key)
        _write(certificate, issued.certificate)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
