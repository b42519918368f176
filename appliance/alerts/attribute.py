"""Which VMs, zones and policy an alert belongs to. Pure.

The engine sees no MAC, no VLAN and no port of the switch, so a VM is found by who held the address
when the packet passed, and the policy by asking the same decision that the switch's flows were
compiled from.

Who held an address at the time of the packet (`find_holder`):

1. the VM whose holding covers the time;
2. else the VM that was first seen with it less than `LATE_SECONDS` afterwards, if nobody was
   known to hold it before: a VM's first packets may pass before its ARP or ND was read;
3. else the VM that held it last, if its holding ended less than `LATE_SECONDS` before and no
   other VM has held it until the packet: the end of a holding is when it was noticed;
4. else nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol as Shape

from appliance.alerts.model import Endpoint, Opener, render_time
from steering.decide import Connection, Decision, find_subject
from steering.model import Family, Holding, Inspect, Lane, Machine, PolicySet, Protocol

LATE_SECONDS = 5.0


class Decide(Shape):
    """`steering.decide.decide`: what the policies say of a connection that the source opens."""

    def __call__(
        self,
        policies: PolicySet,
        machines: Sequence[Machine],
        source_vm_id: str,
        destination_vm_id: str,
        connection: Connection,
    ) -> Decision: ...


class Seen(Shape):
    """What of an alert tells whose it is: an `EveAlert`, or a `Sighting` of the quick way."""

    @property
    def at(self) -> float: ...
    @property
    def source_address(self) -> str | None: ...
    @property
    def destination_address(self) -> str | None: ...
    @property
    def source_port(self) -> int | None: ...
    @property
    def destination_port(self) -> int | None: ...
    @property
    def protocol(self) -> str: ...
    @property
    def family(self) -> Family | None: ...
    @property
    def opener(self) -> Opener | None: ...


@dataclass(frozen=True, slots=True)
class Context:
    """What was known when the alert was raised.

    ``revision`` is the number of the policies in ``policies``; ``holdings`` are by address, each
    address's oldest first.
    """

    machines: tuple[Machine, ...]
    policies: PolicySet
    revision: int | None
    lane: Lane
    holdings: Mapping[str, Sequence[Holding]]


@dataclass(frozen=True, slots=True)
class Attributed:
    """``reasons`` tell, in sentences, what could not be told and what was told by a tolerance."""

    source: Endpoint
    destination: Endpoint
    opener: Opener | None
    policy: str | None
    revision: int | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Holder:
    """``vm_id`` is None where nobody held the address; ``reason`` is empty for a plain answer."""

    vm_id: str | None
    reason: str = ""


def attribute(alert: Seen, context: Context, decide: Decide) -> Attributed:
    """The VMs at both ends of ``alert`` and the policy that sent it through the lane."""
    source, source_reasons = _find_endpoint(
        alert.source_address, alert.source_port, alert.at, context
    )
    destination, destination_reasons = _find_endpoint(
        alert.destination_address, alert.destination_port, alert.at, context
    )
    opener, policy, policy_reason = _find_policy(alert, source, destination, context, decide)
    return Attributed(
        source=source,
        destination=destination,
        opener=opener,
        policy=policy,
        revision=context.revision if policy is not None else None,
        reasons=(
            *source_reasons,
            *destination_reasons,
            *([policy_reason] if policy_reason else ()),
        ),
    )


def leave_unattributed(alert: Seen, reason: str) -> Attributed:
    """What is stored of an alert that could not be attributed at all."""
    return Attributed(
        source=Endpoint(alert.source_address, alert.source_port),
        destination=Endpoint(alert.destination_address, alert.destination_port),
        opener=alert.opener,
        policy=None,
        revision=None,
        reasons=(reason,),
    )


def find_holder(address: str, holdings: Sequence[Holding], at: float) -> Holder:
    """Who held ``address`` at ``at``, by the rules above; ``holdings`` are the address's own."""
    ordered = sorted(holdings, key=lambda holding: holding.since)
    holding_then = {
        holding.vm_id
        for holding in ordered
        if holding.since <= at and (holding.until is None or at < holding.until)
    }
    if len(holding_then) == 1:
        return Holder(holding_then.pop())
    if holding_then:
        both = ", ".join(sorted(holding_then))
        return Holder(None, f"{address} was held by several VMs at once: {both}")
    earlier = [holding for holding in ordered if holding.since <= at]
    later = [holding for holding in ordered if holding.since > at]
    if earlier:
        last = max(earlier, key=lambda holding: holding.until or 0.0)
        gap = at - (last.until or 0.0)
        if gap < LATE_SECONDS:
            return Holder(last.vm_id, f"{address}: its VM had just gone ({gap:.1f} s before)")
    elif later and later[0].since - at < LATE_SECONDS:
        gap = later[0].since - at
        return Holder(later[0].vm_id, f"{address} was first seen {gap:.1f} s after the packet")
    return Holder(None, f"no VM was known to hold {address} at {render_time(at)}")


def _find_endpoint(
    address: str | None, port: int | None, at: float, context: Context
) -> tuple[Endpoint, tuple[str, ...]]:
    if address is None:
        return Endpoint(None, port), ("the event names no address",)
    holder = find_holder(address, context.holdings.get(address, ()), at)
    reasons = (holder.reason,) if holder.reason else ()
    if holder.vm_id is None:
        return Endpoint(address, port), reasons
    subject = find_subject(context.policies, context.machines, holder.vm_id)
    return Endpoint(address, port, subject.vm_id, subject.name, subject.zones), reasons


def _find_policy(
    alert: Seen, source: Endpoint, destination: Endpoint, context: Context, decide: Decide
) -> tuple[Opener | None, str | None, str]:
    if alert.family is None or source.vm_id is None or destination.vm_id is None:
        return alert.opener, None, "no policy is named because both VMs are not known"
    # The engine's opener first. It is wrong for a flow picked up in its middle (after a restart),
    # so the other way counts when only that way leads into this lane.
    first = alert.opener or Opener.SOURCE
    second = Opener.DESTINATION if first is Opener.SOURCE else Opener.SOURCE
    for opener in (first, second):
        ends = (source, destination) if opener is Opener.SOURCE else (destination, source)
        name = _decide_policy(alert, ends, context, decide)
        if name is not None:
            turned = opener is not first and alert.opener is not None
            reason = "the engine took the connection's answering end for its opener"
            return opener, name, reason if turned else ""
    lane = context.lane.name
    return (
        alert.opener,
        None,
        f"no policy of revision {context.revision} sends this connection to lane {lane}",
    )


def _decide_policy(
    alert: Seen, ends: tuple[Endpoint, Endpoint], context: Context, decide: Decide
) -> str | None:
    opening, answering = ends
    if alert.family is None or opening.vm_id is None or answering.vm_id is None:
        return None
    decision = decide(
        context.policies,
        context.machines,
        opening.vm_id,
        answering.vm_id,
        Connection(
            family=alert.family,
            protocol=_find_protocol(alert.protocol),
            destination_port=answering.port,
            source_port=opening.port,
        ),
    )
    action = decision.action
    if not isinstance(action, Inspect) or action.profile != context.lane.profile:
        return None
    return None if decision.policy is None else decision.policy.name


def _find_protocol(name: str) -> Protocol:
    try:
        return Protocol(name)
    except ValueError:
        return Protocol.ANY
