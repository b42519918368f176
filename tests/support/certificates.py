"""Certificates for tests, made anew: an authority, and what it signs."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NOW = datetime.now(UTC)


@dataclass(frozen=True)
class Issued:
    """PEM text, and what signs further ones."""

    certificate: str
    key: str
    private: ec.EllipticCurvePrivateKey
    name: x509.Name


def issue(
    name: str,
    by: Issued | None = None,
    *,
    addresses: tuple[str, ...] = (),
    begins: datetime = NOW - timedelta(days=1),
    ends: datetime = NOW + timedelta(days=30),
    private: Any = None,
    purpose: x509.ObjectIdentifier | None = None,
) -> Issued:
    """A certificate; an authority's own where ``by`` is None. Without a ``purpose`` it is for any."""
    private = private or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names: list[Any] = [x509.DNSName(name)]
    names += [x509.IPAddress(ipaddress.ip_address(one)) for one in addresses]
    signer = by.private if by else private
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.name if by else subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False
        )
    )
    if by is None:
        # Python 3.13 checks as RFC 5280 has it: an authority's certificate says that it signs others.
        builder = builder.add_extension(build_authority_usage(), critical=True)
    else:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    made = builder.sign(signer, hashes.SHA256())
    return Issued(
        made.public_bytes(serialization.Encoding.PEM).decode(),
        render_key(private),
        private,
        subject,
    )


def build_authority_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def render_key(private: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> str:
    encryption: Any = (
        serialization.NoEncryption()
        if password is None
        else serialization.BestAvailableEncryption(password)
    )
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    ).decode()
