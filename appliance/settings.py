"""Every setting of the management service, declared once; `docs/settings.md` is generated from here.

One YAML file, read by every process of the appliance (serve, inspect, observe). Unknown keys and
wrong values are refused, all at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from appliance.inspection.placement import NICE, number_queues
from steering.documents import Decoded, parse_text
from steering.errors import FieldError, WrongInput
from steering.model import Lane, Leg, Profile
from steering.tls import TlsFiles

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
    if method == "unix" and re.fullmatch(r"/\S+", rest):
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


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class SwitchTls(Document):
    """Both ends of an `ssl:` connection show a certificate and check the other's (docs/deploy.md)."""

    ca_file: AbsolutePath = Field(
        alias="caFile", description="CA certificates (PEM); one of them signed the switch's."
    )
    cert_file: AbsolutePath = Field(alias="certFile", description="Our own certificate (PEM).")
    key_file: AbsolutePath = Field(
        alias="keyFile", description="Its private key (PEM), for the service's user only."
    )
    server_name: str | None = Field(
        default=None,
        alias="serverName",
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$",
        description="The name that the switch's certificate must be for; none: the connection's address.",
    )


class SwitchSettings(Document):
    """The bridge that is steered, reached by connection strings as OVS writes them."""

    ovsdb: Connection = Field(
        default="unix:/run/openvswitch/db.sock",
        description="OVSDB server: `unix:PATH`, or `ssl:ADDRESS:PORT`; `tcp:` to loopback only.",
    )
    bridge: InterfaceName = Field(default="br-int", description="The integration bridge's name.")
    openflow: Connection = Field(
        default_factory=lambda known: f"unix:/run/openvswitch/{known['bridge']}.mgmt",
        json_schema_extra={"default": "unix:/run/openvswitch/BRIDGE.mgmt"},
        description="The bridge's OpenFlow management connection, written as `ovsdb`.",
    )
    vswitchd: AbsolutePath | None = Field(
        default=None,
        description="ovs-vswitchd's control socket, for `ofproto/trace`, or its pid file, by which the "
        "socket is found; over the network none, a copy of the switch is asked (docs/coverage.md).",
    )
    tls: SwitchTls | None = Field(
        default=None, description="Certificates; needed by `ssl:`, and by nothing else."
    )

    @model_validator(mode="after")
    def _tls_fits(self) -> SwitchSettings:
        wants = [one for one in (self.ovsdb, self.openflow) if one.startswith("ssl:")]
        if wants and self.tls is None:
            raise ValueError(f"{wants[0]} needs tls: caFile, certFile and keyFile")
        if self.tls is not None and not wants:
            raise ValueError("tls is for connections that begin with ssl:")
        return self

    @property
    def tls_files(self) -> TlsFiles | None:
        tls = self.tls
        if tls is None:
            return None
        return TlsFiles(tls.ca_file, tls.cert_file, tls.key_file, tls.server_name)


class LegSettings(Document):
    """One pair of ends between the switch and the service host."""

    interface: InterfaceName = Field(description="The OVS port.")
    device: InterfaceName = Field(description="Its other end, in the service host.")


class LaneSettings(Document):
    """One lane: an inspection profile with its VLAN, its queues and its two legs."""

    profile: Profile = Field(description="What its engine does with what it finds.")
    vlan: Vlan = Field(description="Inspected frames carry it between switch and engine.")
    queues: tuple[QueueNumber, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="NFQUEUE numbers in a row, as `[0, 1]`; one engine thread for each. None: an even share "
        "of the cores present but one (docs/inspection.md).",
    )
    leg_a: LegSettings = Field(alias="legA", description="One way into the service host.")
    leg_b: LegSettings = Field(alias="legB", description="The other way.")
    leg_c: LegSettings | None = Field(
        default=None,
        alias="legC",
        description="By it frames come back whose connection may take a shortcut; none: no connection ever does.",
    )

    @field_validator("queues")
    @classmethod
    def _queues_are_a_row(cls, queues: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if queues is not None and queues != tuple(range(queues[0], queues[0] + len(queues))):
            raise ValueError("not consecutive numbers in rising order, as in [0, 1, 2]")
        return queues


class InspectionSettings(Document):
    """The engines: who they run as, what they are built on, how long they may take."""

    user: str = Field(default="hairpin-engine", description="The user each engine runs as.")
    suricata: AbsolutePath = Field(
        default=Path("/usr/bin/suricata"), description="The engine's program."
    )
    netns: NamespaceName | None = Field(
        default=None,
        description="Network namespace of the service host (the lab's); none in the service VM.",
    )
    dialect: Literal["auto", "iptables", "nftables"] = Field(
        default="auto", description="How packets are queued; `auto` probes the kernel."
    )
    require_hyperscan: bool = Field(
        default=True,
        alias="requireHyperscan",
        description="Refuse an engine that is built without Hyperscan.",
    )
    super_packets: bool = Field(
        default=True,
        alias="superPackets",
        description="Take super-packets from the kernel whole, where switch and links have them.",
    )
    pinned: bool = Field(
        default=True,
        description="Give packet threads cores of their own, where there are 4 or more.",
    )
    nice: int = Field(
        default=NICE,
        ge=-20,
        le=19,
        description="How urgent the engines are, as nice(1) has it; the default is the switch's own.",
    )
    eve_limit_bytes: int = Field(
        default=256 * 2**20,
        alias="eveLimitBytes",
        ge=2**20,
        description="EVE files are rotated at this size, in bytes.",
    )


class RuleSource(Document):
    """Where rules come from beside the starter rules: a `file://` or `https://` URL, or an index name."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9./_-]{0,63}$",
        description="A name of your own with `url`; else one in suricata-update's index.",
    )
    url: str | None = Field(
        default=None,
        pattern=r"^(file:///|https://)",
        description="`file:///...` or `https://...`; none: the index knows it.",
    )


class RulesSettings(Document):
    """What each lane's ruleset is made of."""

    starter: bool = Field(
        default=True,
        description="Take the starter rules in `suricata/rules`; those that drop what the engine "
        "can't read (`hairpin-wire.rules`) are taken always.",
    )
    sources: tuple[RuleSource, ...] = Field(
        default=(), description="Merged with the starter rules, in this order."
    )
    floor: int = Field(
        default=1, ge=1, description="A ruleset with fewer rules than this is refused."
    )

    @field_validator("sources")
    @classmethod
    def _sources_have_own_names(cls, sources: tuple[RuleSource, ...]) -> tuple[RuleSource, ...]:
        _check_once("name", (source.name for source in sources))
        return sources


class ApiSettings(Document):
    """Where the management API is served: HTTP with a bearer token, the file `token` in `stateDir`."""

    listen: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. Elsewhere than on loopback, put TLS before it: "
        "the token would pass in the clear.",
    )
    port: PortNumber = Field(default=8470, description="TCP port to listen on.")
    body_limit_bytes: int = Field(
        default=4 * 2**20,
        alias="bodyLimitBytes",
        ge=1024,
        description="A larger request body is refused with 413.",
    )


class SyslogExport(Document):
    """A SIEM that takes RFC 5424 syslog with octet counting (RFC 6587, RFC 5425)."""

    name: Name = Field(description="Its cursor is kept under this name: a new name starts anew.")
    transport: Literal["tcp", "tls"] = Field(
        default="tls", description="`tcp` sends in the clear: over trusted networks only."
    )
    host: str = Field(min_length=1, max_length=253, description="The receiver's name or address.")
    port: PortNumber = Field(default=6514, description="The receiver's port.")
    ca_file: AbsolutePath | None = Field(
        default=None,
        alias="caFile",
        description="CA certificates (PEM) that the receiver is checked with; none: the system's.",
    )
    cert_file: AbsolutePath | None = Field(
        default=None, alias="certFile", description="Our own certificate (PEM), with `keyFile`."
    )
    key_file: AbsolutePath | None = Field(
        default=None, alias="keyFile", description="Its private key (PEM)."
    )

    @model_validator(mode="after")
    def _files_fit(self) -> SyslogExport:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("certFile and keyFile are given together or not at all")
        if self.transport == "tcp" and (self.ca_file or self.cert_file):
            raise ValueError("caFile, certFile and keyFile are for the transport tls")
        return self


class StoreSettings(Document):
    """How long alerts are kept. They stand in partitions, files that are removed as a whole."""

    keep_days: int = Field(
        default=90,
        alias="keepDays",
        ge=1,
        le=3650,
        description="Alerts, flow records and address holdings are kept so long; alerts that an "
        "exporter has not delivered, longer.",
    )
    keep_bytes: int = Field(
        default=20 * 2**30,
        alias="keepBytes",
        ge=64 * 2**20,
        description="Most bytes of alerts. The oldest go first, delivered or not; an event tells of "
        "those that were not.",
    )
    keep_flow_records: int = Field(
        default=5_000_000,
        alias="keepFlowRecords",
        ge=1000,
        description="Most flow records that are kept.",
    )
    partition_alerts: int = Field(
        default=1_000_000,
        alias="partitionAlerts",
        ge=1000,
        le=10_000_000,
        description="A new partition begins after so many alerts,",
    )
    partition_hours: int = Field(
        default=24,
        alias="partitionHours",
        ge=1,
        le=24 * 31,
        description="or after so many hours, or when it takes an eighth of `keepBytes`.",
    )


class VisibilitySettings(Document):
    """Flow records of a mirror port by nfstream, in a process of its own."""

    device: InterfaceName | None = Field(
        default=None, description="The mirror port's device; none: no records."
    )
    netns: NamespaceName | None = Field(
        default=None, description="Network namespace that the device is in (the lab's)."
    )
    idle_seconds: int = Field(
        default=15, alias="idleSeconds", ge=1, description="A flow ends after this long in silence."
    )
    active_seconds: int = Field(
        default=60,
        alias="activeSeconds",
        ge=1,
        description="A flow that goes on is recorded this often.",
    )


class CanarySettings(Document):
    """A port of Hairpin's own, by which it proves each lane with packets that must be dropped."""

    interface: InterfaceName | None = Field(
        default=None, description="The OVS port; none: no canary, and health says so."
    )
    device: InterfaceName = Field(
        default="canary", description="Its other end, in the service host."
    )
    every_seconds: int = Field(
        default=30,
        alias="everySeconds",
        ge=1,
        le=3600,
        description="Each lane is proved this often, and after every change.",
    )


class Settings(Document):
    """All sections; only `lanes` has to be given."""

    api_version: Literal["hairpin/v1"] = Field(
        default="hairpin/v1", alias="apiVersion", description="The version of this format."
    )
    kind: Literal["Settings"] = Field(default="Settings", description="What the file is.")
    name: Name = Field(default="hairpin", description="This appliance, in health and in exports.")
    state_dir: AbsolutePath = Field(
        default=Path("/var/lib/hairpin"),
        alias="stateDir",
        description="What is kept: database, rulesets, token.",
    )
    run_dir: AbsolutePath = Field(
        default=Path("/run/hairpin"),
        alias="runDir",
        description="What the processes share while they run: EVE files, sockets, records.",
    )
    switch: SwitchSettings = Field(
        default_factory=SwitchSettings, description="The bridge that is steered."
    )
    lanes: tuple[LaneSettings, ...] = Field(
        min_length=1,
        max_length=8,
        description="At least one; no two share a profile, VLAN, queue, port or device.",
    )
    inspection: InspectionSettings = Field(
        default_factory=InspectionSettings, description="The engines."
    )
    canary: CanarySettings = Field(
        default_factory=CanarySettings, description="The proof that each lane inspects."
    )
    rules: RulesSettings = Field(default_factory=RulesSettings, description="Their rules.")
    api: ApiSettings = Field(default_factory=ApiSettings, description="The management API.")
    store: StoreSettings = Field(
        default_factory=StoreSettings, description="How long alerts are kept."
    )
    export: tuple[SyslogExport, ...] = Field(
        default=(), description="Receivers of every alert; each has a name of its own."
    )
    visibility: VisibilitySettings = Field(
        default_factory=VisibilitySettings, description="Flow records."
    )

    @field_validator("lanes")
    @classmethod
    def _lanes_do_not_share(cls, lanes: tuple[LaneSettings, ...]) -> tuple[LaneSettings, ...]:
        legs = [
            leg for lane in lanes for leg in (lane.leg_a, lane.leg_b, lane.leg_c) if leg is not None
        ]
        _check_once("profile", (str(lane.profile) for lane in lanes))
        _check_once("vlan", (str(lane.vlan) for lane in lanes))
        _check_once("queue", (str(queue) for lane in lanes for queue in lane.queues or ()))
        _check_once("leg interface", (leg.interface for leg in legs))
        _check_once("leg device", (leg.device for leg in legs))
        return lanes

    @field_validator("export")
    @classmethod
    def _exports_have_own_names(cls, export: tuple[SyslogExport, ...]) -> tuple[SyslogExport, ...]:
        _check_once("name", (one.name for one in export))
        return export

    # Where things are, relative to the two directories: declared here and nowhere else.

    @property
    def token_file(self) -> Path:
        """The API's bearer token, mode 0600."""
        return self.state_dir / "token"

    @property
    def database(self) -> Path:
        return self.state_dir / "hairpin.db"

    @property
    def rules_dir(self) -> Path:
        return self.state_dir / "rules"

    @property
    def inspection_state(self) -> Path:
        """What `hairpin inspect` last published: engines, dialect, faults (JSON, replaced atomically)."""
        return self.run_dir / "inspection.json"

    @property
    def replica_dir(self) -> Path:
        """The copy of a switch that is reached over the network, for traces."""
        return self.state_dir / "replica"

    @property
    def canary_socket(self) -> Path:
        """Where `hairpin inspect` sends canaries on request."""
        return self.run_dir / "inspect" / "canary.sock"

    def lane_dir(self, lane: Lane) -> Path:
        """The engine's directory: suricata.yaml, command socket, eve.json, log."""
        return self.run_dir / "lanes" / lane.name

    def shortcut_state(self, lane: Lane) -> Path:
        """What the engine's library and `hairpin inspect` share of the shortcut."""
        return self.lane_dir(lane) / "shortcut.state"

    def eve_file(self, lane: Lane) -> Path:
        return self.lane_dir(lane) / "eve.json"

    def engine_socket(self, lane: Lane) -> Path:
        return self.lane_dir(lane) / "command.socket"

    def ruleset(self, lane: Lane) -> Path:
        """The rule file in force for a lane; always a complete, tested file."""
        return self.rules_dir / lane.name / "current" / "suricata.rules"

    @property
    def flow_spool(self) -> Path:
        """Flow records written by `hairpin observe`, one JSON object a line."""
        return self.run_dir / "observe" / "flows.json"

    def build_lanes(self, cores: int | None = None) -> tuple[Lane, ...]:
        """The lanes as values, numbered from 1 in the order of the file; ofports not yet known.

        ``cores``: those present on the service host, None for this machine's.
        """
        present = cores or os.cpu_count() or 1
        queues = number_queues([lane.queues for lane in self.lanes], present)
        return tuple(
            Lane(
                number=number,
                profile=lane.profile,
                vlan=lane.vlan,
                queues=row,
                leg_a=Leg(lane.leg_a.interface, lane.leg_a.device),
                leg_b=Leg(lane.leg_b.interface, lane.leg_b.device),
                leg_c=None if lane.leg_c is None else Leg(lane.leg_c.interface, lane.leg_c.device),
            )
            for number, (lane, row) in enumerate(zip(self.lanes, queues, strict=True), start=1)
        )


def parse_settings(text: str) -> Settings:
    """Settings from YAML text. Raises WrongInput with every fault and its path."""
    documents = parse_text(text)
    if len(documents) > 1:
        raise WrongInput([FieldError("(file)", f"{len(documents)} documents; one is read")])
    document = documents[0] if documents else {}
    faults = [FieldError(path, "stands here more than once") for path in _find_repeated(document)]
    try:
        settings = Settings.model_validate(document, by_alias=True, by_name=False)
    except ValidationError as fault:
        raise WrongInput([*faults, *build_faults(fault)]) from fault
    if faults:
        raise WrongInput(faults)
    return settings


def read_settings(path: Path) -> Settings:
    """As `parse_settings`, from a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as fault:
        raise WrongInput([FieldError(str(path), fault.strerror or str(fault))]) from fault
    except UnicodeDecodeError as fault:
        raise WrongInput([FieldError(str(path), f"not UTF-8: {fault.reason}")]) from fault
    return parse_settings(text)


def _check_once(what: str, values: Iterable[str]) -> None:
    listed = list(values)
    if repeated := sorted({value for value in listed if listed.count(value) > 1}):
        raise ValueError(f"{what} {', '.join(repeated)} is used more than once")


def _render_path(parts: Iterable[str | int]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".") or "(file)"


def _find_repeated(value: object, at: tuple[str | int, ...] = ()) -> Iterator[str]:
    if isinstance(value, Decoded):
        yield from (_render_path((*at, key)) for key in value.duplicates)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _find_repeated(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _find_repeated(inner, (*at, number))


def build_faults(fault: ValidationError) -> list[FieldError]:
    """What pydantic found, each with its path as a person writes it."""
    return [
        FieldError(_render_path(error["loc"]), _render_reason(error))
        for error in fault.errors()
        # Not a fault: what it would be made from is at fault itself, and told.
        if error["type"] != "default_factory_not_called"
    ]


def _render_reason(error: Any) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "unknown key"
        case "missing":
            return "must be given"
        case "model_type":
            return "must be a mapping"
        case "string_pattern_mismatch":
            return f"{str(error['input'])[:120]!r} is not of the form {error['ctx']['pattern']}"
    return str(error["msg"]).removeprefix("Value error, ")
