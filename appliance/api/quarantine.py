"""Documents about quarantines."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from appliance.api.documents import ApiDocument, Count
from steering.fields import REASON_PATTERN

LONGEST_SECONDS = 366 * 86_400


class QuarantineOrder(ApiDocument):
    """Shut a VM off."""

    vm: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,252}$", description="Its name or vm-id."
    )
    seconds: int | None = Field(
        default=None, ge=1, le=LONGEST_SECONDS, description="Null: until it is ended."
    )
    reason: str = Field(default="", max_length=200, pattern=REASON_PATTERN)


class QuarantinedVm(ApiDocument):
    """A VM that is shut off: nothing that it sends passes, and nothing that is for it alone."""

    vm_id: str
    vm: str
    since: datetime
    until: datetime | None = Field(description="Null: until it is ended.")
    reason: str
    on_switch: bool = Field(description="Is any of its ports on the switch?")
    dropped_packets: Count = Field(description="From and to it, since its flows stand.")
    dropped_bytes: Count


class QuarantineList(ApiDocument):
    """Those in force, the oldest first."""

    items: tuple[QuarantinedVm, ...]


class QuarantineReport(ApiDocument):
    """What was begun or ended. ``seconds``: until the switch had taken it."""

    quarantine: QuarantinedVm
    seconds: float = Field(ge=0)
