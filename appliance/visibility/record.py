"""One flow record: the shape of every line of the flow spool, declared here and nowhere else.

A record is bounded and safe to show: names that came out of packets are printable and short.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steering.errors import FieldError, WrongInput
from steering.model import Family

LINE_LIMIT = 4096
NAME_LIMIT = 80

# The keywords of IANA's "Assigned Internet Protocol Numbers" that a VM is likely to speak.
PROTOCOL_NAMES = {
    1: "icmp",
    2: "igmp",
    4: "ipv4",
    6: "tcp",
    17: "udp",
    41: "ipv6",
    47: "gre",
    50: "esp",
    51: "ah",
    58: "ipv6-icmp",
    89: "ospf",
    103: "pim",
    112: "vrrp",
    115: "l2tp",
    132: "sctp",
}

Counter = Annotated[int, Field(ge=0, lt=2**63)]
PortNumber = Annotated[int, Field(ge=0, le=65535)]
Mac = Annotated[str, Field(pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}$")]
Name = Annotated[str, Field(max_length=NAME_LIMIT)]
Epoch = Annotated[float, Field(ge=0, le=2**40, allow_inf_nan=False)]


class FlowRecord(BaseModel):
    """A flow between two addresses, both ways. Times are seconds since the epoch.

    ``src`` is who sent the first packet that was seen, ``bytes`` are whole frames. A flow that
    outlives the active timeout is told in pieces: each but the last has the reason ``active``.
    ``vlan`` 0 is untagged; ports are 0 where the protocol has none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first_seen: Epoch
    last_seen: Epoch
    family: Family
    protocol_number: Annotated[int, Field(ge=0, le=255)]
    protocol: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,16}$")]
    src_address: Annotated[str, Field(max_length=45)]
    src_port: PortNumber
    src_mac: Mac
    dst_address: Annotated[str, Field(max_length=45)]
    dst_port: PortNumber
    dst_mac: Mac
    vlan: Annotated[int, Field(ge=0, le=4095)]
    application: Name
    application_category: Name
    application_guessed: bool
    requested_server_name: Name
    src_packets: Counter
    src_bytes: Counter
    dst_packets: Counter
    dst_bytes: Counter
    reason: Literal["idle", "active"]

    @model_validator(mode="after")
    def _addresses_fit_the_family(self) -> FlowRecord:
        for name in ("src_address", "dst_address"):
            address = ipaddress.ip_address(getattr(self, name))
            if (address.version == 4) != (self.family is Family.IPV4):
                raise ValueError(f"{name}: {address} is not of family {self.family}")
        return self

    @property
    def packets(self) -> int:
        return self.src_packets + self.dst_packets

    @property
    def bytes(self) -> int:
        return self.src_bytes + self.dst_bytes


class MeteredFlow(Protocol):
    """What is read of nfstream's ``NFlow``."""

    src_ip: str
    src_mac: str
    src_port: int
    dst_ip: str
    dst_mac: str
    dst_port: int
    protocol: int
    ip_version: int
    vlan_id: int
    expiration_id: int
    bidirectional_first_seen_ms: int
    bidirectional_last_seen_ms: int
    src2dst_packets: int
    src2dst_bytes: int
    dst2src_packets: int
    dst2src_bytes: int
    application_name: str
    application_category_name: str
    application_is_guessed: int
    requested_server_name: str


def build_name(text: str | None, limit: int = NAME_LIMIT) -> str:
    """Text that came out of a packet, bounded and printable; what isn't becomes ``?``."""
    return "".join(sign if sign.isprintable() else "?" for sign in (text or "")[:limit])


def build_record(flow: MeteredFlow) -> FlowRecord:
    """A record of what nfstream metered; its milliseconds become seconds."""
    return FlowRecord(
        first_seen=flow.bidirectional_first_seen_ms / 1000,
        last_seen=flow.bidirectional_last_seen_ms / 1000,
        family=Family.IPV4 if flow.ip_version == 4 else Family.IPV6,
        protocol_number=flow.protocol,
        protocol=PROTOCOL_NAMES.get(flow.protocol, str(flow.protocol)),
        src_address=str(ipaddress.ip_address(flow.src_ip)),
        src_port=flow.src_port,
        src_mac=flow.src_mac.lower(),
        dst_address=str(ipaddress.ip_address(flow.dst_ip)),
        dst_port=flow.dst_port,
        dst_mac=flow.dst_mac.lower(),
        vlan=flow.vlan_id,
        application=build_name(flow.application_name) or "Unknown",
        application_category=build_name(flow.application_category_name) or "Unspecified",
        application_guessed=bool(flow.application_is_guessed),
        requested_server_name=build_name(flow.requested_server_name),
        src_packets=flow.src2dst_packets,
        src_bytes=flow.src2dst_bytes,
        dst_packets=flow.dst2src_packets,
        dst_bytes=flow.dst2src_bytes,
        reason="active" if flow.expiration_id == 1 else "idle",
    )


def build_flipped(record: FlowRecord) -> FlowRecord:
    """The same flow told from its other end."""
    return record.model_copy(
        update={
            "src_address": record.dst_address,
            "src_port": record.dst_port,
            "src_mac": record.dst_mac,
            "src_packets": record.dst_packets,
            "src_bytes": record.dst_bytes,
            "dst_address": record.src_address,
            "dst_port": record.src_port,
            "dst_mac": record.src_mac,
            "dst_packets": record.src_packets,
            "dst_bytes": record.src_bytes,
        }
    )


def render_record(record: FlowRecord) -> bytes:
    """One line of the spool, with its newline."""
    return record.model_dump_json().encode() + b"\n"


def parse_record(line: bytes) -> FlowRecord:
    """A record from one line of the spool. Raises WrongInput; never reads more than LINE_LIMIT."""
    if len(line) > LINE_LIMIT:
        raise WrongInput([FieldError("(line)", f"longer than {LINE_LIMIT} bytes")])
    try:
        return FlowRecord.model_validate_json(line)
    except ValidationError as fault:
        raise WrongInput(
            [
                FieldError(".".join(map(str, error["loc"])) or "(line)", error["msg"])
                for error in fault.errors(include_input=False, include_url=False)
            ]
        ) from fault
