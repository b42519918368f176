"""The signed rules bundle of the appliance's own disk, as a source of rules.

Its copy is kept as it was signed, and its signature is checked again whenever the copy is used: what stands
in /var is nobody's word. A bundle that is damaged, of somebody else or older than one that was there before is not
used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.x509 import Certificate
from pydantic import TypeAdapter, ValidationError

from appliance.image.bundle import (
    Bundle,
    NoBundle,
    find_slot,
    measure_slot,
    parse_slot,
    read_bundle,
)
from appliance.image.disk import RawDisk
from appliance.image.model import Bytes, ImageError, Source
from appliance.image.signing import read_certificates
from appliance.rules.archive import ARCHIVE_LIMIT, read_rule_files
from appliance.rules.check import SourceRules, build_source
from appliance.rules.files import read_bounded, read_note, write_file, write_note
from appliance.rules.model import BUNDLE, RulesError, SourceReport
from appliance.settings import RulesBundle
from steering.errors import HairpinError

_SLOT_LIMIT = ARCHIVE_LIMIT + 2**20


@dataclass(frozen=True, slots=True)
class _Seen:
    """The newest bundle that was used: none older is."""

    serial: int


_SEEN = TypeAdapter(_Seen)


@contextlib.contextmanager
def open_device(path: Path) -> Iterator[Source]:
    """A partition, read only. Raises ImageError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as fault:
        raise ImageError(f"{path}: {fault.strerror}", "check rules.bundle.device") from fault
    try:
        yield RawDisk(handle, path)
    finally:
        os.close(handle)


class BundleReader:
    """Reads the bundle for the pipeline. ``root`` is where sources keep their copies."""

    def __init__(self, settings: RulesBundle, root: Path) -> None:
        self._settings = settings
        self._directory = root / "hairpin-bundle"

    def read(self) -> tuple[SourceRules, SourceReport]:
        """The rules to use, and what became of the bundle; no rules and a fault where there are none to trust.

        A partition on which nothing was ever written is no fault. Raises nothing on purpose.
        """
        url = self._settings.device.as_uri()
        try:
            bundle, encoded, faults = self._read_device()
        except NoBundle:
            floor = self._find_floor()
            told = f"the rules bundle is gone from its partition, and serial {floor} at least is wanted"
            return self._read_copy(told if floor else "")
        except HairpinError as fault:
            return self._read_copy(f"the rules bundle is not used: {fault.reason}")
        try:
            rules = self._parse(bundle)
            self._keep(bundle, encoded)
        except (RulesError, OSError) as fault:
            return self._read_copy(f"the rules bundle is not used: {fault}")
        return rules, self._report(url, rules, bundle, "; ".join(faults), stale=bool(faults))

    def _read_device(self) -> tuple[Bundle, bytes, tuple[str, ...]]:
        trusted = read_certificates(self._settings.certificate)
        floor = max(self._find_floor(), self._find_kept_serial(trusted))
        with open_device(self._settings.device) as partition:
            read = read_bundle(partition, trusted, floor)
            for number in range(2):
                with contextlib.suppress(ImageError):
                    slot = find_slot(partition, number)
                    if parse_slot(slot, trusted).header == read.bundle.header:
                        return (
                            read.bundle,
                            slot.read(0, measure_slot(read.bundle, slot)),
                            read.faults,
                        )
        raise ImageError("it changed while it was read")

    def _parse(self, bundle: Bundle) -> SourceRules:
        rules = build_source(BUNDLE, read_rule_files(bundle.payload))
        if not rules.enabled:
            raise RulesError("the bundle has no rules that may be used")
        return rules

    def _read_copy(self, fault: str) -> tuple[SourceRules, SourceReport]:
        """The copy of the last bundle, its signature checked anew; else nothing."""
        url = self._settings.device.as_uri()
        try:
            encoded = read_bounded(self._directory / "bundle", _SLOT_LIMIT)
            trusted = read_certificates(self._settings.certificate)
            bundle = parse_slot(Bytes(encoded), trusted)
            if bundle.header.serial < (floor := self._find_floor()):
                raise RulesError(f"serial {bundle.header.serial} is older than {floor}")
            rules = self._parse(bundle)
        except FileNotFoundError:
            empty = SourceRules(BUNDLE, (), (), {}, ())
            return empty, SourceReport(
                BUNDLE, url, "", 0.0, rules=0, stale=bool(fault), fault=fault
            )
        except (HairpinError, OSError) as worse:
            why = worse.reason if isinstance(worse, HairpinError) else str(worse)
            told = "; ".join(one for one in (fault, f"its copy is not used: {why}") if one)
            empty = SourceRules(BUNDLE, (), (), {}, ())
            return empty, SourceReport(BUNDLE, url, "", 0.0, rules=0, stale=True, fault=told)
        fault = fault or "the rules bundle is gone from its partition"
        return rules, self._report(url, rules, bundle, fault, stale=True)

    def _report(
        self, url: str, rules: SourceRules, bundle: Bundle, fault: str, *, stale: bool
    ) -> SourceReport:
        header = bundle.header
        return SourceReport(
            name=BUNDLE,
            url=url,
            sha256=header.payload_sha256,
            fetched=header.created.timestamp(),
            rules=len(rules.enabled),
            stale=stale,
            fault=fault,
        )

    def _keep(self, bundle: Bundle, encoded: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        write_file(self._directory / "bundle", encoded)
        write_note(self._directory / "seen.json", _SEEN.dump_json(_Seen(bundle.header.serial)))

    def _find_floor(self) -> int:
        return max(self._settings.floor, self._read_seen())

    def _find_kept_serial(self, trusted: Sequence[Certificate]) -> int:
        """Of the copy, which is signed: the note of what was seen is nobody's word, and may be lost."""
        with contextlib.suppress(HairpinError, OSError):
            encoded = read_bounded(self._directory / "bundle", _SLOT_LIMIT)
            return parse_slot(Bytes(encoded), trusted).header.serial
        return 0

    def _read_seen(self) -> int:
        try:
            return _SEEN.validate_json(read_note(self._directory / "seen.json", 4096)).serial
        except (OSError, RulesError, ValidationError):
            return 0
