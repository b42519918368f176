"""`hairpin image`: verify, sign, refresh, rules, extract, update, check, boots."""

from __future__ import annotations

import asyncio
import json as jsonlib
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from appliance.commands import options
from appliance.commands.image_documents import (
    BootReport,
    BootVersionList,
    BootVersionReport,
    BundleReport,
    BundleSourceReport,
    ImageFinding,
    ImageReport,
    ReleaseReport,
    SignReport,
)
from appliance.commands.output import (
    JSON_WANTED,
    clean,
    print_json,
    print_line,
    print_note,
    print_table,
    render_time,
)
from appliance.commands.targets import make_empty, open_new
from appliance.paths import BOOT_REPORT, IMAGE_CERTIFICATE
from steering.errors import FieldError, HairpinError, WrongInput

if (
    TYPE_CHECKING
):  # each command imports what it needs: starting up is most of what most of them take
    from cryptography.x509 import Certificate as X509

    from appliance.image.boots import BootVersion
    from appliance.image.bundle import Bundle
    from appliance.image.manifest import Manifest
    from appliance.image.update import Release

app = typer.Typer(
    help="Verify an image that does not run, refresh its rules, update the appliance.",
    no_args_is_help=True,
)

Image = Annotated[
    Path, typer.Argument(metavar="FILE", help="A disk: raw, qcow2 or a block device.")
]
Certificates = Annotated[
    list[Path] | None,
    typer.Option(
        "--certificate",
        metavar="CERT",
        help="Certificates (PEM) that are trusted; may be given again. On an appliance: its own.",
    ),
]
Key = Annotated[
    Path, typer.Option("--key", metavar="KEY", help="Private key (PEM): RSA, ECDSA or Ed25519.")
]
Certificate = Annotated[
    Path, typer.Option("--certificate", metavar="CERT", help="The key's certificate (PEM).")
]
Ran = Annotated[
    bool,
    typer.Option(
        "--ran", help="An appliance has run on it: what it writes itself is not measured."
    ),
]
Suricata = Annotated[
    Path, typer.Option("--suricata", metavar="PROGRAM", help="What the rules are tried with.")
]

REPLACED_OTHER = (
    "a bundle by another key was there: an appliance that trusts that one alone does not use this"
)
AGE_NOTED_DAYS = 30


def _note(text: str) -> None:
    if not JSON_WANTED.get():
        print_note(f"{text} ...")


@app.command("verify")
def verify(
    file: Image,
    certificate: Certificates = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            metavar="FILE",
            help="What `image sign` made. Without it, what has no signature of its own is told as unsigned.",
        ),
    ] = None,
    ran: Ran = False,
    minimum_version: Annotated[
        str | None,
        typer.Option(
            "--minimum-version",
            metavar="VERSION",
            help="An older version that can boot is a difference; any that is signed does if none.",
        ),
    ] = None,
    minimum_serial: Annotated[
        int | None,
        typer.Option(
            "--minimum-serial",
            min=1,
            max=2**53 - 1,
            help="Rules of a lower serial number, or none, are a difference.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Tell every difference between an image and what was signed; status 1 if there is one."""
    from appliance.image.disk import open_to_read
    from appliance.image.minimum import Minimum, list_not_compared, require_minimum
    from appliance.image.model import VERSION
    from appliance.image.update import compare_versions
    from appliance.image.verify import Wanted, verify_image

    trusted = _read_trusted(certificate)
    if minimum_version is not None and not VERSION.fullmatch(minimum_version):
        raise WrongInput([FieldError("--minimum-version", f"{minimum_version!r} is no version")])
    told = None if manifest is None else _read_manifest(manifest, trusted)
    wanted, minimum = Wanted(trusted, told, ran), Minimum(minimum_version, minimum_serial)
    with open_to_read(file, _note) as disk:
        verdict = verify_image(disk, wanted, _note)
    verdict = require_minimum(verdict, minimum, compare_versions)
    not_compared = list_not_compared(verdict, wanted, minimum)
    if json:
        findings = tuple(
            ImageFinding(
                place=one.place, status=one.status.value, detail=one.detail, signer=one.signer
            )
            for one in verdict.findings
        )
        report = ImageReport(
            good=verdict.good,
            versions=verdict.versions,
            serials=verdict.serials,
            findings=findings,
            not_compared=not_compared,
        )
        print_json(report)
    else:
        rows = [(one.status, one.place, one.detail, one.signer) for one in verdict.findings]
        print_table(("status", "what", "found", "signed by"), rows, "nothing was found")
        bad = sum(not one.good for one in verdict.findings)
        for one in not_compared:
            print_line(f"not compared: {one}")
        what = "all else" if not_compared else "everything"
        print_line(f"{what} is as it was signed" if verdict.good else f"{bad} differences")
    if not verdict.good:
        raise typer.Exit(1)


def _read_trusted(paths: list[Path] | None) -> tuple[X509, ...]:
    from appliance.image.signing import read_certificates

    if not paths and not IMAGE_CERTIFICATE.exists():
        raise WrongInput(
            [FieldError("--certificate", "must be given: who is trusted to have signed?")]
        )
    paths = paths or [IMAGE_CERTIFICATE]
    return tuple(one for path in paths for one in read_certificates(path))


@app.command("sign")
def sign(
    file: Image,
    key: Key,
    certificate: Certificate,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FILE", help="The manifest's file; FILE.manifest if none."
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Write the signed manifest of an image as it was built, for `image verify --manifest`."""
    from appliance.image.disk import open_to_read
    from appliance.image.sealing import build_from
    from appliance.image.signing import read_pair

    pair = read_pair(key, certificate)
    target = output or file.with_name(f"{file.name}.manifest")
    with open_new(target, file) as put, open_to_read(file, _note) as disk:
        sealed, manifest = build_from(disk, pair[0], pair[1], time.time(), _note)
        put(sealed)
    report = SignReport(manifest=str(target), version=manifest.version, files=len(manifest.files))
    if json:
        return print_json(report)
    print_line(f"{target}: version {report.version}, {report.files} files of the boot partition")


def _read_manifest(path: Path, trusted: tuple[X509, ...]) -> Manifest:
    from appliance.image.manifest import MANIFEST_LIMIT, open_manifest
    from appliance.image.model import Damaged

    try:
        with open(path, "rb") as opened:
            data = opened.read(MANIFEST_LIMIT + 1)
    except OSError as fault:
        raise WrongInput([FieldError(str(path), fault.strerror or str(fault))]) from fault
    try:
        return open_manifest(data, trusted)[0]
    except Damaged as fault:
        raise WrongInput([FieldError(str(path), fault.reason)], fault.mend) from fault


@app.command("refresh")
def refresh(
    file: Image,
    rules: Annotated[
        Path,
        typer.Option(
            "--rules",
            metavar="PATH",
            help="A rule file, an archive of them, or a directory of both.",
        ),
    ],
    key: Key,
    certificate: Certificate,
    serial: Annotated[
        int | None,
        typer.Option(
            "--serial", min=1, max=2**53 - 1, help="Its serial number; the time in seconds if none."
        ),
    ] = None,
    suricata: Suricata = Path("/usr/bin/suricata"),
    other_signer: Annotated[
        bool,
        typer.Option(
            "--other-signer",
            help="Also by a key that signed neither the image's root nor its present rules: "
            "the appliance must have its certificate in `rules.bundle.certificate`.",
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Put new rules into an image that does not run: tried by Suricata, signed, written twice, read back."""
    from appliance.image import refresh as work
    from appliance.image.disk import open_to_write
    from appliance.image.signing import read_pair
    from appliance.paths import find_engine_data

    pair = read_pair(key, certificate)
    given = work.read_rules(rules)
    with open_to_write(file) as disk:
        # Before the trial, which takes half a minute; and after it, since nobody holds a qcow2 meanwhile.
        work.check_target(disk, pair[1], serial, time.time(), other_signer=other_signer)
        with tempfile.TemporaryDirectory(prefix="hairpin-rules-") as scratch:
            tried = asyncio.run(
                work.try_rules(given, find_engine_data(), suricata, Path(scratch), _note)
            )
        now = time.time()
        target = work.check_target(disk, pair[1], serial, now, other_signer=other_signer)
        _, encoded = work.sign_bundle(tried, pair[0], pair[1], target.serial, now)
        _note("writing the rules")
        written = work.write_bundle(disk, target.partition, encoded, pair[1])
    faults = (REPLACED_OTHER,) if target.replaces_other else ()
    report = _build_bundle_report(written, faults, now).model_copy(
        update={"loaded": dict(tried.loaded), "left_out": tried.left_out_count}
    )
    if json:
        return print_json(report)
    for one in tried.left_out[:20]:
        print_note(f"left out: sid {one.sid or '-'}: {clean(one.reason)}")
    _print_bundle(report)


def _build_bundle_report(bundle: Bundle, faults: tuple[str, ...], now: float) -> BundleReport:
    header = bundle.header
    return BundleReport(
        serial=header.serial,
        created=header.created,
        age_days=round((now - header.created.timestamp()) / 86400, 2),
        rules=header.rules,
        size=header.payload_size,
        signer=bundle.signer,
        sources=tuple(
            BundleSourceReport(name=one.name, sha256=one.sha256) for one in header.sources
        ),
        faults=faults,
    )


def _print_bundle(report: BundleReport) -> None:
    if not report.serial:
        print_line("no rules bundle: the starter rules of the root are used")
        return
    age = f"{report.age_days:.0f} days old" if report.age_days is not None else ""
    print_line(f"serial {report.serial}, made {render_time(report.created)}, {age}")
    print_line(f"{report.rules} rules, {report.size} bytes, signed by {clean(report.signer)}")
    for name, count in sorted(report.loaded.items()):
        print_line(f"{name}: {count} rules load, {report.left_out} left out")
    for one in report.sources:
        print_line(f"from {clean(one.name)}, SHA-256 {one.sha256}")
    for fault in report.faults:
        print_note(f"warning: {clean(fault)}")
    if report.age_days is not None and report.age_days > AGE_NOTED_DAYS:
        print_note(f"warning: older than {AGE_NOTED_DAYS} days")


@app.command("rules")
def show_rules(file: Image, certificate: Certificates = None, json: options.Json = False) -> None:
    """Show which rules bundle an image has, who signed it, and how old it is."""
    from appliance.image.disk import open_to_read
    from appliance.image.refresh import read_partition

    trusted = _read_trusted(certificate)
    with open_to_read(file, _note) as disk:
        read = read_partition(disk, trusted)
    report = BundleReport()
    if read is not None:
        report = _build_bundle_report(read.bundle, read.faults, datetime.now(UTC).timestamp())
    if json:
        return print_json(report)
    _print_bundle(report)


@app.command("extract")
def extract(
    file: Image,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="An empty directory, or one to be made.")
    ],
    certificate: Certificates = None,
    json: options.Json = False,
) -> None:
    """Write the parts of an image that an appliance is updated with, and check them."""
    from appliance.image.disk import open_to_read
    from appliance.image.update import extract_checked

    trusted = _read_trusted(certificate)
    make_empty(output)
    try:
        with open_to_read(file, _note) as disk:
            release = extract_checked(disk, output, trusted, _note)
    except OSError as fault:
        reason = f"{fault.filename or output}: {fault.strerror or fault}"
        raise HairpinError(reason, "mend it, or name another directory by --output") from fault
    _print_release(release, json, written=False, text=f"version {release.version} in {output}")


def _print_release(release: Release, json: bool, *, written: bool, text: str) -> None:
    if json:
        names = tuple(path.name for path in release.files.values())
        return print_json(
            ReleaseReport(
                version=release.version,
                root_hash=release.root_hash,
                signer=release.signer,
                files=names,
                written=written,
            )
        )
    print_line(text)
    print_line(f"signed by {clean(release.signer)}")


@app.command("update")
def update(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A signed image, or what `image extract` wrote."),
    ],
    certificate: Certificates = None,
    disk: Annotated[
        Path | None,
        typer.Option("--disk", metavar="DEVICE", help="The appliance's disk; found if not given."),
    ] = None,
    if_new: Annotated[
        bool,
        typer.Option(
            "--if-new",
            help="Do nothing, well, where this version is there already: running, waiting, or tried and failed.",
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """On the appliance, as root: write a newer version beside the one that runs; it is tried at the next boot."""
    from appliance.image import update as work
    from appliance.image.disk import open_device_to_read
    from appliance.image.model import ImageError

    if os.geteuid() != 0:
        raise HairpinError("only root may write a new version", "run it as root")
    trusted = _read_trusted(certificate)
    running = _find_running_version()
    if if_new and (known := _find_known(work.find_named_version(source))):
        # A disk that stays attached is seen at each boot, also after its version was sent back.
        print_line(f"nothing to do: version {known.version} is here already ({known.state})")
        return
    device = disk or work.find_disk()
    with work.stage(source, work.STAGING, _note) as files:
        release = work.check_release(files, trusted, _note)
        work.check_newer(release, running)
        work.name_for_sysupdate(release)
        _note(f"writing version {release.version}")
        work.run_sysupdate(release.version)
        try:
            work.forget_cached(device)
            with open_device_to_read(device) as written:
                work.check_written(written, release, trusted, _note)
        except ImageError:
            work.withdraw(release.version)
            raise
    if BOOT_REPORT.exists():
        _write_boots()
    text = f"version {release.version} is written; it is tried at the next boot: `systemctl reboot`"
    _print_release(release, json, written=True, text=text)


def _find_known(version: str | None) -> BootVersion | None:
    return next((one for one in _read_boots() if one.version == version), None)


def _find_running_version() -> str:
    from appliance.image.boots import OS_RELEASE, find_image_version

    try:
        found = find_image_version(OS_RELEASE.read_text(encoding="utf-8", errors="replace"))
    except OSError as fault:
        raise HairpinError(f"{OS_RELEASE}: {fault.strerror}") from fault
    if found is None:
        raise HairpinError(
            "this is no appliance image", "an image is updated on the appliance itself"
        )
    return found


@app.command("check")
def check(
    seconds: Annotated[
        int, typer.Option("--seconds", min=1, max=3600, help="How long it may take.")
    ] = 180,
    faults_file: Annotated[
        Path | None,
        typer.Option("--faults", metavar="FILE", help="What the first boot found wrong, as JSON."),
    ] = None,
    canary: Annotated[
        bool, typer.Option("--canary/--no-canary", help="Have every lane block its canary.")
    ] = True,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record", metavar="FILE", help="Keep there what is lacking, for the version before."
        ),
    ] = None,
    always: Annotated[
        bool, typer.Option("--always", help="Also when the boot loader has nothing on trial.")
    ] = False,
    json: options.Json = False,
    url: options.Url = None,
    token_file: options.TokenFile = None,
) -> None:
    """After a boot: does every lane forward, and block its canary? Status 1 sends a version on trial back."""
    from appliance.client import open_client
    from appliance.image import bootcheck, boots

    try:
        boot = bootcheck.read_boot()
    except HairpinError as fault:
        # Checked all the same: a new version must not be kept because nobody could ask.
        print_note(clean(fault.reason))
        boot = bootcheck.Boot(trial=True, others=1)
    if not always and not (boot.trial and boot.others):
        why = "no other version to go back to" if boot.trial else "this version is not on trial"
        _print_boot(BootReport(passed=True, trial=boot.trial), json, f"nothing to check: {why}")
        return
    verdict = bootcheck.judge_faults(_read_faults(faults_file))
    if verdict.passed:
        # Opened anew each time: the service makes its token when it starts first.
        verdict = bootcheck.wait_until_good(
            lambda: open_client(url, token_file).read_health(),
            (lambda: open_client(url, token_file).prove_lanes()) if canary else None,
            seconds,
        )
    report = BootReport(passed=verdict.passed, trial=boot.trial, lacking=verdict.lacking)
    _print_boot(report, json, "every lane forwards" + (" and blocks its canary" if canary else ""))
    if not verdict.passed:
        if record is not None:
            boots.keep_record(_find_running_version(), verdict.lacking, record)
        raise typer.Exit(1)


def _read_faults(path: Path | None) -> tuple[str, ...]:
    if path is None or not path.exists():
        return ()
    try:
        document = jsonlib.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError) as fault:
        return (f"{path}: {fault}",)
    listed = document.get("faults") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        return (f"{path}: not what the first boot writes",)
    return tuple(_render_fault(one)[:300] for one in listed)


def _render_fault(fault: object) -> str:
    return f"{fault.get('path')}: {fault.get('reason')}" if isinstance(fault, dict) else str(fault)


def _print_boot(report: BootReport, json: bool, text: str) -> None:
    if json:
        return print_json(report)
    if report.passed:
        print_line(text)
    for one in report.lacking:
        print_line(f"lacking: {clean(one)}")


@app.command("boots")
def show_boots(json: options.Json = False) -> None:
    """On the appliance, as root: which versions there are, what the boot loader thinks of each, which failed."""
    found = tuple(
        BootVersionReport.model_validate(one, from_attributes=True) for one in _read_boots()
    )
    if json:
        return print_json(BootVersionList(items=found))
    rows = [
        (one.version, "runs" if one.running else "", one.state, "; ".join(one.lacking))
        for one in found
    ]
    print_table(("version", "now", "state", "what was lacking"), rows, "there are none")


def _read_boots() -> tuple[BootVersion, ...]:
    from appliance.image import boots

    try:
        return boots.read_boots()
    except OSError as fault:
        raise HairpinError(f"{fault.filename}: {fault.strerror}", "run it as root") from fault


def _write_boots() -> None:
    """For health, which is told by the boot report otherwise."""
    from appliance.image import boots

    try:
        boots.write_versions(_read_boots(), BOOT_REPORT)
    except OSError as fault:
        raise HairpinError(f"{BOOT_REPORT}: {fault.strerror}", "run it as root") from fault
