"""New rules for an image that does not run: read, bound, check, try, sign, write, read back.

The trial is the one of the appliance itself: its whole rule pipeline, with a real `suricata -T`, for both profiles.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from cryptography.x509 import Certificate

from appliance.image.bundle import (
    BLOCK,
    SERIAL_LIMIT,
    SLOTS,
    Bundle,
    BundleSource,
    Header,
    NoBundle,
    Read,
    build_header,
    encode_slot,
    find_slot,
    pack_rules,
    parse_slot,
    read_bundle,
    slot_size,
)
from appliance.image.disk import Writable
from appliance.image.gpt import Partition, read_table
from appliance.image.layout import RootSet, find_layout
from appliance.image.model import Damaged, ImageError, Part, Progress, Source, find_nonzero
from appliance.image.signing import (
    NotTrusted,
    PrivateKey,
    build_key_id,
    is_signed_with,
    render_name,
    sign,
)
from appliance.image.verity import SIGNATURE_LIMIT, parse_signature
from appliance.rules.archive import ARCHIVE_LIMIT, MEMBER_LIMIT, UNPACKED_LIMIT, read_rule_files
from appliance.rules.check import build_source
from appliance.rules.model import LeftOut, RulesError, UpdateReport
from appliance.rules.pipeline import RulePipeline
from appliance.settings import Settings
from steering.errors import FieldError, WrongInput

log = structlog.get_logger("image")

NAME = "bundle"
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class RuleFiles:
    """Rules as they were given: what they are from, and each rule file's name and content."""

    sources: tuple[BundleSource, ...]
    files: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class Tried:
    """Rules that passed: packed, and what the trial said of them. ``loaded`` by profile."""

    payload: bytes = field(repr=False)
    sources: tuple[BundleSource, ...]
    rules: int
    loaded: tuple[tuple[str, int], ...]
    left_out: tuple[LeftOut, ...]
    left_out_count: int


def read_rules(path: Path) -> RuleFiles:
    """A rule file, an archive (tar, tar.gz, zip), or all of those in a directory, by name.

    Raises WrongInput, RulesError.
    """
    paths = [path]
    if path.is_dir():
        paths = sorted(one for one in path.iterdir() if one.name.endswith(_ENDINGS))
    if not paths or len(paths) > MEMBER_LIMIT:
        raise WrongInput(
            [FieldError(str(path), f"{len(paths)} rule files; 1 to {MEMBER_LIMIT} are read")]
        )
    sources, files = [], []
    left = UNPACKED_LIMIT
    for one in paths:
        data = _read_bounded(one)
        sources.append(BundleSource(name=one.name[-200:], sha256=hashlib.sha256(data).hexdigest()))
        for name, content in read_rule_files(data):
            left -= len(content)
            if left < 0:
                raise RulesError(f"{path} has more than {UNPACKED_LIMIT} bytes", "leave some out")
            files.append((one.name if name == "source.rules" else name, content))
    return RuleFiles(tuple(sources), tuple(files))


_ENDINGS = (".rules", ".tar.gz", ".tgz", ".tar", ".zip")


def _read_bounded(path: Path) -> bytes:
    try:
        with open(path, "rb") as opened:
            data = opened.read(ARCHIVE_LIMIT + 1)
    except OSError as fault:
        raise WrongInput([FieldError(str(path), fault.strerror or str(fault))]) from fault
    if len(data) > ARCHIVE_LIMIT:
        raise RulesError(f"{path} is larger than {ARCHIVE_LIMIT} bytes", "leave some out")
    return data


async def try_rules(
    given: RuleFiles, engine_data: Path, suricata: Path, work: Path, progress: Progress
) -> Tried:
    """Put the rules through the appliance's own pipeline, in ``work``. Raises RulesError, CommandFailed.

    Rules that a source may not have, and those that Suricata refuses, are left out by the appliance in the same way.
    """
    payload = pack_rules(given.files)
    checked = build_source(NAME, read_rule_files(payload))
    if not checked.enabled:
        raise RulesError(
            "there is no rule that is enabled and passes the checks", "see docs/rules.md"
        )
    packed = work / "bundle.tar.gz"
    packed.write_bytes(payload)
    settings = build_trial_settings(work, packed)
    pipeline = RulePipeline(settings, engine_data, None, suricata, trial=True)
    report: UpdateReport = await pipeline.update(progress)
    left_out = [one for profile in report.profiles for one in profile.left_out]
    for profile in report.profiles:
        # What the checks left out was never enabled.
        refused = profile.left_out_count - len(checked.left_out)
        if refused >= len(checked.enabled):
            why = left_out[0].reason if left_out else "it says not why"
            raise RulesError(f"{profile.profile}: none of the rules loads: {why}", "correct them")
    return Tried(
        payload=payload,
        sources=given.sources,
        rules=len(checked.enabled),
        loaded=tuple((str(one.profile), one.loaded) for one in report.profiles),
        left_out=tuple(dict.fromkeys(left_out)),
        left_out_count=max(one.left_out_count for one in report.profiles),
    )


def build_trial_settings(work: Path, packed: Path) -> Settings:
    """Two lanes that nobody runs, so that each profile's ruleset is made."""

    def lane(number: int, profile: str) -> dict[str, object]:
        legs = {
            f"leg{side}": {"interface": f"t{number}{side}", "device": f"t{number}{side}"}
            for side in "AB"
        }
        return {"profile": profile, "vlan": 100 + number, "queues": [number], **legs}

    return Settings.model_validate(
        {
            "stateDir": str(work / "state"),
            "runDir": str(work / "run"),
            "lanes": [lane(0, "prevent"), lane(1, "detect")],
            "rules": {"sources": [{"name": NAME, "url": packed.absolute().as_uri()}]},
        }
    )


def find_rules_partition(disk: Source) -> Partition:
    """Raises Damaged, also where the partition table is not wholly well: nothing is written by it."""
    table = read_table(disk)
    if not table.whole:
        raise Damaged(f"the partition table: {table.faults[0]}", "see `hairpin image verify`")
    found = find_layout(table).rules
    if found is None:
        raise Damaged("there is no partition for rules", "is it an image of Hairpin?")
    return found


@dataclass(frozen=True, slots=True)
class Target:
    """Where a bundle is to be written, and its serial number. ``replaces_other``: a bundle by another key."""

    partition: Partition
    serial: int
    replaces_other: bool


def check_target(
    disk: Source, certificate: Certificate, serial: int | None, now: float, *, other_signer: bool
) -> Target:
    """Whether a bundle of ``certificate``'s key can be put there. ``serial`` None: one is chosen.

    Whom an appliance trusts is in its settings; without a word on it, the certificate in the image, whose key signed
    the root. A bundle by the same key was put there on purpose. Any other takes ``other_signer``.

    Raises WrongInput, ImageError.
    """
    partition = find_rules_partition(disk)
    place = partition.of(disk)
    before = read_before(place, certificate)
    known = before is not None or _has_signed_root(disk, certificate)
    if not known and not other_signer:
        reason = (
            f"{render_name(certificate)} signed neither the image's root nor the rules that are there: "
            "an appliance would not use its bundle"
        )
        mend = (
            "sign with the image's key; or give `--other-signer`, "
            "where the appliance's setting `rules.bundle.certificate` is that certificate"
        )
        raise WrongInput([FieldError("--certificate", reason)], mend)
    least = choose_serial(before, now)
    if serial is not None and before and serial <= before.bundle.header.serial:
        reason = f"the image has {before.bundle.header.serial} already, and it only grows"
        raise WrongInput([FieldError("--serial", reason)])
    return Target(partition, serial or least, _is_of_other(place, certificate))


def _has_signed_root(disk: Source, certificate: Certificate) -> bool:
    roots = find_layout(read_table(disk)).roots
    return any(_is_root_by(disk, one, certificate) for one in roots if not one.empty)


def _is_root_by(disk: Source, root: RootSet, certificate: Certificate) -> bool:
    part = root.signature.of(disk)
    try:
        told = parse_signature(part.read(0, min(part.size, SIGNATURE_LIMIT)))
        return is_signed_with(told.signature, told.root_hash.encode(), certificate)
    except Damaged:
        return False  # nobody can tell whose it is


def _is_of_other(place: Source, certificate: Certificate) -> bool:
    try:
        read_bundle(place, (certificate,))
    except NotTrusted:
        return True
    except ImageError:
        return False
    return False


def choose_serial(before: Read | None, now: float) -> int:
    """The time, or one more than what is there already. Raises ImageError where there is no higher one."""
    serial = max(int(now), 1, before.bundle.header.serial + 1 if before else 0)
    if serial >= SERIAL_LIMIT:
        raise ImageError(f"no serial number is left above {serial - 1}", "sign with another key")
    return serial


def read_before(partition: Source, certificate: Certificate) -> Read | None:
    """What stands there by the same key; None where nothing does, or it is not to be read."""
    with contextlib.suppress(ImageError):
        return read_bundle(partition, (certificate,))
    return None


def sign_bundle(
    tried: Tried, key: PrivateKey, certificate: Certificate, serial: int, now: float
) -> tuple[Header, bytes]:
    """The header, and the bytes of a slot."""
    header = build_header(
        tried.payload,
        serial=serial,
        created=now,
        sources=tried.sources,
        rules=tried.rules,
        key_id=build_key_id(certificate),
    )
    text = header.encode()
    return header, encode_slot(text, sign(key, text), tried.payload)


def write_bundle(
    disk: Writable, partition: Partition, encoded: bytes, certificate: Certificate
) -> Bundle:
    """Write both slots, one after the other, and read them back. Raises ImageError.

    Whenever it is cut off, one slot is whole: the one that is not is written first.
    """
    place = partition.of(disk)
    if len(encoded) > slot_size(place.size):
        raise ImageError(
            f"the bundle is {len(encoded)} bytes, and a copy has {slot_size(place.size)}",
            "leave some rules out",
        )
    for number in sorted(range(SLOTS), key=lambda one: _is_whole(place, one, certificate)):
        _write_slot(disk, partition, number, encoded)
    read = read_bundle(place, (certificate,))
    if read.faults or encoded != find_slot(place, 0).read(0, len(encoded)):
        raise ImageError(
            f"it reads back otherwise: {'; '.join(read.faults) or 'other bytes'}", "check the disk"
        )
    return read.bundle


def _is_whole(place: Part, number: int, certificate: Certificate) -> tuple[bool, int]:
    try:
        found = parse_slot(find_slot(place, number), (certificate,))
    except ImageError:
        return False, 0
    return True, found.header.serial


def _write_slot(disk: Writable, partition: Partition, number: int, encoded: bytes) -> None:
    slot = find_slot(partition.of(disk), number)
    start = partition.offset + number * slot.size
    # The first block last: until then there is no bundle.
    disk.write(start, bytes(BLOCK))
    for at in range(BLOCK, len(encoded), _CHUNK):
        disk.write(start + at, encoded[at : at + _CHUNK])
    for at, size in _find_stale(slot, max(BLOCK, len(encoded))):
        disk.write(start + at, bytes(size))
    disk.write(start, encoded[:BLOCK])
    log.info("rules bundle written", slot=number, size=len(encoded))


def _find_stale(slot: Part, end: int) -> Iterator[tuple[int, int]]:
    """Stretches that an earlier, longer bundle left."""
    for at in range(end, slot.size, _CHUNK):
        size = min(_CHUNK, slot.size - at)
        if find_nonzero(slot, at, size) is not None:
            yield at, size


def read_partition(disk: Source, trusted: Sequence[Certificate], floor: int = 0) -> Read | None:
    """The bundle of an image; None where there is none yet. Raises ImageError."""
    try:
        return read_bundle(find_rules_partition(disk).of(disk), trusted, floor)
    except NoBundle:
        return None
