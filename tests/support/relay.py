"""Joins its standard input and output, a socket that QEMU gave it, to a TCP port on loopback. Arguments: the port."""

from __future__ import annotations

import os
import select
import socket
import sys

CHUNK = 65536


def main(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as link:
        # With its timeout it would not block, and a full buffer would be an error.
        link.setblocking(True)
        ours = {0: link.fileno(), link.fileno(): 1}
        while True:
            for source in select.select(list(ours), [], [])[0]:
                piece = os.read(source, CHUNK)
                if not piece:
                    return
                view = memoryview(piece)
                while view:
                    view = view[os.write(ours[source], view) :]


if __name__ == "__main__":
    main(int(sys.argv[1]))
