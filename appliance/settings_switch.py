"""The settings of the connection to the switch."""

from __future__ import annotations

from pydantic import Field, model_validator

from appliance.settings_values import AbsolutePath, Connection, Document, InterfaceName
from steering.tls import TlsFiles


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
