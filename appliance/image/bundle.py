"""The signed rules bundle in the partition `hairpin-rules`. Pure.

The partition has two slots, its halves. A slot is: 64 bytes (magic, version, three lengths, zeros), a header
(JSON), a signature over the header, and the payload (a tar.gz of rule files), whose digest the header has. The same
bundle stands in both slots: one is written while the other is whole, so a write that is cut off leaves one of them.
The first block is written last.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography.x509 import Certificate
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.image.model import Damaged, ImageError, Part, Source, find_nonzero
from appliance.image.signing import NotTrusted, check_plain
from appliance.rules.archive import ARCHIVE_LIMIT

MAGIC = b"HAIRPINR"
VERSION = 1
BLOCK = 4096
HEADER_LIMIT = 64 * 2**10
SIGNATURE_LIMIT = 4096
SLOTS = 2
SERIAL_LIMIT = 2**53
_PREFIX = struct.Struct("<8sIIIQ36s")


class NoBundle(ImageError):
    """The partition is empty: nothing was ever written to it."""


class TooOld(ImageError):
    """The bundle is signed and whole, and older than one that was there before."""


class BundleSource(BaseModel):
    """Where some of the rules are from. ``sha256`` is of what was read, before it was packed anew."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(max_length=200)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Header(BaseModel):
    """What is signed. ``serial`` only grows; ``rules`` are those that are enabled and passed the checks."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: str = Field(pattern=r"^hairpin-rules/1$")
    serial: int = Field(ge=1, lt=SERIAL_LIMIT)
    created: datetime
    sources: tuple[BundleSource, ...] = Field(max_length=1000)
    rules: int = Field(ge=0)
    payload_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    payload_size: int = Field(ge=0, le=ARCHIVE_LIMIT)
    key: str = Field(pattern=r"^[0-9a-f]{64}$")

    def encode(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1).encode()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose signature and digest were checked."""

    header: Header
    signer: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """The bundle to use. ``faults`` are of the other slot: the bundle is used all the same."""

    bundle: Bundle
    faults: tuple[str, ...] = ()


def slot_size(partition_size: int) -> int:
    return partition_size // SLOTS // BLOCK * BLOCK


def find_slot(partition: Source, number: int) -> Part:
    size = slot_size(partition.size)
    return Part(partition, number * size, size)


def pack_rules(files: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar.gz of rule files: the same files give the same bytes."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, filename="") as squeezed,
        tarfile.open(fileobj=squeezed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for number, (name, data) in enumerate(files):
            # Numbered: two sources may have files of one name, and order counts.
            short = name.rpartition("/")[2][-80:] or "source.rules"
            member = tarfile.TarInfo(f"rules/{number:04d}-{short}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def build_header(
    payload: bytes,
    *,
    serial: int,
    created: float,
    sources: Sequence[BundleSource],
    rules: int,
    key_id: str,
) -> Header:
    return Header(
        format="hairpin-rules/1",
        serial=serial,
        created=datetime.fromtimestamp(int(created), UTC),
        sources=tuple(sources),
        rules=rules,
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        payload_size=len(payload),
        key=key_id,
    )


def encode_slot(header: bytes, signature: bytes, payload: bytes) -> bytes:
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header), len(signature), len(payload), bytes(36))
    return prefix + header + signature + payload


def parse_slot(slot: Source, trusted: Sequence[Certificate]) -> Bundle:
    """Raises NoBundle, Damaged, NotTrusted. Reads no more than what the lengths allow, after checking them."""
    prefix = slot.read(0, _PREFIX.size)
    if not any(prefix):
        raise NoBundle("there is no rules bundle", "write one: `hairpin image refresh`")
    magic, version, header_size, signature_size, payload_size, rest = _PREFIX.unpack(prefix)
    if magic != MAGIC or version != VERSION or any(rest):
        raise Damaged("it is no rules bundle, or a newer kind of one")
    if not 0 < header_size <= HEADER_LIMIT or not 0 < signature_size <= SIGNATURE_LIMIT:
        raise Damaged("its lengths can't be")
    if payload_size > ARCHIVE_LIMIT:
        raise Damaged(f"it is larger than {ARCHIVE_LIMIT} bytes")
    if _PREFIX.size + header_size + signature_size + payload_size > slot.size:
        raise Damaged("it is larger than its place")
    text = slot.read(_PREFIX.size, header_size)
    signature = slot.read(_PREFIX.size + header_size, signature_size)
    try:
        header = Header.model_validate_json(text)
    except ValidationError as fault:
        raise Damaged(f"its header can't be read: {fault.error_count()} faults") from fault
    signer = check_plain(text, signature, header.key, trusted)
    if header.payload_size != payload_size:
        raise Damaged("its length is not the one that was signed")
    payload = slot.read(_PREFIX.size + header_size + signature_size, payload_size)
    if hashlib.sha256(payload).hexdigest() != header.payload_sha256:
        raise Damaged("its rules are not those that were signed")
    return Bundle(header, signer, payload)


def measure_slot(bundle: Bundle, slot: Source) -> int:
    """How many bytes of its slot a bundle takes."""
    _, _, header_size, signature_size, payload_size, _ = _PREFIX.unpack(slot.read(0, _PREFIX.size))
    return int(_PREFIX.size + header_size + signature_size + payload_size)


def read_bundle(partition: Source, trusted: Sequence[Certificate], floor: int = 0) -> Read:
    """The newest bundle of a partition that is whole, signed, and of serial ``floor`` at least.

    Raises NoBundle when both slots are empty; else TooOld, NotTrusted or Damaged, by what is gravest.
    """
    found: list[Bundle] = []
    faults: list[ImageError] = []
    empty = 0
    for number in range(SLOTS):
        try:
            found.append(parse_slot(find_slot(partition, number), trusted))
        except NoBundle as none:
            empty += 1
            if empty == SLOTS:
                raise none
        except ImageError as fault:
            faults.append(type(fault)(f"copy {number + 1}: {fault.reason}"))
    if not found:
        raise next((one for one in faults if isinstance(one, NotTrusted)), faults[0])
    newest = max(found, key=lambda one: one.header.serial)
    if newest.header.serial < floor:
        reason = f"serial {newest.header.serial} is older than {floor}, which was there before"
        raise TooOld(reason, "write a newer one: `hairpin image refresh`")
    told = [one.reason for one in faults]
    if empty:
        told.append("the other copy is missing")
    elif not faults and found[0].header != found[1].header:
        told.append("the other copy is of an older bundle: a refresh was cut off")
    return Read(newest, tuple(told))


def find_leftover(bundle: Bundle, slot: Source) -> int | None:
    """The offset in the slot of the first byte after the bundle that is not zero."""
    end = measure_slot(bundle, slot)
    return find_nonzero(slot, end, slot.size - end)
