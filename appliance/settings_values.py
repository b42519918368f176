"""What several settings are made of: numbers, names, paths, and how a switch is reached."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Vlan = Annotated[int, Field(ge=1, le=4094)]
QueueNumber = Annotated[int, Field(ge=0, le=65535)]
PortNumber = Annotated[int, Field(ge=1, le=65535)]
InterfaceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$")]
NamespaceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]


def _check_connection(value: str) -> str:
    """One of ``unix:/PATH``, ``ssl:ADDRESS:PORT``, ``tcp:LOOPBACK:PORT``, as OVS writes them.

    Plain TCP is taken from this machine only: nothing proves who is at the other end.
    """
    method, _, rest = value.partition(":")
    # A comma begins another connection: OVSDB's clients take a list, and try each in turn.
    if method == "unix" and re.fullmatch(r"/[^\s,]+", rest):
        return value
    if method not in ("ssl", "tcp"):
        raise ValueError("must be unix:/PATH, ssl:ADDRESS:PORT, or tcp: to loopback")
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:\s]+):([0-9]{1,5})", rest)
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise ValueError(f"must be {method}:ADDRESS:PORT, an IPv6 address in brackets")
    try:
        address = ip_address(found[1].strip("[]"))
    except ValueError as fault:
        # OVS's Python library knows no names, its programs ask DNS and nothing else.
        raise ValueError(f"{found[1]} is no address; a name belongs into tls.serverName") from fault
    if method == "tcp" and not address.is_loopback:
        raise ValueError(
            "plain TCP is for loopback only: anybody between could steer the traffic; use ssl:"
        )
    return value


Connection = Annotated[str, AfterValidator(_check_connection)]


def _check_absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("a path must begin with /")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_check_absolute)]


def is_loopback(host: str) -> bool:
    """Whether what is sent to ``host`` stays on this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
