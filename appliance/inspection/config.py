"""An engine's `suricata.yaml`, rendered from the template in the engine's data; pure but for the template.

Every value is checked before it is rendered: the file is YAML, and a path with a quote or a line
break would say more than it should.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import jinja2

from appliance.inspection.placement import LanePlacement
from appliance.paths import find_engine_data
from appliance.settings import Settings
from steering.errors import FieldError, WrongInput
from steering.model import Lane, Profile

VERSION_FLOOR = (7, 0, 3)
"""The oldest Suricata that knows every key of the template and says `verdict` in alerts."""

ADDRESS_GROUPS = (
    "HOME_NET",
    "EXTERNAL_NET",
    "HTTP_SERVERS",
    "SMTP_SERVERS",
    "SQL_SERVERS",
    "DNS_SERVERS",
    "TELNET_SERVERS",
    "AIM_SERVERS",
    "DC_SERVERS",
    "DNP3_SERVER",
    "DNP3_CLIENT",
    "MODBUS_CLIENT",
    "MODBUS_SERVER",
    "ENIP_CLIENT",
    "ENIP_SERVER",
)
PORT_GROUPS = MappingProxyType(
    {
        "HTTP_PORTS": "any",
        "SHELLCODE_PORTS": "any",
        "ORACLE_PORTS": "any",
        "SSH_PORTS": "22",
        "DNP3_PORTS": "20000",
        "MODBUS_PORTS": "502",
        "FILE_DATA_PORTS": "any",
        "FTP_PORTS": "21",
        "GENEVE_PORTS": "6081",
        "VXLAN_PORTS": "4789",
        "TEREDO_PORTS": "3544",
    }
)
PROTOCOLS = (
    "krb5",
    "bittorrent-dht",
    "snmp",
    "ike",
    "dcerpc",
    "ftp",
    "rdp",
    "ssh",
    "http2",
    "nfs",
    "tftp",
    "pgsql",
    "rfb",
    "mqtt",
    "ntp",
    "quic",
    "dhcp",
    "sip",
    "telnet",
)

# What a plain YAML scalar takes without a quote, and a path needs.
PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/+@=-]*")
FLOW_TIMEOUT = 300
"""Seconds of silence after which an engine forgets an established TCP connection."""
SOCKET_PATH_LIMIT = 107
"""Longest path of a Unix socket in bytes (unix(7), sun_path without its final zero)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Upper limits of an engine's tables, in MiB."""

    flow_mib: int = 128
    defrag_mib: int = 32
    stream_mib: int = 128
    reassembly_mib: int = 256


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """How much of each HTTP body is inspected, in KiB."""

    request_body_kib: int = 1024
    response_body_kib: int = 512


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What distinguishes one engine's configuration from another's."""

    lane: Lane
    directory: Path
    ruleset: Path
    socket: Path
    hyperscan: bool = True
    memory: Memory = field(default_factory=Memory)
    http: HttpLimits = field(default_factory=HttpLimits)
    placement: LanePlacement | None = None


def build_engine_config(
    settings: Settings, lane: Lane, placement: LanePlacement | None = None
) -> EngineConfig:
    """The configuration of a lane's engine. A host without Hyperscan gets it only where that is allowed.

    ``placement``: where its threads run; None for one that only tests rules.
    """
    return EngineConfig(
        lane=lane,
        directory=settings.lane_dir(lane).absolute(),
        ruleset=settings.ruleset(lane).absolute(),
        socket=settings.engine_socket(lane).absolute(),
        hyperscan=settings.inspection.require_hyperscan,
        placement=placement,
    )


def check_engine_config(config: EngineConfig) -> tuple[FieldError, ...]:
    """What would make the rendered file say something else than was meant."""
    faults = [
        FieldError(name, f"`{path}` is not an absolute path of letters, digits and ._/+@=-")
        for name, path in (
            ("directory", config.directory),
            ("ruleset", config.ruleset),
            ("socket", config.socket),
        )
        if not PLAIN_PATH.fullmatch(str(path))
    ]
    if len(str(config.socket).encode()) > SOCKET_PATH_LIMIT:
        faults.append(
            FieldError("socket", f"`{config.socket}` is longer than {SOCKET_PATH_LIMIT} bytes")
        )
    return tuple(faults)


def render_engine_config(config: EngineConfig, data: Path | None = None) -> str:
    """The whole `suricata.yaml`. Raises WrongInput when a path can't be written in it.

    `data` is the engine's data directory; found by `find_engine_data` when it isn't given.
    """
    data = find_engine_data() if data is None else data
    faults = check_engine_config(config)
    if not PLAIN_PATH.fullmatch(str(data)):
        faults += (FieldError("data", f"`{data}` is not an absolute path of plain characters"),)
    if faults:
        raise WrongInput(faults, "choose other directories in the settings")
    # YAML, not HTML: escaping would only spoil it, and every value was checked above.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701
        keep_trailing_newline=True,
    )
    return environment.get_template("suricata.yaml.j2").render(
        lane_number=config.lane.number,
        lane_name=config.lane.name,
        directory=config.directory,
        ruleset=config.ruleset,
        socket=config.socket,
        data=data,
        address_groups=ADDRESS_GROUPS,
        port_groups=PORT_GROUPS,
        protocols=PROTOCOLS,
        cores=config.placement.cores if config.placement else (),
        other_cores=config.placement.others if config.placement else (),
        matcher="hs" if config.hyperscan else "auto",
        memory=config.memory,
        http=config.http,
        flow_timeout=FLOW_TIMEOUT,
        app_layer_error_policy=find_app_layer_error_policy(config.lane.profile),
    )


def find_app_layer_error_policy(profile: Profile) -> str:
    """What becomes of a flow whose protocol the engine can no longer follow.

    A lane that prevents must not deliver what it can't read; one that only records must not drop.
    """
    return "drop-flow" if profile is Profile.PREVENT else "ignore"
