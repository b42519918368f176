"""`hairpin firstboot`: at every boot, before all else of Hairpin. Reads, decides, writes; or tells what is wrong.

With any fault nothing of the seed comes into force: no settings are written, so nothing else starts, no
engine answers BFD, and the switch does what each policy's `onFailure` says. One exception: the
management network, where its own part has no fault, so that the faults can be asked for.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from appliance.firstboot import certificates, door, write
from appliance.firstboot.certificates import Pair
from appliance.firstboot.document import DEFAULT_PORT, SeedDocument, find_macs
from appliance.firstboot.faults import Fault, FaultReport, SeedRefused, render_report
from appliance.firstboot.network import Device
from appliance.firstboot.offer import (
    SEED_CREDENTIAL,
    Choice,
    Kept,
    Offered,
    build_kept,
    build_mapping,
    choose,
    parse_kept,
    read_offer,
    render_kept,
)
from appliance.firstboot.parse import DEFAULT_NAME, SeedReading, read_seed
from appliance.firstboot.places import Places
from appliance.firstboot.plan import (
    Plan,
    PlannedFile,
    build_management_files,
    build_plan,
    find_device,
)
from appliance.version import find_version
from steering.errors import HairpinError

log = structlog.get_logger("firstboot")

KEPT_LIMIT = 4 * 2**20
NO_SEED = Fault(
    "(seed)",
    f"there is none: neither the credential {SEED_CREDENTIAL} nor a disk with the label CIDATA",
    "give the VM one and restart it (docs/first-boot.md)",
)


@dataclass(frozen=True, slots=True)
class Doors:
    """What first boot does to the machine beside its files; tests that may not rename it pass their own."""

    read_offered: Callable[[Path], Offered] = door.read_offered
    wait_for_devices: Callable[[Sequence[str]], tuple[tuple[Device, ...], tuple[Fault, ...]]] = (
        door.wait_for_devices
    )
    find_owner: write.FindOwner = write.find_owner
    set_host_name: Callable[[str], None] = write.set_host_name
    clock: Callable[[], float] = time.time


def run_firstboot(places: Places, doors: Doors | None = None) -> Plan:
    """Configure this appliance. Raises SeedRefused after writing `faults.json`, for whatever is wrong."""
    doors = doors or Doors()
    reading: SeedReading | None = None
    try:
        write.remove_config(places)
        kept, damaged = read_kept(places)
        offer, faults = read_offer(doors.read_offered(places.credentials))
        choice = choose(offer, kept)
        if choice is not None:
            # Of an offer that can't be read, what was accepted tells at least where to show its faults.
            reading = read_seed(build_mapping(choice.offer))
            faults = faults or reading.faults
        elif not faults:
            faults = damaged or (NO_SEED,)
        if choice is None or reading is None or reading.document is None or faults:
            raise SeedRefused(faults)
        plan, fresh = _plan(places, reading.document, choice, doors)
        if fresh is not None:
            # Only now: a seed that is refused must not cost the certificate that clients know.
            keep_own_pair(places, fresh)
        _put_in_force(places, plan, choice, kept, doors)
    except SeedRefused as refused:
        _tell(places, refused.told, reading, doors)
        raise
    except (HairpinError, OSError) as fault:
        reason = fault.reason if isinstance(fault, HairpinError) else str(fault)
        mend = fault.mend if isinstance(fault, HairpinError) else ""
        told = (Fault("(first boot)", reason, mend or "see `journalctl -u hairpin-firstboot`"),)
        _tell(places, told, reading, doors)
        raise SeedRefused(told) from fault
    except Exception as fault:
        reason = f"a fault of the program: {type(fault).__name__}"
        mend = "see `journalctl -u hairpin-firstboot`, and report it"
        _tell(places, (Fault("(first boot)", reason, mend),), reading, doors)
        raise
    log.info("seed in force", name=plan.name, origin=choice.origin, digest=choice.offer.digest[:16])
    return plan


def read_kept(places: Places) -> tuple[Kept | None, tuple[Fault, ...]]:
    """What was accepted at an earlier boot. Damage is a fault only where nothing else is offered."""
    try:
        return parse_kept(door.read_regular(places.kept, KEPT_LIMIT)), ()
    except FileNotFoundError:
        return None, ()
    except (OSError, ValueError) as fault:
        log.error("what was accepted is damaged", path=str(places.kept), reason=str(fault))
        mend = "give the VM its seed again and restart it"
        return None, (Fault("(seed)", f"none is offered, and what was accepted: {fault}", mend),)


def _plan(
    places: Places, seed: SeedDocument, choice: Choice, doors: Doors
) -> tuple[Plan, Pair | None]:
    """With our own certificate, where it was made just now. Raises SeedRefused."""
    devices, faults = doors.wait_for_devices([mac for _, mac in find_macs(seed)])
    if faults:
        raise SeedRefused(faults)
    now = doors.clock()
    own = fresh = None
    if seed.api.certificate is None:
        address = seed.management.address.partition("/")[0] if seed.management.address else None
        own = read_own_pair(places, seed.name, address, now)
        if own is None:
            own = fresh = certificates.make_pair(seed.name, address, now)
    accepted = choice.origin != "new"
    plan = build_plan(seed, devices, own, now, accepted=accepted)
    if not isinstance(plan, Plan):
        raise SeedRefused(plan)
    return plan, fresh


def _find_own_paths(places: Places) -> tuple[Path, Path]:
    return places.kept_dir / "api.pem", places.kept_dir / "api.key"


def read_own_pair(places: Places, name: str, address: str | None, now: float) -> Pair | None:
    """The appliance's own certificate of an earlier boot; None where there is none that fits."""
    try:
        pair = Pair(*(door.read_regular(path).decode() for path in _find_own_paths(places)))
        if certificates.is_usable(pair, name, address, now):
            return pair
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as fault:
        log.warning("our own certificate is damaged, a new one is made", reason=str(fault))
    return None


def keep_own_pair(places: Places, pair: Pair) -> None:
    """For the boots to come. Raises HairpinError."""
    paths = _find_own_paths(places)
    try:
        _make_kept_dir(places)
        for path, text in zip(paths, (pair.certificate, pair.key), strict=True):
            write.write_file(path, text, 0o600, (os.geteuid(), os.getegid()))
    except OSError as fault:
        raise HairpinError(
            f"the API's certificate can't be kept: {fault.strerror}", "check the disk of /var"
        ) from fault
    log.info("certificate made", fingerprint=certificates.find_fingerprint(pair.certificate))


def _make_kept_dir(places: Places) -> None:
    write.make_directory(places.kept_dir.parent)
    places.kept_dir.mkdir(exist_ok=True, mode=0o700)
    places.kept_dir.chmod(0o700)


def _put_in_force(
    places: Places, plan: Plan, choice: Choice, kept: Kept | None, doors: Doors
) -> None:
    """Everything, the settings last: what the other processes wait for. Raises HairpinError, OSError."""
    *files, settings = plan.files
    now = doors.clock()
    accepted_at = kept.accepted_at if kept is not None and choice.origin != "new" else now
    record = {
        "name": plan.name,
        "origin": choice.origin,
        "acceptedAt": accepted_at,
        "digest": choice.offer.digest,
        "notes": plan.notes,
        "fingerprint": plan.fingerprint,
    }
    _make_kept_dir(places)
    write.write_files(places, files, doors.find_owner)
    write.write_file(places.boot_record, json.dumps(record) + "\n", 0o644, doors.find_owner("root"))
    doors.set_host_name(plan.name)
    if choice.origin == "new":
        fresh = build_kept(choice.offer, now, find_version())
        write.write_file(places.kept, render_kept(fresh), 0o600, doors.find_owner("root"))
    write.write_files(places, [settings], doors.find_owner)


def _tell(
    places: Places, faults: tuple[Fault, ...], reading: SeedReading | None, doors: Doors
) -> None:
    """Leave nothing but the faults, and the management network if that part has none."""
    for fault in faults:
        log.error("seed refused", path=fault.path, reason=fault.reason, mend=fault.mend)
    report = FaultReport(
        name=reading.name if reading else DEFAULT_NAME,
        version=find_version(),
        at=doors.clock(),
        reachable=False,
        port=reading.port if reading else DEFAULT_PORT,
        faults=faults,
    )
    files: tuple[PlannedFile, ...] = ()
    try:
        write.remove_config(places)
        if reading is not None and reading.management is not None:
            devices, _ = doors.wait_for_devices([reading.management.mac])
            device = find_device("management.mac", reading.management.mac, devices)
            if isinstance(device, Device):
                files = build_management_files(reading.management, device)
        write.write_files(places, files, doors.find_owner)
        report = replace(report, reachable=bool(files))
    except (HairpinError, OSError) as fault:
        log.error("the management network can't be configured", reason=str(fault))
    text = render_report(report)
    try:
        write.make_directory(places.config_dir)
        write.write_file(places.faults, text, 0o644, (os.geteuid(), os.getegid()))
    except OSError as fault:
        # Without it `/health` says that first boot was not finished; the journal has the faults.
        log.error("the faults can't be written", path=str(places.faults), reason=str(fault))
