"""Documents about shunned flows."""

from __future__ import annotations

from pydantic import Field

from appliance.api.documents import ApiDocument, Count


class ShunnedFlow(ApiDocument):
    """One direction of a flow that the engine blocked and the switch now drops."""

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    flow: str = Field(description="As Open vSwitch matches it.")
    policy: str | None = Field(description="Null: a policy that is no longer in force.")
    seconds_left: float = Field(ge=0)
    dropped_packets: Count
    dropped_bytes: Count


class ShunList(ApiDocument):
    """Those on the switch; ``refused``: flows that were not shunned because there were too many."""

    items: tuple[ShunnedFlow, ...]
    limit: Count
    refused: Count


class ShunReport(ApiDocument):
    """How many were removed."""

    removed: Count
