"""The door to OVSDB: which ports there are, live (the `ovs` package's IDL, RFC 7047).

libvirt writes ``external_ids`` `iface-id`, `attached-mac` and `vm-id` on each VM's interface. The IDL
blocks, so it lives in a thread of its own and hands frozen values out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ovs.db.error
import ovs.db.idl
import ovs.jsonrpc
import ovs.poller
import ovs.stream
import structlog

from steering.compile_canary import find_canary_macs
from steering.errors import SwitchError
from steering.model import Lane, Leg, Observed, Port
from steering.switch.secure import check_ovsdb, register
from steering.tls import TlsFiles

log = structlog.get_logger("ovsdb")

PROBE_MILLISECONDS = 3000  # of silence until it is asked, and again until it is given up

COLUMNS = {
    "Open_vSwitch": ["bridges", "ovs_version", "other_config"],
    "Bridge": ["name", "ports", "mirrors", "fail_mode", "datapath_type"],
    "Mirror": ["name", "statistics"],
    "Port": ["name", "interfaces", "tag", "trunks", "vlan_mode", "protected"],
    "Interface": [
        "name",
        "ofport",
        "external_ids",
        "mac_in_use",
        "mtu",
        "link_state",
        "bfd_status",
        "error",
    ],
}


@dataclass(frozen=True, slots=True)
class LegState:
    """Whether BFD says that the path through the lane's engine is whole, as one leg sees it.

    ``flaps``: how often that changed since BFD was set up on the leg (ovs-vswitchd.conf.db(5),
    bfd_status:flap_count). ``link_up``: its carrier; a leg's other end that is set down takes it, too.
    """

    interface: str
    forwarding: bool
    flaps: int = 0
    link_up: bool = True


@dataclass(frozen=True, slots=True)
class SwitchView:
    """What OVSDB says at one moment. ``bridge_found`` is False while the bridge does not exist.

    ``mtus`` in bytes by interface, where the switch knows one. ``super_packets``: userspace-tso-enable
    (ovs-vswitchd.conf.db(5), Open_vSwitch, other_config).
    """

    observed: Observed
    legs: tuple[LegState, ...]
    bridge_found: bool
    fail_mode: str
    ovs_version: str
    datapath_type: str
    mtus: Mapping[str, int] = field(default_factory=dict)
    super_packets: bool = False


def _first(value: Any, default: Any) -> Any:
    """OVSDB's optional columns are lists of none or one."""
    if isinstance(value, list):
        return value[0] if value else default
    return default if value is None else value


def build_view(
    idl: Any, bridge_name: str, lanes: Sequence[Lane], canary: str | None = None
) -> SwitchView:
    """The IDL's replica as frozen values. ``canary`` is the interface of Hairpin's own port."""
    version = next((_first(row.ovs_version, "") for row in _rows(idl, "Open_vSwitch")), "")
    bridge = next((row for row in _rows(idl, "Bridge") if row.name == bridge_name), None)
    if bridge is None:
        problem = f"there is no bridge {bridge_name}"
        return SwitchView(
            Observed(lanes=tuple(lanes), problems=(problem,)), (), False, "", version, ""
        )
    ports: list[Port] = []
    problems: list[str] = []
    interfaces: dict[str, Any] = {}
    wanted_legs = {leg.interface: lane for lane in lanes for leg in lane.legs}
    lane_vlans = {lane.vlan: lane for lane in lanes}
    for row in bridge.ports:
        tag = _first(row.tag, None)
        for interface in row.interfaces:
            interfaces[interface.name] = interface
            if interface.name in wanted_legs:
                lane = wanted_legs[interface.name]
                if tag != lane.vlan:
                    problems.append(
                        f"leg {interface.name} has tag {tag}, not {lane.vlan}: a flooded frame could "
                        f"enter the lane; set it with `ovs-vsctl set port {row.name} tag={lane.vlan}`"
                    )
                continue
            if interface.name == canary:
                problems += _find_canary_problems(row, interface, lane_vlans)
                continue
            port = _build_port(interface, tag, bridge_name)
            if tag in lane_vlans:
                problems.append(
                    f"port {interface.name} is in VLAN {tag}, which lane "
                    f"{lane_vlans[tag].name} uses; give one of them another VLAN"
                )
            if port is not None:
                ports.append(port)
    filled = tuple(
        replace(
            lane,
            leg_a=_fill(lane.leg_a, interfaces),
            leg_b=_fill(lane.leg_b, interfaces),
            leg_c=None if lane.leg_c is None else _fill(lane.leg_c, interfaces),
        )
        for lane in lanes
    )
    for lane in filled:
        problems += [
            f"lane {lane.name} has no leg {leg.interface} on bridge {bridge_name}"
            for leg in lane.legs
            if leg.ofport <= 0
        ]
    if canary is not None and canary not in interfaces:
        problems.append(
            f"bridge {bridge_name} has no port {canary} for canaries: no lane can be proved to inspect"
        )
    if canary is not None:
        reserved = find_canary_macs(lanes)
        problems += [
            f"port {port.interface} has MAC {port.mac}, which is a canary's: it is not steered"
            for port in ports
            if port.mac in reserved
        ]
    seen: dict[str, str] = {}
    for port in ports:
        if port.mac in seen:
            problems.append(
                f"ports {seen[port.mac]} and {port.interface} both have MAC {port.mac}: neither is "
                "steered, and where a policy names one nothing passes from or to it"
            )
        seen[port.mac] = port.interface
    legs = tuple(
        LegState(
            name,
            _is_forwarding(interfaces.get(name)),
            _find_flaps(interfaces.get(name)),
            _has_link(interfaces.get(name)),
        )
        for name in sorted(wanted_legs)
    )
    observed = Observed(
        tuple(sorted(ports, key=lambda p: p.interface)),
        filled,
        tuple(problems),
        _find_ofport(interfaces.get(canary)) if canary is not None else 0,
    )
    fail_mode = _first(bridge.fail_mode, "")
    mtus = {name: int(mtu) for name, row in interfaces.items() if (mtu := _first(row.mtu, 0))}
    wide = any(
        row.other_config.get("userspace-tso-enable") == "true" for row in _rows(idl, "Open_vSwitch")
    )
    return SwitchView(observed, legs, True, fail_mode, version, bridge.datapath_type, mtus, wide)


def find_mirrored_packets(idl: Any, bridge_name: str) -> int | None:
    """Packets sent to the bridge's mirrors for Hairpin's flow records; None without such a mirror.

    They are mirrors whose name starts with ``hairpin`` (ovs-vswitchd.conf.db(5), Mirror).
    """
    counts = [
        int(mirror.statistics.get("tx_packets", 0))
        for bridge in _rows(idl, "Bridge")
        if bridge.name == bridge_name
        for mirror in bridge.mirrors
        if mirror.name.startswith("hairpin")
    ]
    return sum(counts) if counts else None


def _rows(idl: Any, table: str) -> list[Any]:
    return list(idl.tables[table].rows.values())


def _build_port(interface: Any, tag: int | None, bridge: str) -> Port | None:
    """A VM's port; None for a port that carries no vm-id and MAC (an uplink, an internal port)."""
    ids = interface.external_ids
    mac = str(ids.get("attached-mac", "")).lower()
    vm_id = str(ids.get("vm-id", ""))[:128]
    ofport = _first(interface.ofport, 0)
    if not vm_id or not _is_unicast_mac(mac) or ofport <= 0:
        return None
    return Port(
        interface=interface.name,
        ofport=ofport,
        mac=mac,
        iface_id=str(ids.get("iface-id", ""))[:128],
        vm_id=vm_id,
        bridge=bridge,
        tag=tag,
        link_up=_first(interface.link_state, "") == "up",
    )


def _is_unicast_mac(mac: str) -> bool:
    parts = mac.split(":")
    hexadecimal = all(len(part) == 2 and set(part) <= set("0123456789abcdef") for part in parts)
    return len(parts) == 6 and hexadecimal and not int(parts[0], 16) & 1


def _fill(leg: Leg, interfaces: dict[str, Any]) -> Leg:
    return replace(leg, ofport=_find_ofport(interfaces.get(leg.interface)))


def _find_ofport(interface: Any) -> int:
    return max(_first(interface.ofport, 0), 0) if interface is not None else 0


def _find_canary_problems(
    port: Any, interface: Any, lane_vlans: Mapping[int, Lane]
) -> Iterator[str]:
    """Why NORMAL could flood into the canary's port, or what comes back could not get out of it."""
    tag, mode = _first(port.tag, None), _first(port.vlan_mode, "")
    name = interface.name
    if tag not in lane_vlans or mode not in ("", "access"):
        problem = f"tag {tag}" if mode in ("", "access") else f"vlan_mode {mode}"
        vlan = min(lane_vlans, default=0)
        yield (
            f"canary port {name} has {problem}: VMs' frames could be flooded into it; set it with "
            f"`ovs-vsctl clear port {port.name} vlan_mode -- set port {port.name} tag={vlan}`"
        )
    if _first(port.protected, False):
        yield (
            f"canary port {name} is protected, so nothing from a protected leg gets out of it; "
            f"`ovs-vsctl set port {port.name} protected=false`"
        )
    if _find_ofport(interface) <= 0:
        reason = _first(interface.error, "") or "it has no ofport"
        yield f"canary port {name} is not usable: {reason}"


def _is_forwarding(interface: Any) -> bool:
    return interface is not None and interface.bfd_status.get("forwarding") == "true"


def _has_link(interface: Any) -> bool:
    return interface is not None and _first(interface.link_state, "up") != "down"


def _find_flaps(interface: Any) -> int:
    count = interface.bfd_status.get("flap_count", "") if interface is not None else ""
    return int(count) if count.isdecimal() else 0


class OvsdbMonitor:
    """Follows OVSDB in a thread; ``on_view`` is called from that thread at each change of the view.

    With None when the connection ended; ``lost`` then says why, ``ends`` when certificates end (epoch
    seconds, by whose they are), as seen when it was last made.
    """

    def __init__(
        self,
        remote: str,
        bridge: str,
        lanes: Sequence[Lane],
        on_view: Callable[[SwitchView | None], None],
        canary: str | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        self._remote = remote
        self._tls = tls
        self.ends: dict[str, float] = {}
        self._bridge = bridge
        self._lanes = tuple(lanes)
        self._on_view = on_view
        self._canary = canary
        self.mirrored_packets: int | None = None
        self.lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ovsdb", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=3)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._check_peer()
                self._follow(read_schema(self._remote))
            except (OSError, SwitchError, ovs.db.error.Error) as fault:
                log.warning("ovsdb lost", remote=self._remote, reason=str(fault))
                self.lost = str(fault)
                self._on_view(None)
                self._stop.wait(0.3)
            except Exception:
                # A thread that ended would leave its last view standing for the present one.
                log.exception("ovsdb not followed", remote=self._remote)
                self.lost = "a fault of Hairpin's own, see the log"
                self._on_view(None)
                self._stop.wait(1.0)

    def _check_peer(self) -> None:
        """By TLS: have it said plainly what is wrong, before the package says an errno. Raises SwitchError."""
        register(self._remote, self._tls)
        if self._tls is not None and self._remote.startswith("ssl:"):
            seen = check_ovsdb(self._remote, self._tls)
            self.ends = {"our own certificate": seen.ours, "the switch's certificate": seen.theirs}

    def _follow(self, schema: Any) -> None:
        """Until stopped or disconnected. A new IDL is cheap, and is free of a stale replica."""
        helper = ovs.db.idl.SchemaHelper(schema_json=schema)
        for table, columns in COLUMNS.items():
            helper.register_columns(table, columns)
        idl = ovs.db.idl.Idl(self._remote, helper)
        # The IDL never probes a Unix socket, and a hung server would look like a quiet one.
        idl._session.reconnect.set_probe_interval(PROBE_MILLISECONDS)
        last: SwitchView | None = None
        seen = 0
        try:
            while not self._stop.is_set():
                idl.run()
                if idl.has_ever_connected():
                    # The IDL reconnects silently and says so nowhere in public.
                    if not idl._session.is_connected():
                        raise SwitchError("the connection to OVSDB ended")
                    if idl.change_seqno != seen:
                        seen = idl.change_seqno
                        self.mirrored_packets = find_mirrored_packets(idl, self._bridge)
                        view = build_view(idl, self._bridge, self._lanes, self._canary)
                        if view != last:
                            last = view
                            self._on_view(view)
                poller = ovs.poller.Poller()
                idl.wait(poller)
                poller.timer_wait(200)  # so that a stop is seen
                poller.block()
        finally:
            idl.close()


def read_schema(remote: str) -> Any:
    """The schema of the database, asked of the server itself (RFC 7047, get_schema). Raises SwitchError."""
    error, stream = ovs.stream.Stream.open_block(ovs.stream.Stream.open(remote), timeout=3000)
    if error:
        raise SwitchError(
            f"OVSDB at {remote} can't be reached: {os.strerror(error)}",
            "check that ovsdb-server runs and that this user may open the connection",
        )
    connection = ovs.jsonrpc.Connection(stream)
    try:
        request = ovs.jsonrpc.Message.create_request("get_schema", ["Open_vSwitch"])
        error, reply = connection.transact_block(request)
    finally:
        connection.close()
    if error or reply.result is None:
        raise SwitchError(f"OVSDB at {remote} gave no schema", "check that it is an ovsdb-server")
    return reply.result
