"""Whose is an address that the switch learned, and who contests it: told as events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from steering.contests import Claims, record_claim
from steering.events import AddressContested, AddressSeen, SteeringEvent
from steering.model import PolicySet, Port
from steering.switch.openflow import LearnedAddress

OWNERLESS_KEPT = 10_000


class AddressTeller:
    """``clock`` gives seconds since the epoch."""

    def __init__(
        self, on_event: Callable[[SteeringEvent], None], clock: Callable[[], float]
    ) -> None:
        self._on_event = on_event
        self._clock = clock
        self._claims = Claims()
        self._ownerless: dict[tuple[int, str], tuple[float, LearnedAddress]] = {}

    def take(self, learned: LearnedAddress, ports: Sequence[Port], policies: PolicySet) -> None:
        """An address was learned while these ports were there and these policies in force."""
        self._tell(self._clock(), learned, ports, policies)

    def follow(self, ports: Sequence[Port], policies: PolicySet) -> None:
        """The ports are other ones: some may own what nobody owned."""
        waiting, self._ownerless = self._ownerless, {}
        for now, learned in waiting.values():
            self._tell(now, learned, ports, policies)

    def _tell(
        self, now: float, learned: LearnedAddress, ports: Sequence[Port], policies: PolicySet
    ) -> None:
        owner = {port.ofport: port.vm_id for port in ports}.get(learned.ofport)
        if owner is None:
            # The switch told of the address before OVSDB told of the port: kept until it does.
            if len(self._ownerless) < OWNERLESS_KEPT:
                self._ownerless[learned.ofport, learned.address] = (now, learned)
            return
        at = now - learned.idle
        self._on_event(AddressSeen(at, learned.address, owner, learned.claimed))
        if not learned.claimed:
            return
        present = {port.vm_id for port in ports}
        self._claims, holder = record_claim(
            self._claims, learned.address, owner, present, time.monotonic()
        )
        shared = {one.vm_id for one in policies.machines if learned.address in one.addresses}
        if holder is not None and not {holder, owner} <= shared:
            self._on_event(AddressContested(at, learned.address, holder, owner))
