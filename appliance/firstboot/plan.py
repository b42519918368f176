"""Seed, devices and time -> the files to write, or every fault. Pure: nothing is looked up, nothing written.

All or nothing: a plan exists only where nothing is wrong. `settings.yaml` stands last in it: what the other
processes wait for is written when all that it names is there.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from appliance.firstboot.certificates import (
    Pair,
    Verdict,
    find_fingerprint,
    judge_authority,
    judge_pair,
    rewrite_certificates,
    rewrite_key,
)
from appliance.firstboot.document import (
    DeviceSeed,
    ExportSeed,
    ManagementSeed,
    SeedDocument,
    find_macs,
)
from appliance.firstboot.faults import Fault
from appliance.firstboot.network import Device, render_management, render_silent
from appliance.inspection.files import EVE_KEPT
from appliance.paths import IMAGE_CERTIFICATE
from appliance.settings import parse_settings
from steering.errors import WrongInput

CONFIG_DIR = "/run/hairpin-config"
NETWORK_DIR = "/run/systemd/network"
STATE_DIR = "/var/lib/hairpin"
RUN_DIR = "/run/hairpin"
SETTINGS = f"{CONFIG_DIR}/settings.yaml"
EVE_BUDGET = 144 * 2**20
"""Bytes for all EVE files. They lie in /run, which is memory, a fifth of the VM's (systemd's own bound): 400 MiB of
2 GiB. Full, the engines lose events and nobody can tell; in /var each alert would be written to the disk twice."""
_DEVICE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")

OwnerName = Literal["root", "hairpin"]


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """``owner`` `hairpin` is the management service's user."""

    path: str
    text: str
    mode: int = 0o644
    owner: OwnerName = "root"

    def __repr__(self) -> str:
        return (
            f"PlannedFile({self.path!r}, {len(self.text)} characters, {self.mode:o}, {self.owner})"
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """``files`` in the order they are written in; ``notes`` are for the console: what is fine but odd.
    ``fingerprint``: of the API's certificate."""

    name: str
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    fingerprint: str


def build_plan(
    seed: SeedDocument,
    devices: Sequence[Device],
    own_pair: Pair | None,
    now: float,
    *,
    accepted: bool,
) -> Plan | tuple[Fault, ...]:
    """What this seed asks for on a machine with these devices.

    ``own_pair``: the appliance's own certificate, wanted where the seed has none. ``accepted``: this very
    seed was accepted before, so that a certificate that has expired since is told and not refused: a lane
    that inspects must not be lost for it.
    """
    found, faults = find_devices(seed, devices)
    notes: list[str] = []
    for verdict in _judge_certificates(seed, now):
        faults += verdict.faults
        if accepted:
            notes += [str(one) for one in verdict.dated]
        else:
            faults += verdict.dated
    api_pair = own_pair
    if seed.api.certificate is not None and seed.api.key is not None:
        api_pair = Pair(seed.api.certificate, seed.api.key)
    if api_pair is None:
        raise ValueError("neither the seed nor the caller has a certificate for the API")
    if faults:
        return tuple(faults)
    settings = yaml.safe_dump(_build_settings(seed, found), sort_keys=False)
    try:
        parse_settings(settings)
    except WrongInput as wrong:
        mend = "see docs/first-boot.md and docs/settings.md"
        return tuple(Fault(one.path, one.reason, mend) for one in wrong.faults)
    return Plan(
        name=seed.name,
        files=(
            *_build_network(seed, found),
            *_build_credentials(seed, api_pair),
            PlannedFile(SETTINGS, settings),
        ),
        notes=tuple(notes),
        fingerprint=find_fingerprint(api_pair.certificate),
    )


def find_devices(
    seed: SeedDocument, devices: Sequence[Device]
) -> tuple[Mapping[str, Device], list[Fault]]:
    """The device of each MAC address that the seed names, and what is missing or not to be told apart."""
    found: dict[str, Device] = {}
    faults: list[Fault] = []
    for path, mac in find_macs(seed):
        match = find_device(path, mac, devices)
        if isinstance(match, Fault):
            faults.append(match)
        else:
            found[mac] = match
    return found, faults


def find_device(path: str, mac: str, devices: Sequence[Device]) -> Device | Fault:
    """The one device with this address, or why there is none."""
    matches = [device for device in devices if device.mac == mac]
    if len(matches) > 1:
        names = ", ".join(device.name for device in matches)
        mend = "give each device of the VM an address of its own"
        return Fault(path, f"more than one device has {mac}: {names}", mend)
    if not matches:
        present = ", ".join(f"{device.name} {device.mac}" for device in devices[:20]) or "none"
        mend = "attach a network device with this address, or correct it in the seed"
        return Fault(path, f"no device has {mac}; there are: {present}", mend)
    if not _DEVICE_NAME.fullmatch(matches[0].name):
        return Fault(path, f"the device's name {matches[0].name!r} is not usable", "rename it")
    return matches[0]


def build_management_files(management: ManagementSeed, device: Device) -> tuple[PlannedFile, ...]:
    """The management network alone."""
    text = render_management(management, device)
    return (PlannedFile(f"{NETWORK_DIR}/10-hairpin-management.network", text),)


def _build_network(seed: SeedDocument, found: Mapping[str, Device]) -> Iterator[PlannedFile]:
    yield from build_management_files(seed.management, found[seed.management.mac])
    mirror = seed.visibility.mac if seed.visibility else None
    silent = [found[mac] for _, mac in find_macs(seed) if mac not in (seed.management.mac, mirror)]
    path = f"{NETWORK_DIR}/20-hairpin-lanes.network"
    yield PlannedFile(path, render_silent(silent, up=False))
    if mirror is not None:
        path = f"{NETWORK_DIR}/21-hairpin-mirror.network"
        yield PlannedFile(path, render_silent([found[mirror]], up=True))


def _judge_certificates(seed: SeedDocument, now: float) -> Iterator[Verdict]:
    switch = seed.switch
    if seed.api.certificate is not None and seed.api.key is not None:
        yield judge_pair("api", Pair(seed.api.certificate, seed.api.key), now, "server")
    yield judge_authority("switch.ca", switch.ca, now)
    yield judge_pair("switch", Pair(switch.certificate, switch.key), now, "client")
    for number, one in enumerate(seed.export):
        if one.ca is not None:
            yield judge_authority(f"export[{number}].ca", one.ca, now)
        if one.certificate is not None and one.key is not None:
            yield judge_pair(f"export[{number}]", Pair(one.certificate, one.key), now, "client")


def _build_credentials(seed: SeedDocument, api: Pair) -> Iterator[PlannedFile]:
    yield _public("api.pem", api.certificate)
    yield _key("api.key", api.key)
    yield _public("switch-ca.pem", seed.switch.ca)
    yield _public("switch.pem", seed.switch.certificate)
    yield _key("switch.key", seed.switch.key)
    for one in seed.export:
        if one.ca is not None:
            yield _public(f"export-{one.name}-ca.pem", one.ca)
        if one.certificate is not None and one.key is not None:
            yield _public(f"export-{one.name}.pem", one.certificate)
            yield _key(f"export-{one.name}.key", one.key)
    yield _secret(f"{STATE_DIR}/token", seed.api.token)
    yield PlannedFile(f"{CONFIG_DIR}/client.json", _render_client(seed), 0o600)


def _render_client(seed: SeedDocument) -> str:
    """For root's commands on the appliance itself: by loopback, which the certificate need not name."""
    host = "[::1]" if find_listen(seed.management) == "::" else "127.0.0.1"
    client = {
        "url": f"https://{host}:{seed.api.port}",
        "tokenFile": f"{STATE_DIR}/token",
        "certificateFile": f"{CONFIG_DIR}/api.pem",
    }
    return json.dumps(client) + "\n"


def _public(name: str, text: str) -> PlannedFile:
    return PlannedFile(f"{CONFIG_DIR}/{name}", rewrite_certificates(text))


def _key(name: str, text: str) -> PlannedFile:
    return _secret(f"{CONFIG_DIR}/{name}", rewrite_key(text))


def _secret(path: str, text: str) -> PlannedFile:
    return PlannedFile(path, text.rstrip("\n") + "\n", 0o600, "hairpin")


def find_listen(management: ManagementSeed) -> str:
    """All addresses of the management network's family: no other device has any, and the loopback's is there,
    by which the console asks."""
    if management.address is None or ipaddress.ip_interface(management.address).version == 4:
        return "0.0.0.0"  # noqa: S104 - see above
    return "::"


def _build_settings(seed: SeedDocument, found: Mapping[str, Device]) -> dict[str, Any]:
    def build_leg(leg: DeviceSeed) -> dict[str, str]:
        return {"interface": leg.interface, "device": found[leg.mac].name}

    lanes = []
    for lane in seed.lanes:
        one: dict[str, Any] = {"profile": str(lane.profile), "vlan": lane.vlan}
        if lane.queues is not None:
            one["queues"] = list(lane.queues)
        one["legA"], one["legB"] = build_leg(lane.leg_a), build_leg(lane.leg_b)
        if lane.leg_c is not None:
            one["legC"] = build_leg(lane.leg_c)
        lanes.append(one)
    settings: dict[str, Any] = {
        "apiVersion": "hairpin/v1",
        "kind": "Settings",
        "name": seed.name,
        "stateDir": STATE_DIR,
        "runDir": RUN_DIR,
        "switch": {
            "ovsdb": seed.switch.ovsdb,
            "openflow": seed.switch.openflow,
            "bridge": seed.switch.bridge,
            "tls": {
                "caFile": f"{CONFIG_DIR}/switch-ca.pem",
                "certFile": f"{CONFIG_DIR}/switch.pem",
                "keyFile": f"{CONFIG_DIR}/switch.key",
                "serverName": seed.switch.server_name,
            },
        },
        "lanes": lanes,
        "inspection": {"eveLimitBytes": find_eve_limit(len(lanes))},
        "rules": _build_rules(seed),
        "store": _dump(seed.store),
        "api": {
            "listen": find_listen(seed.management),
            "port": seed.api.port,
            "certFile": f"{CONFIG_DIR}/api.pem",
            "keyFile": f"{CONFIG_DIR}/api.key",
        },
        "export": [_build_export(one) for one in seed.export],
    }
    if seed.canary is not None:
        settings["canary"] = {
            **build_leg(seed.canary),
            "everySeconds": seed.canary.every_seconds,
        }
    if seed.visibility is not None:
        settings["visibility"] = {"device": found[seed.visibility.mac].name}
    return settings


def find_eve_limit(lanes: int) -> int:
    """Bytes at which a lane's EVE file is rotated: it, and as many as are kept unread, for each lane."""
    return EVE_BUDGET // (lanes * (EVE_KEPT + 1))


def _build_rules(seed: SeedDocument) -> dict[str, Any]:
    """As the seed says; without a word on it, the bundle of the image's own disk is taken, too."""
    rules = _dump(seed.rules)
    if seed.rules.bundle is None:
        rules["bundle"] = {"certificate": str(IMAGE_CERTIFICATE)}
    return rules


def _dump(section: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = section.model_dump(mode="json", by_alias=True)
    return dumped


def _build_export(one: ExportSeed) -> dict[str, Any]:
    export: dict[str, Any] = {
        "name": one.name,
        "transport": one.transport,
        "host": one.host,
        "port": one.port,
    }
    if one.ca is not None:
        export["caFile"] = f"{CONFIG_DIR}/export-{one.name}-ca.pem"
    if one.certificate is not None:
        export["certFile"] = f"{CONFIG_DIR}/export-{one.name}.pem"
        export["keyFile"] = f"{CONFIG_DIR}/export-{one.name}.key"
    return export
