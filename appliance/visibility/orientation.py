"""Who opened a flow that is told in pieces.

nfstream calls the sender of a piece's first packet its source, so the second piece of a download
could begin with the server. The first piece knows better; it is remembered here.
"""

from __future__ import annotations

from collections import OrderedDict

from appliance.visibility.record import FlowRecord, build_flipped

_Key = tuple[int, int, str, int, str, int]


def _key(record: FlowRecord) -> _Key:
    return (
        record.vlan,
        record.protocol_number,
        record.src_address,
        record.src_port,
        record.dst_address,
        record.dst_port,
    )


class Orientation:
    """Keeps the pieces of one flow the same way round; remembers at most ``limit`` flows."""

    def __init__(self, limit: int = 65536) -> None:
        self._limit = limit
        self._open: OrderedDict[_Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def build_oriented(self, record: FlowRecord) -> FlowRecord:
        """``record``, flipped if an earlier piece of the flow was the other way round."""
        flipped = build_flipped(record)
        if _key(flipped) in self._open:
            record = flipped
        key = _key(record)
        self._open.pop(key, None)
        if record.reason == "active":
            self._open[key] = None
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        return record
