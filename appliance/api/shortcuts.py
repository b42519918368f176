"""Documents about shortcuts: connections that the switch passes by itself, uninspected."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from appliance.api.documents import Address, ApiDocument, Count, PortNumber, VmName
from steering.model import Family, Trigger

ShortcutId = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


class ShortcutEnd(ApiDocument):
    """One end. ``packets`` and ``bytes``: sent by it since the switch passes the connection by itself."""

    vm: VmName | None = Field(description="Null: no VM on the switch has that port.")
    address: Address
    port: PortNumber
    packets: Count
    bytes: Count


class ShortcutConnection(ApiDocument):
    """A TCP connection that takes a shortcut: what it carries now is not inspected."""

    id: ShortcutId
    policy: str | None = Field(description="Null: a policy that is no longer in force.")
    reason: Trigger | None = Field(description="What it was let go after; null as `policy`.")
    family: Family
    source: ShortcutEnd = Field(description="Who opened it, as far as the policy tells.")
    destination: ShortcutEnd
    age_seconds: float = Field(ge=0, description="Since it takes the shortcut.")
    idle_seconds: float = Field(ge=0)
    packets: Count = Field(
        description="Both ways; the first few of them may have been inspected still."
    )
    bytes: Count


class ShortcutAccount(ApiDocument):
    """What went uninspected by shortcuts of one policy, for one reason, since Hairpin was installed."""

    policy: str
    reason: Trigger
    limit: Count | None = Field(
        description="Connections at a time; null: the policy does not allow this any more."
    )
    return_on_alert: bool | None = None
    open: Count = Field(description="Connections that take a shortcut now.")
    connections: Count = Field(description="Connections that ever took one.")
    returned: Count = Field(description="Of these, sent back to inspection.")
    packets: Count = Field(description="Delivered uninspected.")
    bytes: Count


class ShortcutList(ApiDocument):
    """Those on the switch, the oldest first, and what went uninspected by policy and reason."""

    items: tuple[ShortcutConnection, ...] = ()
    accounts: tuple[ShortcutAccount, ...] = ()
    next: str | None = None


class ShortcutReport(ApiDocument):
    """How many connections are inspected again, of those that a look found before: on a switch that answers

    slowly, of those that are a second old. ``seconds``: until the switch had taken it, the look included.
    """

    returned: Count
    seconds: float = Field(ge=0)
