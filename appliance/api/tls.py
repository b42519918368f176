"""TLS of the management API: the server's context, and what a client trusts."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

import aiohttp

from steering.errors import HairpinError

_PEM_BEGIN, _PEM_END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


class _Encrypted(Exception):
    """The key wants a password; OpenSSL would ask for it on the terminal."""


def _refuse_password() -> str:
    raise _Encrypted


def build_server_context(cert_file: Path, key_file: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer with this certificate. Raises HairpinError for what can't be used."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    for path in (cert_file, key_file):
        try:
            path.read_bytes()
        except OSError as fault:
            raise HairpinError(
                f"{path} can't be read: {fault.strerror}",
                "correct api.certFile and api.keyFile, and let the service's user read them",
            ) from fault
    try:
        context.load_cert_chain(cert_file, key_file, _refuse_password)
    except _Encrypted as fault:
        raise HairpinError(
            f"the private key {key_file} is encrypted", "give one without a password, mode 0600"
        ) from fault
    except ssl.SSLError as fault:
        raise HairpinError(
            f"{cert_file} and {key_file} are no certificate (PEM) with its private key: "
            f"{fault.reason or fault}",
            "correct api.certFile and api.keyFile",
        ) from fault
    return context


def build_pin(certificate_file: Path) -> aiohttp.Fingerprint:
    """Takes the first certificate of the file and no other, whatever its names. Raises HairpinError.

    For who reads the service's own file: it stands on the same machine, and is asked by loopback.
    """
    try:
        text = certificate_file.read_text(encoding="ascii")
        first = text[text.index(_PEM_BEGIN) : text.index(_PEM_END) + len(_PEM_END)]
        return aiohttp.Fingerprint(hashlib.sha256(ssl.PEM_cert_to_DER_cert(first)).digest())
    except (OSError, ValueError) as fault:
        raise HairpinError(
            f"the certificate {certificate_file} can't be used: {fault}",
            "name one (PEM) as `certificateFile` in the client's file",
        ) from fault


def build_client_context(ca_file: Path | None) -> ssl.SSLContext:
    """Trusts ``ca_file`` alone, None: the system's authorities. Raises HairpinError."""
    try:
        context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except OSError as fault:  # ssl.SSLError, too
        why = fault.reason if isinstance(fault, ssl.SSLError) else fault.strerror
        raise HairpinError(
            f"the CA file {ca_file} can't be used: {why}",
            "name one with certificates (PEM) in HAIRPIN_CA_FILE, or as `caFile` in the client's file",
        ) from fault
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
