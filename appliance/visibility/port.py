"""The door to the mirror port's device: one AF_PACKET socket that counts and sends.

It counts without reading: the kernel counts every frame it offers to the socket, also those
that find the (tiny) receive buffer full. Source: packet(7), PACKET_STATISTICS.
"""

from __future__ import annotations

import errno
import socket
import struct

from steering.errors import HairpinError

_SOL_PACKET = 263
_PACKET_ADD_MEMBERSHIP = 1
_PACKET_STATISTICS = 6
_PACKET_IGNORE_OUTGOING = 23
_PACKET_MR_PROMISC = 1
_ETH_P_ALL = 3
_GONE = (errno.ENODEV, errno.ENXIO)


class MirrorPort:
    """Raises HairpinError when the device is missing or the socket is not allowed."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._packets = 0
        try:
            index = socket.if_nametoindex(device)
        except OSError as fault:
            raise HairpinError(
                f"no device {device} for flow records", "set visibility.device to the mirror port's"
            ) from fault
        try:
            # Protocol 0 counts nothing until the options are set and bind names the protocol.
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        except PermissionError as fault:
            raise HairpinError(
                "capturing is not allowed", "run `hairpin observe` with CAP_NET_RAW"
            ) from fault
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        # What is sent out of the device (heartbeats) is no mirrored traffic.
        self._socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        promiscuous = struct.pack("iHH8s", index, _PACKET_MR_PROMISC, 0, b"")
        self._socket.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, promiscuous)
        self._socket.bind((device, _ETH_P_ALL))

    def count_packets(self) -> int:
        """Frames that came in since this was made."""
        # The figure includes the frames that found the buffer full; reading it resets it.
        packets, _ = struct.unpack(
            "II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        )
        self._packets += packets
        return self._packets

    def send(self, frame: bytes) -> bool:
        """Send a frame out of the device; False while its link is down or its queue full.

        Raises HairpinError when the device is gone.
        """
        try:
            self._socket.send(frame)
        except OSError as fault:
            if fault.errno in _GONE:
                raise HairpinError(f"the device {self._device} is gone") from fault
            return False
        return True

    def close(self) -> None:
        self._socket.close()
