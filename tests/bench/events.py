"""EVE lines for the store's rows: what Suricata writes with the product's settings, made up by a seed.

Half of the alerts are HTTP requests on a stream (with the packet that completed it), the others TLS
handshakes and DNS questions. The texts that traffic decides (hosts, URLs, payloads) differ from line to
line, as they do when somebody attacks.
"""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

VMS = 200
PEERS = 10
"""Each VM speaks with so many others."""
SIGNATURES = 500
_WORDS = (
    "select", "union", "admin", "login", "passwd", "etc", "shadow", "index", "cgi", "bin", "wp", "content",
    "plugins", "upload", "shell", "exec", "cmd", "id", "uname", "cat", "wget", "curl", "tmp", "var", "www",
    "html", "api", "users", "token", "session", "jndi", "ldap", "proc", "self",
)  # fmt: skip
_PRODUCTS = ("Apache_Log4j", "Apache_Struts", "WordPress", "Exchange", "Nginx", "PHP")


def find_vm(number: int) -> str:
    return f"vm-{number}"


def find_address(number: int) -> str:
    return f"10.9.{number // 250}.{number % 250 + 1}"


class Lines:
    """An endless source of lines; the same seed gives the same lines."""

    def __init__(
        self, seed: int = 1, *, began: float = 1_700_000_000.0, step: float = 0.01
    ) -> None:
        self._random = random.Random(seed)
        self._at, self._step, self._flow = began, step, 0
        self._signatures = [self._make_signature(number) for number in range(SIGNATURES)]

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield self.make()

    def make(self) -> bytes:
        """The next line, with its newline."""
        rnd = self._random
        self._at += self._step
        self._flow += 1
        source = int(VMS * rnd.random() ** 2)  # some VMs are spoken of more than others
        destination = (source + 1 + rnd.randrange(PEERS)) % VMS
        # Some rules fire a hundred times as often as others.
        signature = self._signatures[int(SIGNATURES * rnd.random() ** 3)]
        kind = rnd.random()
        client, server = rnd.randrange(1024, 65536), 80 if kind < 0.5 else 443 if kind < 0.8 else 53
        stamp = datetime.fromtimestamp(self._at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f+0000")
        ends = {
            "src_ip": find_address(source),
            "src_port": client,
            "dest_ip": find_address(destination),
            "dest_port": server,
        }
        data, members = self._make_content(kind)
        event: dict[str, Any] = {
            "timestamp": stamp,
            "flow_id": 1_000_000_000_000_000 + self._flow,
            "event_type": "alert",
            **ends,
            "proto": "UDP" if server == 53 else "TCP",
            "pkt_src": "wire/pcap",
            "community_id": "1:" + base64.b64encode(rnd.randbytes(20)).decode(),
            "tx_id": 0,
            "alert": signature,
            **members,
            "direction": "to_server",
            "flow": {
                "pkts_toserver": 4,
                "pkts_toclient": 3,
                "bytes_toserver": 280 + len(data),
                "bytes_toclient": 186,
                "start": stamp,
                **ends,
            },
            "payload": base64.b64encode(data).decode(),
            "payload_printable": "".join(
                chr(b) if 32 <= b < 127 or b in (10, 13) else "." for b in data
            ),
            "stream": int(server == 80),
            "packet": base64.b64encode(_make_packet(ends, data)).decode(),
            "packet_info": {"linktype": 12},
            "verdict": {"action": "drop"},
        }
        return json.dumps(event, separators=(",", ":")).encode() + b"\n"

    def _make_signature(self, number: int) -> dict[str, Any]:
        rnd = self._random
        year, cve = rnd.randrange(2008, 2025), rnd.randrange(1000, 99999)
        product = rnd.choice(_PRODUCTS)
        return {
            "action": "blocked",
            "gid": 1,
            "signature_id": 2_000_000 + number,
            "rev": rnd.randrange(1, 9),
            "signature": f"HAIRPIN EXPLOIT {product} attempt of kind {number} (CVE-{year}-{cve})",
            "category": "Attempted Administrator Privilege Gain",
            "severity": rnd.randrange(1, 4),
            "metadata": {
                "affected_product": [product],
                "created_at": ["2021_12_10"],
                "cve": [f"CVE_{year}_{cve}"],
                "signature_severity": ["Major"],
                "updated_at": ["2023_04_18"],
            },
        }

    def _make_content(self, kind: float) -> tuple[bytes, dict[str, Any]]:
        rnd = self._random
        host = f"{rnd.choice(_WORDS)}{rnd.randrange(100_000)}.example"
        if kind < 0.5:
            path = "/".join(rnd.choice(_WORDS) for _ in range(4))
            url = f"/{path}.php?{rnd.choice(_WORDS)}={rnd.getrandbits(64):x}"
            data = f"GET {url} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: curl/7.88\r\nAccept: */*\r\n\r\n"
            http = {
                "hostname": host,
                "url": url,
                "http_user_agent": "curl/7.88",
                "http_method": "GET",
                "protocol": "HTTP/1.1",
                "length": 0,
            }
            return data.encode(), {"http": http, "app_proto": "http"}
        if kind < 0.8:
            hello = (
                b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + rnd.randbytes(64) + host.encode()
            )
            return hello, {"tls": {"sni": host, "version": "TLS 1.2"}, "app_proto": "tls"}
        question = (
            rnd.randbytes(2) + b"\x01\x00\x00\x01\0\0\0\0\0\0" + host.encode() + b"\0\0\1\0\1"
        )
        return question, {
            "dns": {"query": [{"type": "query", "rrname": host, "rrtype": "A"}]},
            "app_proto": "dns",
        }


def _make_packet(ends: dict[str, Any], data: bytes) -> bytes:
    addresses = [bytes(map(int, str(ends[key]).split("."))) for key in ("src_ip", "dest_ip")]
    ports = struct.pack("!HH", ends["src_port"], ends["dest_port"])
    if ends["dest_port"] == 53:
        body = ports + struct.pack("!HH", 8 + len(data), 0) + data
        protocol = 17
    else:
        body = ports + struct.pack("!IIBBHHH", 1, 1, 0x50, 0x18, 1024, 0, 0) + data
        protocol = 6
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, protocol, 0)
    return header + b"".join(addresses) + body
