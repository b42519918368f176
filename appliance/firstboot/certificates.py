"""Certificates and keys of a seed: checked before they are used; and one of our own, where none is given.

Judging is pure, the time is passed in; only `make_pair` draws random numbers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.firstboot.faults import Fault

RSA_BITS = 2048
OWN_DAYS = 3650
RENEW_DAYS = 30
Purpose = Literal["server", "client"]
_PURPOSES = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
}
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate (PEM, with those that follow it) and its private key (PEM)."""

    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """``faults`` forbid its use; ``dated`` say that it is not valid now, which a clock may be to blame for."""

    faults: tuple[Fault, ...] = ()
    dated: tuple[Fault, ...] = ()


def judge_pair(path: str, pair: Pair, now: float, purpose: Purpose) -> Verdict:
    """Of the certificate and key at `PATH.certificate` and `PATH.key` of the seed."""
    certificates, faults = _load(f"{path}.certificate", pair.certificate)
    if certificates:
        faults += _find_purpose(f"{path}.certificate", certificates[0], purpose)
    key_path = f"{path}.key"
    public = None
    try:
        private = serialization.load_pem_private_key(pair.key.encode(), password=None)
        public = private.public_key()
    except TypeError:
        mend = "give the key without a password: nobody is there to type it"
        faults.append(Fault(key_path, "the private key is encrypted", mend))
    except (ValueError, UnsupportedAlgorithm):
        faults.append(Fault(key_path, "no private key in PEM", "give the certificate's own key"))
    if public is not None and certificates and _encode(public) != _encode_key(certificates[0]):
        mend = "give the key that the certificate was made for"
        faults.append(Fault(key_path, "not the key of `certificate`", mend))
    return Verdict(tuple(faults), tuple(_find_dates(f"{path}.certificate", certificates, now)))


def judge_authority(path: str, text: str, now: float) -> Verdict:
    """Of the authorities' certificates at ``path``."""
    certificates, faults = _load(path, text)
    faults += [fault for one in certificates for fault in _find_no_authority(path, one)]
    return Verdict(tuple(faults), tuple(_find_dates(path, certificates, now)))


def _load(path: str, text: str) -> tuple[list[x509.Certificate], list[Fault]]:
    try:
        certificates = x509.load_pem_x509_certificates(text.encode())
        faults = [fault for one in certificates for fault in _find_weakness(path, one)]
        for one in certificates:
            _ = one.extensions  # read here, where a certificate that can't be read is told as one
    except (ValueError, UnsupportedAlgorithm):
        return [], [Fault(path, "no certificate in PEM", "give it as -----BEGIN CERTIFICATE-----")]
    return certificates, faults


def _find_weakness(path: str, certificate: x509.Certificate) -> Iterator[Fault]:
    """What OpenSSL would refuse when it is used, told before anything depends on it."""
    public = certificate.public_key()
    if isinstance(public, rsa.RSAPublicKey) and public.key_size < RSA_BITS:
        mend = f"make one with {RSA_BITS} bits or more, or with an elliptic curve"
        yield Fault(path, f"an RSA key of {public.key_size} bits is too weak", mend)
    used = certificate.signature_hash_algorithm
    if isinstance(used, hashes.SHA1 | hashes.MD5) and certificate.subject != certificate.issuer:
        yield Fault(
            path, f"signed with {used.name}, which is too weak", "have it signed with SHA-256"
        )


def _find_purpose(path: str, certificate: x509.Certificate, purpose: Purpose) -> Iterator[Fault]:
    """The other end would refuse it, and only the other end would know why."""
    usages = _find_extension(certificate, x509.ExtendedKeyUsage)
    if usages is None or {_PURPOSES[purpose], ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & {
        *usages
    }:
        return
    yield Fault(path, f"not for a {purpose}: its extended key usage is another", "give one that is")


def _find_no_authority(path: str, certificate: x509.Certificate) -> Iterator[Fault]:
    """One that signs itself is taken: a peer's own certificate may be trusted by itself."""
    found = _find_extension(certificate, x509.BasicConstraints)
    if (found is None or not found.ca) and certificate.subject != certificate.issuer:
        yield Fault(path, "a certificate of no authority", "give that of the one that signed it")


def _find_extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def rewrite_certificates(text: str) -> str:
    """The certificates alone, as OpenSSL reads them: it takes no indented PEM, and a private key that stands
    beside them must not get into a file that others read. Raises ValueError."""
    found = x509.load_pem_x509_certificates(text.encode())
    return "".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in found)


def rewrite_key(text: str) -> str:
    """The private key alone, as OpenSSL reads it. Raises ValueError."""
    return _render_key(serialization.load_pem_private_key(text.encode(), password=None))


def _render_key(private: PrivateKeyTypes) -> str:
    return private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def _find_dates(path: str, certificates: list[x509.Certificate], now: float) -> Iterator[Fault]:
    at = datetime.fromtimestamp(now, UTC)
    for one in certificates:
        began, ended = one.not_valid_before_utc, one.not_valid_after_utc
        if at > ended:
            reason = (
                f"expired at {ended:%Y-%m-%dT%H:%M:%SZ}; the clock says {at:%Y-%m-%dT%H:%M:%SZ}"
            )
            yield Fault(path, reason, "give one that is valid")
        elif at < began:
            reason = f"not valid before {began:%Y-%m-%dT%H:%M:%SZ}; the clock says {at:%Y-%m-%dT%H:%M:%SZ}"
            yield Fault(path, reason, "set the clock, or give one that is valid")


def _encode(public: object) -> bytes:
    return public.public_bytes(  # type: ignore[attr-defined,no-any-return]  # every kind has it
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _encode_key(certificate: x509.Certificate) -> bytes:
    return _encode(certificate.public_key())


def find_fingerprint(certificate: str) -> str:
    """SHA-256 of the first certificate, as `openssl x509 -fingerprint -sha256` prints it."""
    found = x509.load_pem_x509_certificates(certificate.encode())[0]
    return found.fingerprint(hashes.SHA256()).hex(":").upper()


def is_usable(pair: Pair, name: str, address: str | None, now: float) -> bool:
    """Whether our own certificate of an earlier boot is whole, for this name and address, and lasts a while."""
    verdict = judge_pair("api", pair, now + RENEW_DAYS * 86400.0, "server")
    if verdict.faults or verdict.dated:
        return False
    found = x509.load_pem_x509_certificates(pair.certificate.encode())[0]
    try:
        found.verify_directly_issued_by(found)  # by its own key: each byte that is signed
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError, TypeError, InvalidSignature):
        return False
    return list(names) == _build_names(name, address)


def make_pair(name: str, address: str | None, now: float) -> Pair:
    """A certificate that signs itself, for ``name`` and the IP ``address``."""
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    at = datetime.fromtimestamp(now, UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        # A clock that is a little ahead at the client's must not make it invalid.
        .not_valid_before(at - timedelta(days=1))
        .not_valid_after(at + timedelta(days=OWN_DAYS))
        .add_extension(x509.SubjectAlternativeName(_build_names(name, address)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(private, hashes.SHA256())
    )
    return Pair(made.public_bytes(serialization.Encoding.PEM).decode(), _render_key(private))


def _build_names(name: str, address: str | None) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    if address is not None:
        names.append(x509.IPAddress(ipaddress.ip_address(address)))
    return names
