"""What steering has to tell: frozen values, handed to whoever keeps them. Times: seconds since the epoch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AddressSeen:
    """A VM claimed an address by ARP or ND; not ``claimed``: it was only seen to send from it."""

    at: float
    address: str
    vm_id: str
    claimed: bool = True


@dataclass(frozen=True, slots=True)
class AddressContested:
    """A VM claimed, by ARP or ND, an address that another claimed before and is still there to hold.

    ``holder`` and ``claimant`` are vm-ids; told once in ten minutes for each two and address.
    """

    at: float
    address: str
    holder: str
    claimant: str


@dataclass(frozen=True, slots=True)
class DriftMended:
    """The switch did not have what it was given, and has it again. ``seconds`` the mending took."""

    at: float
    added: int
    modified: int
    deleted: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PortsChanged:
    """VM ports came, went or moved, and the flows followed. Interface names, sorted."""

    at: float
    appeared: tuple[str, ...]
    vanished: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class LaneChanged:
    """BFD through the lane's engine came up or went down."""

    at: float
    lane: str
    forwarding: bool


@dataclass(frozen=True, slots=True)
class SwitchChanged:
    """The switch was lost or is back. ``reason`` says why it was lost."""

    at: float
    reachable: bool
    reason: str = ""


SteeringEvent = (
    AddressSeen | AddressContested | DriftMended | PortsChanged | LaneChanged | SwitchChanged
)
