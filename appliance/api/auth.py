"""The bearer token (RFC 6750): made once, kept in a 0600 file, compared in constant time."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from steering.errors import HairpinError

REALM = 'Bearer realm="hairpin"'
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,512}=*", re.ASCII)


def check_token(header: str | None, token: str) -> bool:
    """Whether an Authorization header carries the token. Takes as long for any wrong one."""
    scheme, _, given = (header or "").partition(" ")
    # Digests, so that neither length nor content of the token shows in the time it takes.
    same = hmac.compare_digest(
        hashlib.sha256(given.strip(" ").encode(errors="surrogateescape")).digest(),
        hashlib.sha256(token.encode()).digest(),
    )
    return same and scheme.lower() == "bearer"


def read_token(path: Path) -> str:
    """The token in ``path``. Raises HairpinError when it can't be read or is no token."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else "not ASCII"
        raise HairpinError(
            f"the token file {path} can't be read: {why}",
            "run as a user who may read it, or name another with --token-file",
        ) from fault
    if not _TOKEN.fullmatch(token):
        raise HairpinError(
            f"the token file {path} holds no token",
            "it must hold 16 or more characters of A-Z a-z 0-9 . _ ~ + / -; "
            "remove it and the service makes a new one at its next start",
        )
    return token


def ensure_token(path: Path) -> str:
    """The service's own token; makes the file (mode 0600, 256 random bits) when there is none.

    Raises HairpinError as `read_token`, and when others than its owner may use the file.
    """
    if not os.path.lexists(path):
        try:
            _make_token(path)
        except OSError as fault:
            raise HairpinError(
                f"the token file {path} can't be made: {fault.strerror}",
                f"make the directory {path.parent} writable for the service",
            ) from fault
    token = read_token(path)
    if path.stat().st_mode & 0o077:
        raise HairpinError(
            f"the token file {path} may be used by others than its owner",
            f"chmod 600 {path}; if others could read it, remove it, and restart the service",
        )
    return token


def _make_token(path: Path) -> None:
    """By a link, not a rename: it is there whole or not at all, and never in the place of another."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    try:
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
