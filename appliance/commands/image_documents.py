"""What the commands of `hairpin image` print as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from pydantic import Field

from appliance.api.documents import ApiDocument


class ImageFinding(ApiDocument):
    place: str
    status: Literal["ok", "changed", "unsigned", "unexpected", "missing", "state", "older"]
    detail: str = ""
    signer: str = ""


class ImageReport(ApiDocument):
    """What `hairpin image verify --json` prints. ``good``: everything that was compared is as it was signed.

    ``serials``: of the rules bundles, copy by copy. ``not_compared``: in sentences, what ``good`` says nothing of.
    """

    good: bool
    versions: tuple[str, ...]
    serials: tuple[int, ...]
    findings: tuple[ImageFinding, ...]
    not_compared: tuple[str, ...]


class BundleSourceReport(ApiDocument):
    name: str
    sha256: str


class BundleReport(ApiDocument):
    """What `image rules` and `image refresh` print. ``serial`` 0: there is no bundle."""

    serial: int = 0
    created: datetime | None = None
    age_days: float | None = None
    rules: int = 0
    size: int = 0
    signer: str = ""
    sources: tuple[BundleSourceReport, ...] = ()
    faults: tuple[str, ...] = ()
    loaded: Mapping[str, int] = Field(default_factory=dict)
    left_out: int = 0


class SignReport(ApiDocument):
    """What `image sign` prints."""

    manifest: str
    version: str
    files: int


class ReleaseReport(ApiDocument):
    """What `image extract` and `image update` print."""

    version: str
    root_hash: str
    signer: str
    files: tuple[str, ...] = ()
    written: bool = False


class BootVersionReport(ApiDocument):
    """``left``: tries that the boot loader counts; none once it was found good."""

    version: str
    running: bool
    state: str
    left: int | None = None
    done: int = 0
    failed: bool = False
    lacking: tuple[str, ...] = ()


class BootVersionList(ApiDocument):
    """What `image boots` prints."""

    items: tuple[BootVersionReport, ...]


class BootReport(ApiDocument):
    """What `image check` prints. ``trial``: the boot loader still counts the tries of this version."""

    passed: bool
    trial: bool
    lacking: tuple[str, ...] = ()
