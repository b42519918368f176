"""Certificates for one host's switch and its appliance, by a CA of their own.

The CA signs for this one pair and nothing else, so "signed by it" is as much as "is the other one": OVS's
programs look at nothing more. ECDSA on P-256, since every OVS with OpenSSL takes it. The appliance has two: as the
switch's client, and as the server of its own API.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from steering.errors import HairpinError

CA_DAYS = 3650
LEAF_DAYS = 730
SKEW = timedelta(hours=24)  # by which a clock may be behind
_CA_OF = "Hairpin CA of "
RENEW_SECONDS = 90 * 86400.0  # what ends sooner is issued anew by itself


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key, PEM."""

    certificate: str
    key: str


@dataclass(frozen=True, slots=True)
class Pki:
    """``api``: what the appliance's API shows."""

    ca: Issued
    host: Issued
    appliance: Issued
    api: Issued


def issue(
    name: str, names: Sequence[str], address: str, now: float, api_address: str | None = None
) -> Pki:
    """A new CA and its certificates; ``now`` in epoch seconds. ``api_address``: the appliance's, where known."""
    at = datetime.fromtimestamp(now, UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(f"{_CA_OF}{name}")
    certificate = (
        _begin(subject, subject, key.public_key(), at, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return renew(Issued(_pem(certificate), _key_pem(key)), name, names, address, now, api_address)


def renew(
    ca: Issued,
    name: str,
    names: Sequence[str],
    address: str,
    now: float,
    api_address: str | None = None,
) -> Pki:
    """All certificates anew by the same CA, so that one end can be changed after the other.

    Raises HairpinError for a CA that can't be read or ends too soon.
    """
    try:
        root = x509.load_pem_x509_certificate(ca.certificate.encode())
        signer = serialization.load_pem_private_key(ca.key.encode(), None)
    except (ValueError, TypeError) as fault:
        raise HairpinError(
            f"the CA can't be read: {fault}", "begin anew in an empty folder"
        ) from fault
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise HairpinError("the CA's key is not one of Hairpin's", "begin anew in an empty folder")
    if signer.public_key() != root.public_key():
        # What it signed would be refused by both ends, and would be written over what is in use.
        raise HairpinError("the CA's key is not that of its certificate", "put the right one back")
    at = datetime.fromtimestamp(now, UTC)
    if root.not_valid_after_utc <= at + timedelta(days=LEAF_DAYS):
        raise HairpinError(
            "the CA ends before a new certificate would",
            "begin anew in an empty folder: restore the host, then prepare it again",
        )
    alternatives = [
        x509.IPAddress(ip_address(address)),
        *(x509.DNSName(one) for one in dict.fromkeys((name, *names))),
    ]
    return Pki(
        ca,
        _sign(root, signer, name, ExtendedKeyUsageOID.SERVER_AUTH, at, alternatives),
        _sign(root, signer, f"Hairpin of {name}", ExtendedKeyUsageOID.CLIENT_AUTH, at, []),
        _sign(
            root,
            signer,
            f"API of {name}",
            ExtendedKeyUsageOID.SERVER_AUTH,
            at,
            _name_api(name, api_address),
        ),
    )


def find_other_host(ca: Issued, name: str) -> str:
    """Whose CA it is, where that is another host than ``name``; else "". Raises ValueError where it is none."""
    root = x509.load_pem_x509_certificate(ca.certificate.encode())
    if root.subject == _name(f"{_CA_OF}{name}"):
        return ""
    shown = root.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    whose = str(shown[0].value) if shown else ""
    return whose.removeprefix(_CA_OF) if whose.startswith(_CA_OF) else ""


def _name_api(name: str, address: str | None) -> list[x509.GeneralName]:
    """The appliance's name is the host's; its address is its own."""
    known = [] if address is None else [x509.IPAddress(ip_address(address))]
    return [*known, x509.DNSName(name)]


def find_fault(
    pki: Pki,
    names: Sequence[str],
    address: str,
    now: float,
    api_address: str | None = None,
) -> str:
    """Why these certificates are of no use (any more) for a host; "" if they are.

    Raises ValueError for what is no certificate.
    """
    root = x509.load_pem_x509_certificate(pki.ca.certificate.encode())
    for whose, one in (
        ("the host's", pki.host),
        ("the appliance's", pki.appliance),
        ("the API's", pki.api),
    ):
        certificate = x509.load_pem_x509_certificate(one.certificate.encode())
        try:
            certificate.verify_directly_issued_by(root)
        except Exception:  # InvalidSignature, ValueError, TypeError: no certificate of this CA
            return f"{whose} certificate is not signed by the CA beside it"
        key = serialization.load_pem_private_key(one.key.encode(), None)
        if certificate.public_key() != key.public_key():
            return f"{whose} certificate and key do not belong together"
        if certificate.not_valid_after_utc.timestamp() - now < RENEW_SECONDS:
            return f"{whose} certificate ends on {certificate.not_valid_after_utc:%Y-%m-%d}"
    wanted = (
        ("the host's", pki.host, {str(ip_address(address)), *names}),
        (
            "the API's",
            pki.api,
            {names[0], *([str(ip_address(api_address))] if api_address else [])},
        ),
    )
    for whose, one, must in wanted:
        if missing := sorted(must - _read_names(one)):
            return f"{whose} certificate is not for {', '.join(missing)}"
    return ""


def _read_names(one: Issued) -> set[str]:
    certificate = x509.load_pem_x509_certificate(one.certificate.encode())
    shown = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = {str(address) for address in shown.get_values_for_type(x509.IPAddress)}
    return addresses | set(shown.get_values_for_type(x509.DNSName))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, at: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - SKEW)
        .not_valid_after(at + timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _sign(
    root: x509.Certificate,
    signer: ec.EllipticCurvePrivateKey,
    name: str,
    purpose: x509.ObjectIdentifier,
    at: datetime,
    alternatives: Sequence[x509.GeneralName],
) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _begin(_name(name), root.subject, key.public_key(), at, LEAF_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return Issued(_pem(builder.sign(signer, hashes.SHA256())), _key_pem(key))


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
