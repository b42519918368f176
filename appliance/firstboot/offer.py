"""What an appliance is offered at a boot, put together to one document, and what was accepted before. Pure.

A seed is one document: the credential `hairpin.seed`, or the mapping `hairpin` in the `user-data` of a NoCloud
disk. A few values may come as credentials of their own, so that keys need not stand beside the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from appliance.firstboot.document import PEM_LIMIT
from appliance.firstboot.faults import Fault, show_key
from steering.documents import Decoded, parse_text
from steering.errors import WrongInput

SEED_LIMIT = 512 * 1024
"""Bytes of a seed: eight receivers with three PEM texts each are a tenth of it."""
SEED_CREDENTIAL = "hairpin.seed"
SINGLES: Mapping[str, tuple[str, ...]] = {
    "hairpin.name": ("name",),
    "hairpin.token": ("api", "token"),
    "hairpin.api-key": ("api", "key"),
    "hairpin.switch-key": ("switch", "key"),
}
"""Credentials that hold one value of the seed each, and where it stands there."""
PREFIX = "hairpin."
META_KEYS = ("instance-id", "local-hostname")
NOT_READ = ("network-config", "vendor-data")

Origin = Literal["new", "same", "kept"]


@dataclass(frozen=True, slots=True)
class Offered:
    """What the doors found: credentials by name, the files of a NoCloud disk (None: there is none), faults."""

    credentials: Mapping[str, bytes]
    disk: Mapping[str, bytes] | None = None
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class Offer:
    """The document as it was offered (None: none was), and single values by their credential's name."""

    document: Mapping[str, object] | None
    singles: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Of what is offered, however it was written."""
        whole = {"document": self.document, "singles": dict(self.singles)}
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Kept:
    """What was accepted last, as `/var` has it. ``accepted_at`` in seconds since the epoch."""

    document: dict[str, Any]
    singles: dict[str, str]
    digest: str
    accepted_at: float
    version: str

    @property
    def offer(self) -> Offer:
        return Offer(self.document, self.singles)


_KEPT = TypeAdapter(Kept)


@dataclass(frozen=True, slots=True)
class Choice:
    """``origin``: `new` was never accepted yet, `same` is what was, `kept` is what was and is not offered now."""

    offer: Offer
    origin: Origin


def read_offer(offered: Offered) -> tuple[Offer, tuple[Fault, ...]]:
    """What is offered, decoded. With faults nothing of it may be used."""
    faults = list(offered.faults)
    singles: dict[str, str] = {}
    for name, data in offered.credentials.items():
        if name in SINGLES:
            singles[name] = _decode_single(name, data, faults)
        elif name != SEED_CREDENTIAL:
            known = ", ".join((SEED_CREDENTIAL, *SINGLES))
            faults.append(Fault(f"credential {name[:31]}", "unknown", f"known are: {known}"))
    document: Mapping[str, object] | None = None
    if SEED_CREDENTIAL in offered.credentials:
        document = _decode(
            f"credential {SEED_CREDENTIAL}", offered.credentials[SEED_CREDENTIAL], faults
        )
        if document is not None and set(document) == {"hairpin"}:
            document = _unwrap(f"credential {SEED_CREDENTIAL}", document, faults)
        if offered.disk is not None:
            reason = "there are two seeds: this one and a NoCloud disk"
            faults.append(Fault(f"credential {SEED_CREDENTIAL}", reason, "take one of them away"))
    elif offered.disk is not None:
        document = _read_disk(offered.disk, faults, named="hairpin.name" in singles)
    for name in singles:
        if document is not None and _find_value(document, SINGLES[name]) is not None:
            place = ".".join(SINGLES[name])
            reason = f"`{place}` stands in the seed, too"
            faults.append(Fault(f"credential {name}", reason, "leave one of them"))
    return Offer(document, singles), tuple(faults)


def choose(offer: Offer, kept: Kept | None) -> Choice | None:
    """Which seed holds at this boot; None: there is none at all.

    A document that is offered holds with the single values that are offered beside it. Where none is, what
    was accepted is kept, and single values that are offered replace those.
    """
    if offer.document is None:
        if kept is None:
            return None
        offer = Offer(kept.document, {**kept.singles, **offer.singles})
        return Choice(offer, "kept" if offer.digest == kept.digest else "new")
    return Choice(offer, "same" if kept is not None and offer.digest == kept.digest else "new")


def build_mapping(offer: Offer) -> Mapping[str, object]:
    """The whole seed: the document with the single values at their places."""
    whole = _copy(offer.document or {})
    for name, value in offer.singles.items():
        *way, last = SINGLES[name]
        at = whole
        for key in way:
            inner = at.setdefault(key, Decoded())
            if not isinstance(inner, dict):
                break  # no mapping: told as a fault of the document
            at = inner
        else:
            at[last] = value
    return whole


def build_kept(offer: Offer, now: float, version: str) -> Kept:
    return Kept(dict(offer.document or {}), dict(offer.singles), offer.digest, now, version)


def render_kept(kept: Kept) -> str:
    return _KEPT.dump_json(kept).decode() + "\n"


def parse_kept(data: bytes) -> Kept:
    """Raises ValueError for what is damaged: its content must be what its digest says."""
    try:
        kept = _KEPT.validate_json(data)
        whole = kept.offer.digest == kept.digest
    except (ValidationError, ValueError, RecursionError) as fault:
        raise ValueError("it can't be read") from fault
    if not whole:
        raise ValueError("its content is not what its digest says")
    return kept


def _copy(mapping: Mapping[str, object]) -> dict[str, object]:
    """Mappings anew, all the way down; keys that stood twice are still known to have."""
    fresh = Decoded(
        {key: _copy(one) if isinstance(one, Mapping) else one for key, one in mapping.items()}
    )
    fresh.duplicates = getattr(mapping, "duplicates", ())
    return fresh


def _find_value(document: Mapping[str, object], way: tuple[str, ...]) -> object | None:
    value: object = document
    for key in way:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _decode_text(path: str, data: bytes, limit: int, faults: list[Fault]) -> str:
    if len(data) > limit:
        faults.append(Fault(path, f"more than {limit} bytes", "give a shorter one"))
        return ""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        faults.append(Fault(path, "not UTF-8", "write it as plain text, not compressed"))
        return ""
    return text


def _decode_single(name: str, data: bytes, faults: list[Fault]) -> str:
    text = _decode_text(f"credential {name}", data, PEM_LIMIT, faults)
    return text if "-----BEGIN" in text else text.strip()


def _decode(path: str, data: bytes, faults: list[Fault]) -> Mapping[str, object] | None:
    """One mapping of YAML or JSON; None after naming what is wrong."""
    before = len(faults)
    text = _decode_text(path, data, SEED_LIMIT, faults)
    if len(faults) > before:
        return None
    try:
        documents = parse_text(text)
    except WrongInput as wrong:
        faults += [
            Fault(f"{path}, {one.path}", one.reason, "see docs/first-boot.md")
            for one in wrong.faults
        ]
        return None
    if len(documents) != 1 or not isinstance(documents[0], Mapping):
        found = f"{len(documents)} documents" if len(documents) != 1 else "no mapping"
        faults.append(Fault(path, f"{found}, where one mapping must be", "see docs/first-boot.md"))
        return None
    return documents[0]


def _read_disk(
    files: Mapping[str, bytes], faults: list[Fault], *, named: bool
) -> Mapping[str, object] | None:
    """``named``: the appliance has a name already, so that the one in `meta-data` is not asked for."""
    for name in NOT_READ:
        if files.get(name, b"").strip():
            mend = "give `management` in the seed, and leave this file out or empty"
            faults.append(Fault(f"disk CIDATA, {name}", "is not read by this appliance", mend))
    if "user-data" not in files:
        mend = "write the seed into it, under the key `hairpin`"
        faults.append(Fault("disk CIDATA, user-data", "there is no such file", mend))
        return None
    meta = _read_meta(files.get("meta-data", b""), faults)
    data = _decode("disk CIDATA, user-data", files["user-data"], faults)
    if data is None:
        return None
    for key in [*data, *getattr(data, "duplicates", ())]:
        if key != "hairpin":
            mend = "leave it out: no cloud-init runs here, only `hairpin` is read"
            faults.append(Fault(f"disk CIDATA, user-data, {show_key(key)}", "is not done", mend))
    seed = _unwrap("disk CIDATA, user-data", data, faults)
    if seed is None:
        return None
    if "name" not in seed and not named and "local-hostname" in meta:
        with_name = _copy(seed)
        with_name["name"] = meta["local-hostname"]
        return with_name
    return seed


def _unwrap(
    path: str, data: Mapping[str, object], faults: list[Fault]
) -> Mapping[str, object] | None:
    """The seed under the key `hairpin`: one file does as a credential and as a disk's `user-data`."""
    if getattr(data, "duplicates", ()):
        faults.append(Fault(path, "a key stands twice", "leave one of them"))
    seed = data.get("hairpin")
    if isinstance(seed, Mapping):
        return seed
    mend = "write the seed under the key `hairpin` (docs/first-boot.md)"
    faults.append(Fault(f"{path}, hairpin", "must be a mapping", mend))
    return None


def _read_meta(data: bytes, faults: list[Fault]) -> Mapping[str, object]:
    if not data.strip():
        return {}
    meta = _decode("disk CIDATA, meta-data", data, faults)
    for key in getattr(meta, "duplicates", ()):
        where = f"disk CIDATA, meta-data, {show_key(key)}"
        faults.append(Fault(where, "stands here more than once", "leave one"))
    for key in meta or ():
        if key not in META_KEYS:
            mend = f"leave it out; known are: {', '.join(META_KEYS)}"
            faults.append(Fault(f"disk CIDATA, meta-data, {show_key(key)}", "is not done", mend))
    return meta or {}
