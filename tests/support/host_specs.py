"""Hosts for the tests of `hairpin host`."""

from __future__ import annotations

from pathlib import Path

SPEC = """\
apiVersion: hairpin/v1
kind: Host
name: hv-1
address: 192.0.2.10
names: [hv-1.example.org]
bridge: br-int
lanes:
  - {profile: prevent, vlan: 3901}
  - {profile: detect, vlan: 3902, shortcut: false}
vm:
  image: /var/lib/libvirt/images/hairpin.qcow2
  management: {bridge: br-mgmt, address: 192.0.2.20/24, gateway: 192.0.2.1, dns: [192.0.2.53]}
"""


def render_local_spec(directory: Path, bridge: str, ovsdb_port: int, openflow_port: int) -> str:
    """Of a switch on this machine whose files are in ``directory``."""
    return (
        SPEC.replace("192.0.2.10", "127.0.0.1")
        .replace("image:", "qemuGroup: root\n  image:")
        .replace("bridge: br-int", f"bridge: {bridge}")
        + f"ovsdbPort: {ovsdb_port}\nopenflowPort: {openflow_port}\n"
        + f"directory: {directory}/tls\novsDatabase: {directory}/conf.db\n"
        + f"vmDirectory: {directory}/vm\n"
    )


TOKEN = "an-api-token-of-more-than-32-characters"
