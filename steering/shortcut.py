"""The shortcut: the engine tells the switch to pass the rest of one connection by itself. Pure.

A policy's trigger goes into the lane in the priority bits (PCP) of the lane's tag. What the engine lets go
for just that trigger comes back by the lane's third leg, and the switch learns the connection from it.
"""

from __future__ import annotations

from steering.model import Trigger

PRIORITY_CODES = {
    Trigger.RULE: 1,
    Trigger.TLS_HANDSHAKE: 2,
    Trigger.ONE_MEGABYTE: 3,
    Trigger.TEN_MEGABYTES: 4,
    Trigger.HUNDRED_MEGABYTES: 5,
}
"""Trigger -> PCP of the tag (IEEE 802.1Q); 0 is a policy without a shortcut, BFD and canaries."""
