"""Runs inside a lab VM: one marked datagram a mode, in whatever could carry it past an engine.

    python -m tests.support.attacker_datagrams '{"source": [mac, ip], "target": [mac, ip],
        "accomplices": [mac, ...], "spoofed": ip, "modes": [...], "mark": "..."}'

A mode is ``udp-SHAPE`` or ``icmp-SHAPE`` (shapes of `attacker_frames`), or one of those below. Prints one
JSON line: mode -> token. The payload is ``MARK token=TOKEN;``: `tests.support.receiver` writes the tokens
that arrive.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import time
from dataclasses import replace
from typing import Any

from scapy.all import conf
from scapy.contrib.geneve import GENEVE
from scapy.contrib.mpls import MPLS
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, GRE, Ether
from scapy.layers.ppp import PPPoE
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from tests.support.attacker_frames import Route, build_frames, build_l4, build_route

PORT = 9999
UDP_NUMBER, ICMP_NUMBER, ICMP6_NUMBER, UDPLITE_NUMBER, EXPERIMENT_NUMBER = 17, 1, 58, 136, 253
SETTLE_SECONDS = 1.0


class Sender:
    """The modes' frames from one VM to another."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.route = build_route(told)
        self.spoofed, self.mark = told["spoofed"], told["mark"]

    def address(self) -> type[Packet]:
        return IPv6 if self.route.v6 else IP

    def ip(self, **fields: Any) -> Any:
        return self.address()(src=self.route.address, dst=self.route.target, **fields)

    def ether(self, **fields: Any) -> Any:
        return Ether(src=self.route.mac, dst=self.route.target_mac, **fields)

    def build(self, mode: str, token: str) -> list[Packet]:
        payload = f"{self.mark} token={token};".encode()
        if "-1400" in mode:
            payload = payload.ljust(3000, b".")
        udp = UDP(sport=random.randint(20_000, 60_000), dport=PORT) / payload
        inner = self.ip() / udp
        kind, _, rest = mode.partition("-")
        match kind:
            case "udp":
                return self.shape(rest, UDP_NUMBER, udp)
            case "icmp":
                echo = ICMPv6EchoRequest(id=7) if self.route.v6 else ICMP(id=7)
                return self.shape(
                    rest, ICMP6_NUMBER if self.route.v6 else ICMP_NUMBER, echo / payload
                )
            case "to" | "from":  # a port that an engine or a switch takes for something else
                udp[UDP].setfieldval("dport" if kind == "to" else "sport", int(rest))
                return self.shape("plain", UDP_NUMBER, udp)
            case "spoofed":
                return self.shape(
                    "plain", UDP_NUMBER, udp, replace(self.route, address=self.spoofed)
                )
            case "checksum":
                udp[UDP].chksum = {"none": 0, "bad": 0x1234}[rest]
                return self.shape("plain", UDP_NUMBER, udp)
            case "length":
                udp[UDP].len = (
                    8 + len(payload) + {"short": -1, "long": 9, "zero": -8 - len(payload)}[rest]
                )
                return self.shape("plain", UDP_NUMBER, udp)
            case "udplite":
                head = struct.pack("!HHHH", 4000, PORT, 8 + len(payload), 0) + payload
                return [self.ether() / self.lite(head)]
            case "experiment":
                return build_frames("plain", self.route, EXPERIMENT_NUMBER, payload)
            case "error":
                error = ICMPv6DestUnreach() if self.route.v6 else ICMP(type=3, code=3)
                quoted = self.address()(src=self.route.target, dst=self.route.address) / udp
                number = ICMP6_NUMBER if self.route.v6 else ICMP_NUMBER
                return self.shape("plain", number, error / quoted)
            case "all":
                return [self.build_for_all(rest) / udp]
            case "in":
                return [self.ether() / self.ip() / self.tunnel(rest, inner)]
            case "frame":
                return [self.frame(rest, inner, payload)]
        raise ValueError(mode)

    def shape(
        self, shape: str, protocol: int, segment: Packet, route: Route | None = None
    ) -> list[Packet]:
        route = route or self.route
        return build_frames(shape, route, protocol, build_l4(route, segment))

    def lite(self, head: bytes) -> Any:
        """UDP-Lite with its checksum, which covers all of it (RFC 3828)."""
        udp = UDP(head)
        udp.chksum = None
        addresses = bytes(self.ip() / udp)
        built = bytearray(addresses[-len(head) :])
        # The pseudo header names protocol 136 in the place of 17: the sum grows by 119.
        total = (~struct.unpack("!H", built[6:8])[0] & 0xFFFF) + UDPLITE_NUMBER - UDP_NUMBER
        total = (total & 0xFFFF) + (total >> 16)
        built[6:8] = struct.pack("!H", ~total & 0xFFFF)
        number = {"nh": UDPLITE_NUMBER} if self.route.v6 else {"proto": UDPLITE_NUMBER}
        return self.ip(**number) / Raw(bytes(built))

    def build_for_all(self, rest: str) -> Any:
        """Broadcast and multicast, as they are meant to be."""
        if self.route.v6:
            return Ether(src=self.route.mac, dst="33:33:00:00:00:01") / IPv6(
                src=self.route.address, dst="ff02::1"
            )
        mac, target = {
            "limited": ("ff:ff:ff:ff:ff:ff", "255.255.255.255"),
            "subnet": ("ff:ff:ff:ff:ff:ff", self.route.target.rpartition(".")[0] + ".255"),
            "hosts": ("01:00:5e:00:00:01", "224.0.0.1"),
            "subnet-unicast": (
                self.route.target_mac,
                self.route.target.rpartition(".")[0] + ".255",
            ),
            "hosts-unicast": (self.route.target_mac, "224.0.0.1"),
        }[rest]
        return Ether(src=self.route.mac, dst=mac) / IP(src=self.route.address, dst=target)

    def tunnel(self, rest: str, inner: Packet) -> Any:
        frame = self.ether() / inner
        match rest:
            case "same":
                return inner
            case "other":
                if self.route.v6:
                    return IP(src="10.77.0.1", dst="10.77.0.5") / inner[UDP]
                return IPv6(src="fd77::1", dst="fd77::5") / inner[UDP]
            case "gre":
                return GRE() / inner
            case "gre-ethernet":
                return GRE(proto=0x6558) / frame
            case "vxlan":
                return UDP(sport=4000, dport=4789) / VXLAN(vni=7) / frame
            case "geneve":
                return UDP(sport=4000, dport=6081) / GENEVE(vni=7, proto=0x6558) / frame
            case "teredo":
                return UDP(sport=4000, dport=3544) / IPv6(src="fd77::1", dst="fd77::5") / inner[UDP]
            case "twice":
                return GRE() / self.ip() / GRE() / inner
        raise ValueError(rest)

    def frame(self, rest: str, inner: Packet, payload: bytes) -> Any:
        """Frames that are not IP, or are what the switch looks into by itself."""
        match rest:
            case "experiment":
                return self.ether(type=0x88B5) / Raw(payload)
            case "mpls":
                return self.ether() / MPLS(label=7, s=1, ttl=64) / inner
            case "pppoe":
                number = 0x57 if self.route.v6 else 0x21
                return (
                    self.ether()
                    / PPPoE(sessionid=7)
                    / Raw(struct.pack("!H", number) + bytes(inner))
                )
            case "arp":
                asked = ARP(hwsrc=self.route.mac, psrc="10.77.0.1", pdst="10.77.0.5")
                return self.ether() / asked / Raw(payload)
            case "solicitation":
                return (
                    self.ether()
                    / self.ip(hlim=255)
                    / ICMPv6ND_NS(tgt=self.route.target)
                    / ICMPv6NDOptSrcLLAddr(lladdr=self.route.mac)
                    / Raw(payload)
                )
            case "advertisement":
                return (
                    self.ether()
                    / self.ip(hlim=255)
                    / ICMPv6ND_NA(tgt=self.route.address, R=0)
                    / ICMPv6NDOptDstLLAddr(lladdr=self.route.mac)
                    / Raw(payload)
                )
        raise ValueError(rest)


def main() -> None:
    told = json.loads(sys.argv[1])
    sender, socket = Sender(told), conf.L2socket(iface="eth0")
    found = {}
    for mode in told["modes"]:
        token = f"{mode}-{random.getrandbits(32):08x}"
        for frame in sender.build(mode, token):
            socket.send(frame)
        found[mode] = token
        time.sleep(0.005)
    time.sleep(SETTLE_SECONDS)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
