"""An EVE line -> what is stored of it, the short way: typed decoding of what matters, the rest skipped.

`parse_event` is the reference and three times as slow. Here only what a healthy engine writes is
understood; for every other line the answer is None and the reference is asked. A test holds both
together. What a row does not hold is read again from the raw event, by the reference, when an alert is
shown.
"""

from __future__ import annotations

from binascii import a2b_base64
from functools import lru_cache
from typing import Any

import msgspec

from appliance.alerts.eve import (
    PAYLOAD_LIMIT,
    RAW_LIMIT,
    URL_LIMIT,
    bound_text,
    load_event,
    normalise_address,
    normalise_protocol,
    parse_event,
    read_rule,
    read_time,
    split_torn,
    store_text,
)
from appliance.alerts.excerpt import RAW_IP, cut_segment, cut_tags, render_printable
from appliance.alerts.model import EveAlert, Malformed, Opener, Rule, Verdict
from steering.canary import SID
from steering.model import Family

_RULES_KEPT = 8192


class KnownRule:
    """A rule, found by identity: hashing its texts for each alert would cost more than reading them."""

    __slots__ = ("blocks", "rule")

    def __init__(self, rule: Rule, blocks: bool) -> None:
        self.rule = rule
        self.blocks = blocks


class Sighting(msgspec.Struct, gc=False):
    """An alert on its way into the store. ``raw`` has no line break; ``url`` and ``printable`` are

    what text is looked for in. ``event`` is set where the reference parsed it and ``raw`` does not
    tell all of it (it was shrunk), or where more than a row is asked of it (canaries).
    """

    at: float
    source_address: str | None
    destination_address: str | None
    source_port: int | None
    destination_port: int | None
    protocol: str
    family: Family | None
    opener: Opener | None
    blocked: bool
    known: KnownRule
    url: str
    printable: str
    raw: bytes
    event: EveAlert | None = None
    shrunk: bool = False


class _Flow(msgspec.Struct, gc=False):
    src_ip: str | msgspec.UnsetType | None = msgspec.UNSET
    src_port: Any = None


class _Http(msgspec.Struct, gc=False):
    url: Any = None


class _PacketInfo(msgspec.Struct, gc=False):
    linktype: Any = None


class _Verdict(msgspec.Struct, gc=False):
    action: Any = None


class _Event(msgspec.Struct, gc=False):
    event_type: str
    timestamp: str = ""
    alert: msgspec.Raw = msgspec.Raw()
    src_ip: str | None = None
    src_port: Any = None
    dest_ip: str | None = None
    dest_port: Any = None
    proto: str = ""
    direction: Any = None
    flow: _Flow | None = None
    http: _Http | None = None
    stream: Any = None
    vlan: Any = None
    pkt_src: Any = None
    packet: msgspec.Raw = msgspec.Raw()
    packet_info: _PacketInfo | None = None
    payload: msgspec.Raw = msgspec.Raw()
    payload_printable: str | None = None
    verdict: _Verdict | None = None


_decode = msgspec.json.Decoder(_Event).decode
_rules: dict[bytes, KnownRule] = {}
_normalise_address = lru_cache(maxsize=65_536)(normalise_address)


@lru_cache(maxsize=256)
def _normalise_protocol(name: str) -> str:
    return normalise_protocol(bound_text(name, 32))


def parse_line(line: bytes) -> tuple[Sighting | Malformed, ...]:
    """What a line holds: nothing for other events, one alert, or a torn event and one behind it."""
    quick = parse_quickly(line)
    if quick is not None:
        return quick
    event = parse_event(line)
    torn = split_torn(line) if isinstance(event, Malformed) else None
    # The part before may be whole, and only its newline missing.
    events = (event,) if torn is None else tuple(map(parse_event, torn))
    return tuple(
        event if isinstance(event, Malformed) else sight(event)
        for event in events
        if event is not None
    )


def parse_quickly(line: bytes) -> tuple[Sighting, ...] | None:
    """As `parse_line`, None where the reference must be asked."""
    if len(line) > RAW_LIMIT:
        return None
    try:
        event = _decode(line)
        if event.event_type != "alert":
            return ()
        known = _find_rule(event.alert)
        if known is None:
            return None
        source = _normalise_address(event.src_ip) if event.src_ip else None
        destination = _normalise_address(event.dest_ip) if event.dest_ip else None
        source_port = _check_port(event.src_port)
        destination_port = _check_port(event.dest_port)
        opener = _find_opener(event, source, source_port, destination, destination_port)
        printable = _read_printable(event)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    at = _read_time(event.timestamp)
    if at is None:
        return None
    address = source or destination
    url = event.http.url if event.http is not None else None
    return (
        Sighting(
            at,
            source,
            destination,
            source_port,
            destination_port,
            _normalise_protocol(event.proto),
            None if address is None else Family.IPV6 if ":" in address else Family.IPV4,
            opener,
            known.blocks or (event.verdict is not None and event.verdict.action == "drop"),
            known,
            bound_text(url, URL_LIMIT) if isinstance(url, str) else "",
            printable,
            line,
        ),
    )


def sight(event: EveAlert) -> Sighting:
    """What the reference parsed, as the short way would have given it."""
    rule = Rule(event.signature, event.cves, event.affected_products)
    blocked = event.verdict is Verdict.BLOCKED
    raw = event.raw.encode()
    again = parse_event(raw)
    return Sighting(
        event.at,
        event.source_address,
        event.destination_address,
        event.source_port,
        event.destination_port,
        event.protocol,
        event.family,
        event.opener,
        blocked,
        KnownRule(rule, blocked),
        event.http.url if event.http else "",
        event.payload_printable,
        raw,
        event,
        again != event,
    )


def _find_rule(raw: msgspec.Raw) -> KnownRule | None:
    key = bytes(raw)
    known = _rules.get(key)
    if known is None:
        alert = load_event(key.decode())
        rule = read_rule(alert)
        # An alert of the canary's rule is looked at as a whole.
        if rule is None or rule.signature.sid == SID:
            return None
        if len(_rules) >= _RULES_KEPT:
            _rules.clear()
        known = _rules[key] = KnownRule(rule, alert.get("action") == "blocked")
    return known


def _find_opener(
    event: _Event,
    source: str | None,
    source_port: int | None,
    destination: str | None,
    destination_port: int | None,
) -> Opener | None:
    flow = event.flow
    if flow is not None and flow.src_ip is not msgspec.UNSET:
        text, port = flow.src_ip, flow.src_port
        if text and text == event.src_ip and port == source_port and type(port) is int:
            return Opener.SOURCE
        address = source if text == event.src_ip else _normalise_address(text) if text else None
        port = _check_port(flow.src_port)
        if address == source and port == source_port:
            return Opener.SOURCE
        if address == destination and port == destination_port:
            return Opener.DESTINATION
    if event.direction == "to_server":
        return Opener.SOURCE
    return Opener.DESTINATION if event.direction == "to_client" else None


def _read_printable(event: _Event) -> str:
    """Raises ValueError where base64 is written in a way that only the reference reads."""
    printable = event.payload_printable or ""
    if event.stream == 1 and event.packet_info is not None and event.packet_info.linktype == RAW_IP:
        packet = cut_tags(_read_base64(event.packet), event.vlan, event.pkt_src)
        segment = cut_segment(packet)
        if segment:
            if not _read_base64(event.payload).endswith(segment):
                printable += render_printable(segment)
            return store_text(printable[-PAYLOAD_LIMIT:])
    return store_text(printable[:PAYLOAD_LIMIT])


def _read_base64(raw: msgspec.Raw) -> bytes:
    text = bytes(raw)
    if not text:
        return b""
    if text[:1] != b'"':
        raise ValueError("no text")
    return a2b_base64(text[1:-1], strict_mode=True)


def _read_time(text: str) -> float | None:
    """As `read_time`: the second is looked up, its fraction added."""
    fraction = text[20:26]
    if len(text) != 31 or text[19] != "." or not (fraction.isascii() and fraction.isdigit()):
        return read_time(text)
    second = _read_second(text[:19] + text[26:])
    return None if second is None else (second * 1_000_000 + int(fraction)) / 1_000_000


@lru_cache(maxsize=4096)
def _read_second(text: str) -> int | None:
    at = read_time(text)
    return None if at is None else int(at)


def _check_port(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= 65_535 else None
