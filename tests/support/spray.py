"""UDP frames of ever other ports, so that the switch decides each anew; and a count of those that arrive."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from appliance.lab.plan import LabVm
from tests.support.inspection_lane import in_namespace

MARK = b"hairpin-spray"
FIRST_PORT, PORTS = 20_000, 20_000


def build_frame(source: LabVm, destination: LabVm, number: int) -> bytes:
    """IPv4 UDP from one VM to another; ``number`` chooses its ports."""
    ports = FIRST_PORT + number % PORTS, FIRST_PORT + number * 7_919 % PORTS
    payload = MARK + struct.pack("!I", number)
    datagram = struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload
    ends = (socket.inet_aton(vm.address4) for vm in (source, destination))
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0) + b"".join(ends)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    head = head[:10] + struct.pack("!H", checksum) + head[12:]
    macs = b"".join(bytes.fromhex(vm.mac.replace(":", "")) for vm in (destination, source))
    return macs + b"\x08\x00" + head + datagram


@dataclass
class Spray:
    """How many frames were sent; the numbers of those that arrived at the destination, and at ``device``."""

    sent: int = 0
    arrived: set[int] = field(default_factory=set)
    steered: set[int] = field(default_factory=set)


@contextlib.contextmanager
def spray(
    source: LabVm,
    destination: LabVm,
    rate: int,
    most_seconds: float,
    lane: tuple[str, str] | None = None,
) -> Iterator[Spray]:
    """Sends meanwhile, ``rate`` frames a second. ``lane``: (namespace, device) where it is watched, too."""
    told, stop, over = Spray(), threading.Event(), threading.Event()
    sender = _open(source.netns, "eth0")
    watches = [(_open(destination.netns, "eth0"), told.arrived)]
    if lane is not None:
        watches.append((_open(*lane), told.steered))

    def send() -> None:
        began = time.monotonic()
        while not stop.is_set() and time.monotonic() - began < most_seconds:
            with contextlib.suppress(BlockingIOError):
                sender.send(build_frame(source, destination, told.sent))
                told.sent += 1
            stop.wait(max(0.0, began + told.sent / rate - time.monotonic()))

    def watch(peer: socket.socket, seen: set[int]) -> None:
        while not over.is_set():
            try:
                frame, address = peer.recvfrom(2_048)
            except TimeoutError:
                continue
            place = frame.find(MARK)
            if place >= 0 and address[2] != socket.PACKET_OUTGOING:
                seen.add(struct.unpack_from("!I", frame, place + len(MARK))[0])

    threads = [threading.Thread(target=send)]
    threads += [threading.Thread(target=watch, args=one) for one in watches]
    for thread in threads:
        thread.start()
    try:
        yield told
    finally:
        stop.set()
        time.sleep(0.3)  # for what is under way
        over.set()
        for thread in threads:
            thread.join()
        for peer in (sender, *(one for one, _ in watches)):
            peer.close()


def _open(namespace: str, device: str) -> socket.socket:
    peer = in_namespace(
        namespace,
        lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)),
    )
    peer.bind((device, 3))
    peer.settimeout(0.1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 2**20)
    return peer
