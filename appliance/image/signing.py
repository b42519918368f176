"""Who signed: certificates, plain signatures, and PKCS #7 as dm-verity and Authenticode have it.

A signature counts when its certificate is one of those that are trusted, or was issued by one of them. Times are not
looked at, as firmware and kernel don't either: an image must boot after its certificate has run out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.x509 import Certificate, ObjectIdentifier

from appliance.image.model import Damaged, ImageError
from steering.errors import FieldError, WrongInput

KEY_FILE_LIMIT = 64 * 2**10
PKCS7_LIMIT = 64 * 2**10
SPC_INDIRECT_DATA = "1.3.6.1.4.1.311.2.1.4"
_SIGNED_DATA = "1.2.840.113549.1.7.2"
_MESSAGE_DIGEST = "1.2.840.113549.1.9.4"
_DIGESTS: dict[str, hashes.HashAlgorithm] = {
    "2.16.840.1.101.3.4.2.1": hashes.SHA256(),
    "2.16.840.1.101.3.4.2.2": hashes.SHA384(),
    "2.16.840.1.101.3.4.2.3": hashes.SHA512(),
}
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


class NotTrusted(ImageError):
    """The signature is whole, but of somebody else, or it does not fit."""

    def __init__(
        self,
        reason: str,
        mend: str = "name who is trusted (`--certificate`), or have it signed by them",
    ) -> None:
        super().__init__(reason, mend)


# RFC 2315 and RFC 5652, as far as the two kinds of signature use them; what is not declared here is refused.


@asn1.sequence
class _Algorithm:
    algorithm: ObjectIdentifier
    parameters: asn1.Null | None


@asn1.sequence
class _Attribute:
    type: ObjectIdentifier
    values: asn1.SetOf[asn1.TLV]


@asn1.sequence
class _Attributes:
    values: asn1.SetOf[_Attribute]


@asn1.sequence
class _IssuerAndSerial:
    issuer: asn1.TLV
    serial: int


@asn1.sequence
class _SignerInfo:
    version: int
    sid: _IssuerAndSerial
    digest_algorithm: _Algorithm
    attributes: Annotated[asn1.SetOf[_Attribute] | None, asn1.Implicit(0)]
    signature_algorithm: _Algorithm
    signature: bytes


@asn1.sequence
class _NoContent:
    type: ObjectIdentifier


@asn1.sequence
class _Content:
    type: ObjectIdentifier
    content: Annotated[asn1.TLV, asn1.Explicit(0)]


@asn1.sequence
class _Detached:
    version: int
    digest_algorithms: asn1.SetOf[_Algorithm]
    content: _NoContent
    certificates: Annotated[asn1.SetOf[Certificate] | None, asn1.Implicit(0)]
    signers: asn1.SetOf[_SignerInfo]


@asn1.sequence
class _Attached:
    version: int
    digest_algorithms: asn1.SetOf[_Algorithm]
    content: _Content
    certificates: Annotated[asn1.SetOf[Certificate] | None, asn1.Implicit(0)]
    signers: asn1.SetOf[_SignerInfo]


@asn1.sequence
class _DetachedInfo:
    type: ObjectIdentifier
    content: Annotated[_Detached, asn1.Explicit(0)]


@asn1.sequence
class _AttachedInfo:
    type: ObjectIdentifier
    content: Annotated[_Attached, asn1.Explicit(0)]


@asn1.sequence
class _SpcData:
    type: ObjectIdentifier
    value: asn1.TLV


@asn1.sequence
class _DigestInfo:
    algorithm: _Algorithm
    digest: bytes


@asn1.sequence
class _SpcIndirect:
    data: _SpcData
    digest: _DigestInfo


Decoded = TypeVar("Decoded")


@dataclass(frozen=True, slots=True)
class ProgramSignature:
    """What an Authenticode signature says: by whom, over which digest."""

    signer: str
    algorithm: str
    digest: bytes


def check_detached(signature: bytes, content: bytes, trusted: Sequence[Certificate]) -> Certificate:
    """Whose signature over ``content`` it is. Raises Damaged, NotTrusted."""
    info = _decode(_DetachedInfo, signature)
    _require(info.type.dotted_string == _SIGNED_DATA, "it is no signed data")
    return _check_signer(info.content.signers, info.content.certificates, content, trusted)


def is_signed_with(signature: bytes, content: bytes, certificate: Certificate) -> bool:
    """Whether it is of this certificate's key, whichever certificate it names: one may be renewed. Raises Damaged."""
    info = _decode(_DetachedInfo, signature)
    _require(info.type.dotted_string == _SIGNED_DATA, "it is no signed data")
    listed = info.content.signers.as_list()
    _require(len(listed) == 1, f"it has {len(listed)} signers")
    try:
        _check_signature(listed[0], content, certificate)
    except NotTrusted:
        return False
    return True


def check_program(signature: bytes, trusted: Sequence[Certificate]) -> ProgramSignature:
    """Raises Damaged, NotTrusted. The digest is still to be compared."""
    info = _decode(_AttachedInfo, signature)
    _require(info.type.dotted_string == _SIGNED_DATA, "it is no signed data")
    content = info.content.content
    _require(content.type.dotted_string == SPC_INDIRECT_DATA, "it is no program's signature")
    body = bytes(content.content.data)
    signer = _check_signer(info.content.signers, info.content.certificates, body, trusted)
    told = _decode(_SpcIndirect, _encode_header(content.content.tag_bytes, len(body)) + body)
    algorithm = _find_digest(told.digest.algorithm)
    return ProgramSignature(render_name(signer), algorithm.name, told.digest.digest)


def render_name(certificate: Certificate) -> str:
    """The subject, and enough of the fingerprint to tell two certificates apart."""
    name = certificate.subject.rfc4514_string() or "(no name)"
    return f"{name} ({certificate.fingerprint(hashes.SHA256()).hex()[:16]})"


def _require(fine: bool, reason: str) -> None:
    if not fine:
        raise Damaged(f"the signature is damaged: {reason}")


def _decode(shape: type[Decoded], data: bytes) -> Decoded:
    _require(len(data) <= PKCS7_LIMIT, f"it is longer than {PKCS7_LIMIT} bytes")
    try:
        return asn1.decode_der(shape, data)
    except (ValueError, TypeError, OverflowError, x509.InvalidVersion) as fault:
        raise Damaged(f"the signature is damaged: {fault}") from fault


def _encode_header(tag: bytes, length: int) -> bytes:
    if length < 0x80:
        return tag + bytes([length])
    octets = length.to_bytes(-(-length.bit_length() // 8))
    return tag + bytes([0x80 | len(octets)]) + octets


def _find_digest(algorithm: _Algorithm) -> hashes.HashAlgorithm:
    found = _DIGESTS.get(algorithm.algorithm.dotted_string)
    if found is None:
        raise Damaged("the signature is damaged: it is over an unknown digest")
    return found


def _hash(algorithm: hashes.HashAlgorithm, data: bytes) -> bytes:
    digest = hashes.Hash(algorithm)
    digest.update(data)
    return digest.finalize()


def _check_signer(
    signers: asn1.SetOf[_SignerInfo],
    included: asn1.SetOf[Certificate] | None,
    content: bytes,
    trusted: Sequence[Certificate],
) -> Certificate:
    listed = signers.as_list()
    _require(len(listed) == 1, f"it has {len(listed)} signers")
    signer = listed[0]
    others = included.as_list() if included is not None else []
    for one in others:
        _require_trusted(one, trusted)
    certificate = _find_certificate(signer.sid, [*trusted, *others])
    _check_signature(signer, content, certificate)
    return certificate


def _check_signature(signer: _SignerInfo, content: bytes, certificate: Certificate) -> None:
    algorithm = _find_digest(signer.digest_algorithm)
    message = content
    if signer.attributes is not None:
        _check_attributes(signer.attributes, _hash(algorithm, content))
        message = _encode_attributes(signer.attributes)
    try:
        _verify(certificate.public_key(), message, signer.signature, algorithm)
    except (InvalidSignature, ValueError, UnsupportedAlgorithm) as fault:
        raise NotTrusted(f"the signature of {render_name(certificate)} does not fit") from fault


def _require_trusted(certificate: Certificate, trusted: Sequence[Certificate]) -> None:
    # A certificate is read lazily: what is torn in it is told of only when its fields are asked for.
    try:
        if _is_trusted(certificate, trusted):
            return
        name = render_name(certificate)
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm) as fault:
        raise Damaged("the signature is damaged: its certificate can't be read") from fault
    raise NotTrusted(f"signed by {name}, which is not trusted")


def _is_trusted(certificate: Certificate, trusted: Sequence[Certificate]) -> bool:
    return certificate in trusted or any(_has_issued(one, certificate) for one in trusted)


def _has_issued(issuer: Certificate, certificate: Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints)
    except (InvalidSignature, ValueError, TypeError, x509.ExtensionNotFound):
        return False
    return constraints.value.ca


def _find_certificate(sid: _IssuerAndSerial, known: Sequence[Certificate]) -> Certificate:
    issuer = bytes(sid.issuer.data)
    wanted = _encode_header(sid.issuer.tag_bytes, len(issuer)) + issuer
    for one in known:
        if one.serial_number == sid.serial and one.issuer.public_bytes() == wanted:
            return one
    raise NotTrusted("signed by somebody whose certificate is not trusted")


def _check_attributes(attributes: asn1.SetOf[_Attribute], digest: bytes) -> None:
    try:
        told = [
            value.parse(bytes)
            for one in attributes.as_list()
            if one.type.dotted_string == _MESSAGE_DIGEST
            for value in one.values.as_list()
        ]
    except ValueError as fault:
        raise Damaged(f"the signature is damaged: {fault}") from fault
    if told != [digest]:
        raise NotTrusted("the signature is over something else")


def _encode_attributes(attributes: asn1.SetOf[_Attribute]) -> bytes:
    """As they are signed: a SET OF by its own tag, in DER (RFC 5652, 5.4)."""
    wrapped = asn1.encode_der(_Attributes(values=attributes))
    return wrapped[2 + (wrapped[1] & 0x7F if wrapped[1] & 0x80 else 0) :]


def _verify(
    key: CertificatePublicKeyTypes,
    message: bytes,
    signature: bytes,
    algorithm: hashes.HashAlgorithm,
) -> None:
    match key:
        case rsa.RSAPublicKey():
            prehashed = Prehashed(algorithm)
            key.verify(signature, _hash(algorithm, message), padding.PKCS1v15(), prehashed)
        case ec.EllipticCurvePublicKey():
            key.verify(signature, message, ec.ECDSA(algorithm))
        case ed25519.Ed25519PublicKey():
            key.verify(signature, message)
        case _:
            raise InvalidSignature


# Plain signatures, for what is Hairpin's own: the manifest and the rules bundle.


def sign(key: PrivateKey, message: bytes) -> bytes:
    match key:
        case rsa.RSAPrivateKey():
            return key.sign(message, padding.PKCS1v15(), hashes.SHA256())
        case ec.EllipticCurvePrivateKey():
            return key.sign(message, ec.ECDSA(hashes.SHA256()))
        case ed25519.Ed25519PrivateKey():
            return key.sign(message)


def check_plain(
    message: bytes, signature: bytes, key_id: str, trusted: Sequence[Certificate]
) -> str:
    """Who signed ``message``. ``key_id`` as `build_key_id`. Raises NotTrusted."""
    certificate = next((one for one in trusted if build_key_id(one) == key_id), None)
    if certificate is None:
        raise NotTrusted("signed by somebody whose certificate is not trusted")
    try:
        _verify(certificate.public_key(), message, signature, hashes.SHA256())
    except (InvalidSignature, ValueError) as fault:
        raise NotTrusted(f"the signature of {render_name(certificate)} does not fit") from fault
    return render_name(certificate)


def build_key_id(certificate: Certificate) -> str:
    """SHA-256 of the public key (SubjectPublicKeyInfo), so that a certificate may be renewed."""
    return hashlib.sha256(_encode_public(certificate.public_key())).hexdigest()


def _encode_public(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fits(key: PrivateKey, certificate: Certificate) -> bool:
    return _encode_public(key.public_key()) == _encode_public(certificate.public_key())


# The thin door: keys and certificates are files.


def _read_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as opened:
            data = opened.read(KEY_FILE_LIMIT + 1)
    except OSError as fault:
        raise WrongInput([FieldError(str(path), fault.strerror or str(fault))]) from fault
    if len(data) > KEY_FILE_LIMIT:
        raise WrongInput([FieldError(str(path), f"longer than {KEY_FILE_LIMIT} bytes")])
    return data


def read_certificates(path: Path) -> tuple[Certificate, ...]:
    """All of a file: PEM, or one in DER. Raises WrongInput."""
    data = _read_file(path)
    try:
        if b"-----BEGIN" in data:
            return tuple(x509.load_pem_x509_certificates(data))
        return (x509.load_der_x509_certificate(data),)
    except ValueError as fault:
        raise WrongInput([FieldError(str(path), f"no certificate: {fault}")]) from fault


def read_key(path: Path) -> PrivateKey:
    """A private key in PEM without a password: RSA, ECDSA or Ed25519. Raises WrongInput."""
    try:
        key = serialization.load_pem_private_key(_read_file(path), None)
    except (ValueError, TypeError) as fault:
        raise WrongInput([FieldError(str(path), f"no private key: {fault}")]) from fault
    if not isinstance(key, PrivateKey):
        raise WrongInput([FieldError(str(path), "neither RSA, ECDSA nor Ed25519")])
    return key


def read_pair(key_path: Path, certificate_path: Path) -> tuple[PrivateKey, Certificate]:
    """A key and its certificate. Raises WrongInput, also when they don't belong together."""
    key, certificate = read_key(key_path), read_certificates(certificate_path)[0]
    if not fits(key, certificate):
        reason = f"not the key of the certificate {certificate_path}"
        raise WrongInput([FieldError(str(key_path), reason)])
    return key, certificate
