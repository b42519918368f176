"""Every setting of the management service, declared once; `docs/settings.md` is generated from here.

One YAML file, read by every process of the appliance (serve, inspect, observe). Unknown keys and
wrong values are refused, all at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from appliance.inspection.placement import NICE, number_queues
from appliance.settings_switch import SwitchSettings
from appliance.settings_values import (
    AbsolutePath,
    Document,
    InterfaceName,
    Name,
    NamespaceName,
    PortNumber,
    QueueNumber,
    Vlan,
    is_loopback,
)
from steering.documents import Decoded, parse_text
from steering.errors import FieldError, WrongInput
from steering.model import Lane, Leg, Profile

STALE_DAYS = 7


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


class RulesBundle(Document):
    """Signed rules in a partition of the appliance's own disk (`hairpin image refresh`, docs/update.md)."""

    device: AbsolutePath = Field(
        default=Path("/dev/disk/by-partlabel/hairpin-rules"), description="The partition."
    )
    certificate: AbsolutePath = Field(
        description="Certificates (PEM) by whose keys a bundle may be signed."
    )
    floor: int = Field(
        default=0, ge=0, description="A bundle with a lower serial number is not used."
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
    stale_after_days: int | None = Field(
        default=None,
        alias="staleAfterDays",
        ge=1,
        le=3650,
        description="With rules older than this the appliance is `degraded` (docs/rules.md). None: "
        "after 7 days where there are `sources` or a `bundle`; the starter rules' age alone is told, not judged.",
    )

    update_every_hours: int | None = Field(
        default=None,
        alias="updateEveryHours",
        ge=1,
        le=720,
        description="Read `sources` again by itself when this is over (docs/rules.md). None: only when asked, "
        "by `hairpin rules update` or the API.",
    )
    bundle: RulesBundle | None = Field(
        default=None,
        description="Rules that were put into the image while it did not run; merged after the starter rules.",
    )

    @property
    def stale_seconds(self) -> float | None:
        """None: rules of any age are fresh."""
        days = self.stale_after_days or (STALE_DAYS if self.sources or self.bundle else None)
        return None if days is None else days * 86400.0

    @property
    def update_seconds(self) -> float | None:
        """How long after the sources were read they are read again; None: only when asked."""
        hours = self.update_every_hours if self.sources else None
        return None if hours is None else hours * 3600.0

    @field_validator("sources")
    @classmethod
    def _sources_have_own_names(cls, sources: tuple[RuleSource, ...]) -> tuple[RuleSource, ...]:
        _check_once("name", (source.name for source in sources))
        return sources


class ApiSettings(Document):
    """Where the management API is served: with a bearer token, the file `token` in `stateDir`.

    HTTPS (TLS 1.2 or newer) with `certFile` and `keyFile`, else HTTP, which is for loopback.
    """

    listen: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. Elsewhere than on loopback `certFile` and `keyFile` are "
        "needed: the token would pass in the clear.",
    )
    port: PortNumber = Field(default=8470, description="TCP port to listen on.")
    cert_file: AbsolutePath | None = Field(
        default=None,
        alias="certFile",
        description="The server's certificate (PEM), then those of the authorities between it and "
        "the one that clients know; with `keyFile`.",
    )
    key_file: AbsolutePath | None = Field(
        default=None,
        alias="keyFile",
        description="Its private key (PEM, not encrypted), readable by the service's user alone.",
    )
    allow_plain_http: bool = Field(
        default=False,
        alias="allowPlainHttp",
        description="Serve HTTP elsewhere than on loopback: only where something of your own puts "
        "TLS before it.",
    )
    body_limit_bytes: int = Field(
        default=4 * 2**20,
        alias="bodyLimitBytes",
        ge=1024,
        description="A larger request body is refused with 413.",
    )

    @model_validator(mode="after")
    def _the_token_is_not_sent_in_the_clear(self) -> ApiSettings:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("certFile and keyFile are given together or not at all")
        if self.cert_file is None and not self.allow_plain_http and not is_loopback(self.listen):
            raise ValueError(
                f"{self.listen} is not loopback, so the token would pass in the clear: give certFile "
                "and keyFile, or set allowPlainHttp where TLS is put before it"
            )
        return self


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

    @model_validator(mode="after")
    def _canary_is_no_leg(self) -> Settings:
        legs = [leg for lane in self.lanes for leg in (lane.leg_a, lane.leg_b, lane.leg_c) if leg]
        if self.canary.interface is not None:
            if self.canary.interface in (leg.interface for leg in legs):
                raise ValueError(f"canary.interface {self.canary.interface} is a leg's")
            if self.canary.device in (leg.device for leg in legs):
                raise ValueError(f"canary.device {self.canary.device} is a leg's")
        return self

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
    faults = [FieldError(path, "stands here more than once") for path in find_repeated(document)]
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


def render_path(parts: Iterable[str | int]) -> str:
    """As in ``lanes[0].legA``; ``(file)`` for the whole."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.removeprefix(".") or "(file)"


def find_repeated(value: object, at: tuple[str | int, ...] = ()) -> Iterator[str]:
    """Paths of the keys that stand more than once in a decoded document."""
    if isinstance(value, Decoded):
        yield from (render_path((*at, key)) for key in value.duplicates)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from find_repeated(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from find_repeated(inner, (*at, number))


def build_faults(fault: ValidationError) -> list[FieldError]:
    """What pydantic found, each with its path as a person writes it."""
    return [
        FieldError(render_path(error["loc"]), _render_reason(error))
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
