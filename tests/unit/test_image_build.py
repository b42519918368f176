"""The image's build: sources of the machine's own archive, keys, bill of materials, the floor of the engine."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.qemu import Nic, Vm, VmSpec, build_argv

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "image-build"

ARCHIVE = """
apt-get() {
    case "$*" in
    *'Codename: '*-security*) echo file:/mirror/security/ ;;
    *'Codename: '*) echo file:/mirror/debian/ ;;
    esac
}
"""


def run_shell(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """With everything that build.sh declares."""
    return subprocess.run(
        ["bash", "-euc", f'source "{BUILD}/build.sh"\n{script}'],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_sources_are_the_machines_own_archive_with_other_suites() -> None:
    done = run_shell(ARCHIVE + "render_sources trixie-backports")
    assert done.returncode == 0, done.stderr
    suites = [line.split()[2:4] for line in done.stdout.splitlines()]
    assert suites == [
        ["file:/mirror/debian", "trixie"],
        ["file:/mirror/debian", "trixie-updates"],
        ["file:/mirror/debian", "trixie-backports"],
        ["file:/mirror/security", "trixie-security"],
    ]
    assert all(
        line.startswith("deb [signed-by=/usr/share/keyrings/") for line in done.stdout.splitlines()
    )


def test_without_an_archive_it_ends_and_tells_how_to_mend_it() -> None:
    done = run_shell("apt-get() { :; }\nrender_sources")
    assert done.returncode == 1
    assert "to mend it: add one to /etc/apt/sources.list.d" in done.stderr


def test_no_mirror_is_named() -> None:
    named = re.compile(r"(https?|ftp)://")
    files = [path for path in BUILD.iterdir() if path.is_file() and path.name != "sbom.jq"]
    files += (BUILD / "mkosi.extra").rglob("*.*")
    assert [path.name for path in files if path.is_file() and named.search(path.read_text())] == []


def test_development_keys_are_made_once_for_root_alone(tmp_path: Path) -> None:
    once = 'unset KEY CERT; make_keys; sha256sum "$KEY" "$CERT"'
    script = f'HERE="{tmp_path}"; {once}; {once}'
    done = run_shell(script, KEY="", CERT="")
    assert done.returncode == 0, done.stderr
    sums = [line for line in done.stdout.splitlines() if not line.startswith("image:")]
    assert sums[:2] == sums[2:]
    key = tmp_path / "keys/image.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "given", [{"KEY": "/etc/hostname"}, {"CERT": "/etc/hostname"}, {"KEY": "/no", "CERT": "/no"}]
)
def test_half_of_a_releases_keys_is_refused(given: dict[str, str]) -> None:
    done = run_shell("make_keys", **{"KEY": "", "CERT": "", **given})
    assert done.returncode == 1
    assert "KEY and CERT name no two readable files" in done.stderr


def make_release_keys(directory: Path, *how: str) -> tuple[Path, Path]:
    """A key, for root alone, and its certificate. ``how``: as openssl-req(1) takes it."""
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    argv = ["openssl", "req", "-x509", *(how or ("-newkey", "rsa:2048", "-noenc"))]
    argv += ["-subj", "/CN=a release/", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(argv, check=True, capture_output=True, timeout=30)
    key.chmod(0o600)
    return key, certificate


def test_a_releases_keys_are_taken_where_they_are(tmp_path: Path) -> None:
    key, certificate = make_release_keys(tmp_path)
    done = run_shell('make_keys; echo "$KEY $CERT"', KEY=str(key), CERT=str(certificate))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{key} {certificate}\n"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (("-newkey", "ed25519", "-noenc"), "is no RSA key in PEM without a password"),
        (("-newkey", "rsa:2048", "-passout", "pass:x"), "is no RSA key in PEM without a password"),
    ],
)
def test_a_key_that_firmware_does_not_take_is_refused(
    how: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    key, certificate = make_release_keys(tmp_path, *how)
    done = run_shell("make_keys", KEY=str(key), CERT=str(certificate))
    assert done.returncode == 1
    assert reason in done.stderr


def test_keys_that_do_not_belong_together_are_refused_before_anything_is_built(
    tmp_path: Path,
) -> None:
    (tmp_path / "other").mkdir()
    key, certificate = make_release_keys(tmp_path)
    _, other = make_release_keys(tmp_path / "other")
    wrong = {
        "is not the key of CERT": (key, other),
        "is no certificate in PEM": (key, key),
        "is no RSA key": (certificate, certificate),
        "name no two readable files": (tmp_path, tmp_path),
    }
    certificate.chmod(0o600)
    for reason, (one, another) in wrong.items():
        done = run_shell("make_keys", KEY=str(one), CERT=str(another))
        assert (done.returncode, reason in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620])
def test_a_key_that_others_can_read_or_change_is_refused(mode: int, tmp_path: Path) -> None:
    key, certificate = make_release_keys(tmp_path)
    key.chmod(mode)
    done = run_shell("make_keys", KEY=str(key), CERT=str(certificate))
    assert done.returncode == 1
    assert f"can be read or changed by others (mode {mode:o})" in done.stderr
    assert f"to mend it: chmod 600 {key}" in done.stderr


def test_a_key_without_its_certificate_is_not_replaced(tmp_path: Path) -> None:
    key = tmp_path / "keys/image.key"
    key.parent.mkdir()
    key.write_text("what images were signed with")
    done = run_shell(f'HERE="{tmp_path}"; make_keys', KEY="", CERT="")
    assert done.returncode == 1
    assert "there is only one" in done.stderr
    assert key.read_text() == "what images were signed with"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"VERSION": "next"}, "VERSION=next is no version"),
        ({"VERSION": "1;id"}, "VERSION=1;id is no version"),
        ({"VERSION": "../1"}, "VERSION=../1 is no version"),
        ({"VERSION": "1" * 21}, "is no version"),
        ({"FAST": "yes"}, "FAST=yes is neither 0 nor 1"),
        ({"TOOLS": "/usr"}, "TOOLS=/usr is not known"),
    ],
)
def test_an_option_that_can_not_be_is_refused(given: dict[str, str], reason: str) -> None:
    done = run_shell("check_options", **{"VERSION": "1", "FAST": "", "TOOLS": "", **given})
    assert done.returncode == 1
    assert reason in done.stderr
    assert "to mend it: " in done.stderr


def test_what_signs_is_looked_for_first_wherever_the_environment_is(tmp_path: Path) -> None:
    assert run_shell("check_program", VENV=sys.prefix).returncode == 0
    done = run_shell("check_program", VENV=str(tmp_path))
    assert done.returncode == 1
    assert f"there is no {tmp_path}/bin/hairpin" in done.stderr
    assert "to mend it: make setup" in done.stderr


def test_who_waits_for_another_set_up_says_so(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    script = f'exec 9>"{lock}"; wait_for_set_up; echo has it'
    assert run_shell(script).stdout == "has it\n"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            ["bash", "-euc", f'source "{BUILD}/setup.sh"\n{script}'],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert waiting.stdout is not None
        assert waiting.stdout.readline().startswith("setup: another set-up is running; waiting")
    assert waiting.communicate(timeout=20)[0] == "has it\n"


def test_no_is_no() -> None:
    done = run_shell('check_options; echo "<$FAST>"', VERSION="1", FAST="0", TOOLS="")
    assert done.stdout == "<>\n"


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("file", "is no directory, and none can be made there"),
        ("file/below", "is no directory, and none can be made there"),
        ("/proc/self", "is no place for images"),
        ("/", "is no place for images"),
        ("/usr", "is no place for images"),
        ("/etc/", "is no place for images"),
        ("/var/lib", "is no place for images"),
    ],
)
def test_a_place_that_can_not_be_written_is_refused_at_once(
    out: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    done = run_shell("check_out", OUT=str(tmp_path / out))
    assert done.returncode == 1
    assert reason in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


OUTPUTS = ("raw", "qcow2", "efi", "manifest", "raw.manifest", "cdx.json")
MAKE = f"""
trap leave EXIT
trap 'exit 130' INT
check_out
for ending in {" ".join(OUTPUTS)}; do echo new >"$MAKING/hairpin_1.$ending"; done
echo new >"$MAKING/SHA256SUMS"
"""


def test_only_what_was_built_gets_its_mode(tmp_path: Path) -> None:
    """A release's key may lie in the directory that its images go to."""
    key, below = tmp_path / "key.pem", tmp_path / "older"
    key.write_text("secret")
    key.chmod(0o600)
    below.mkdir(mode=0o700)
    done = run_shell(MAKE + "publish_outputs hairpin_1", OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert key.stat().st_mode & 0o777 == 0o600
    assert below.stat().st_mode & 0o777 == 0o700
    names = {*(f"hairpin_1.{ending}" for ending in OUTPUTS), "SHA256SUMS"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "key.pem", "older"}
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o644 for name in names)


def test_a_build_that_is_interrupted_leaves_what_was_there(tmp_path: Path) -> None:
    before = {"hairpin_1.raw": "old", "hairpin_1.qcow2": "old", "SHA256SUMS": "old"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    done = run_shell(MAKE + "kill -INT $$; sleep 5", OUT=str(tmp_path))
    assert done.returncode == 130
    assert f"ended early: {tmp_path} is as it was" in done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_no_shell_reads_what_make_was_given(tmp_path: Path) -> None:
    """The real Makefile; the scripts that it starts only tell what they got."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "image-build").mkdir()
    for name in ("setup.sh", "setup-image.sh", "build.sh"):
        script = tmp_path / "image-build" / name
        script.write_text('#!/bin/sh\necho "$0: <$VERSION> <$OUT>"\n')
        script.chmod(0o755)
    version, out = f'1"; touch {tmp_path}/one; "', f"/a b`touch {tmp_path}/two`"
    clean = {name: text for name, text in os.environ.items() if "MAKE" not in name}
    argv = ["make", "-s", "image", f"VERSION={version}", f"OUT={out}"]
    done = subprocess.run(
        argv, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=20, check=True
    )
    assert f"image-build/build.sh: <{version}> <{out}>" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"Makefile", "image-build"}


@pytest.mark.parametrize("engine", ["1:7.0.10-1+deb13u4", "1:8.0.7-1~bpo13+1"])
def test_a_stale_engine_fails_the_build(engine: str, tmp_path: Path) -> None:
    """The real check with the real floor; only the answer of dpkg-query is made."""
    (tmp_path / "dpkg-query").write_text(f"#!/bin/sh\necho '{engine}'\n")
    (tmp_path / "dpkg-query").chmod(0o755)
    script = f'ENGINE_FLOOR="$ENGINE_FLOOR" PATH="{tmp_path}:$PATH" "{BUILD}/mkosi.postinst.chroot"'
    done = run_shell(script)
    assert done.returncode == 1
    assert f"Suricata {engine} is older than the floor" in done.stderr


def test_nothing_of_perl_is_left(tmp_path: Path) -> None:
    """The real function of the build's last step, on a small tree."""
    kept = {
        "usr/bin/hairpin": "#!/usr/bin/python3\n# not perl\n#!/usr/bin/perl\n",
        "usr/sbin/nft": "\x7fELF\0perl",
    }
    gone = {
        "usr/bin/perl": "\x7fELF",
        "usr/bin/perl5.40.1": "\x7fELF",
        "usr/bin/cpan": "#!/usr/bin/perl\n",
        "usr/sbin/adduser": "#! /usr/bin/perl -w\n",
        "usr/bin/own": "#!/usr/bin/env perl\n",
        "usr/lib/ssl/misc/CA.pl": "#!/usr/bin/perl\n",
        "usr/share/perl/5.40.1/CPAN.pm": "",
        "usr/share/perl5/Debian.pm": "",
        "usr/lib/x86_64-linux-gnu/perl-base/Config.pm": "",
        "usr/lib/x86_64-linux-gnu/libperl.so.5.40": "",
        "etc/perl/sitecustomize.pl": "",
    }
    for name, text in {**kept, **gone}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    define = f"eval \"$(sed -n '/^remove_perl()/,/^}}/p' {BUILD}/mkosi.finalize.chroot)\""
    done = run_shell(f'{define}\nremove_perl "{tmp_path}"')
    assert (done.returncode, done.stderr) == (0, "")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(kept)


def test_a_package_counts_as_long_as_one_of_its_files_is_there(tmp_path: Path) -> None:
    lists = {
        "nft.list": "/.\n/usr\n/usr/sbin/nft\n/usr/share/doc/nft/copyright\n",
        "libc6:amd64.list": "/.\n/usr/lib/libc.so.6\n",
        "libperl5.40:amd64.list": "/.\n/usr\n/usr/lib/libperl.so.5.40\n",
        "dpkg.list": "/usr/bin/dpkg\n/usr/lib/dpkg\n",
    }
    (tmp_path / "lists").mkdir()
    for name, text in lists.items():
        (tmp_path / "lists" / name).write_text(text)
    (tmp_path / "root/usr/sbin").mkdir(parents=True)
    (tmp_path / "root/usr/lib").mkdir()
    (tmp_path / "root/usr/sbin/nft").write_text("")
    (tmp_path / "root/usr/lib/libc.so.6").symlink_to("libc-2.41.so")
    define = f"eval \"$(sed -n '/^find_gone()/,/^}}/p' {BUILD}/mkosi.finalize.chroot)\""
    done = run_shell(f'{define}\nfind_gone "{tmp_path}/root" "{tmp_path}/lists"')
    assert json.loads(done.stdout) == ["dpkg", "libperl5.40"]


def make_bill() -> dict[str, Any]:
    debian = [
        {
            "type": "deb",
            "name": "suricata",
            "version": "1:8.0.8-1~bpo13+2",
            "architecture": "amd64",
        },
        {"type": "deb", "name": "libc6", "version": "2.41-12", "architecture": "amd64"},
        {"type": "deb", "name": "perl", "version": "5.40.1-6", "architecture": "amd64"},
    ]
    python = [
        {"name": "Typing_Extensions", "version": "4.1"},
        {"name": "hairpin-ips", "version": "0.1.0"},
    ]
    argv = ["jq", "-S", "--null-input", "--argjson", "debian", json.dumps([{"packages": debian}])]
    argv += ["--argjson", "python", json.dumps([python]), "--arg", "version", "0.1.0"]
    argv += ["--argjson", "gone", json.dumps([["perl"]])]
    argv += [
        "--arg",
        "commit",
        "c0ffee",
        "--argjson",
        "epoch",
        "86400",
        "-f",
        str(BUILD / "sbom.jq"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20)
    bill: dict[str, Any] = json.loads(done.stdout)
    return bill


def test_the_bill_of_materials_names_every_package_but_our_own_and_those_taken_away() -> None:
    bill = make_bill()
    assert [part["purl"] for part in bill["components"]] == [
        "pkg:deb/debian/libc6@2.41-12?arch=amd64&distro=debian-13",
        "pkg:deb/debian/suricata@1%3A8.0.8-1~bpo13%2B2?arch=amd64&distro=debian-13",
        "pkg:pypi/typing-extensions@4.1",
    ]
    assert bill["metadata"]["component"]["version"] == "0.1.0"
    assert bill["metadata"]["timestamp"] == "1970-01-02T00:00:00Z"
    assert "serialNumber" not in bill


def test_a_vms_command_has_its_cards_seeds_and_credentials(tmp_path: Path) -> None:
    spec = VmSpec(
        disk=tmp_path / "disk.raw",
        directory=tmp_path,
        nics=(
            Nic.tap("leg0", "02:00:00:00:00:01", queues=2),
            Nic.user("02:00:00:00:00:02", {8470: 443}),
        ),
        credentials={"hairpin.seed": "name: a, b"},
        drives=(tmp_path / "a,b.img",),
        namespace="lab",
    )
    argv = build_argv(spec, kvm=False)
    assert argv[:4] == ["ip", "netns", "exec", "lab"]
    assert "tap,id=net0,ifname=leg0,script=no,downscript=no,queues=2" in argv
    assert "virtio-net-pci,netdev=net0,mac=02:00:00:00:00:01,romfile=,mq=on" in argv
    assert "user,id=net1,restrict=on,hostfwd=tcp:127.0.0.1:8470-:443" in argv
    assert "type=11,value=io.systemd.credential.binary:hairpin.seed=bmFtZTogYSwgYg==" in argv
    assert f"if=none,id=more0,format=raw,readonly=on,file={tmp_path}/a,,b.img" in argv
    assert argv[argv.index("-accel") + 1].startswith("tcg")


def test_a_console_is_read_as_text(tmp_path: Path) -> None:
    vm = Vm(VmSpec(disk=tmp_path / "disk.raw", directory=tmp_path))
    coloured = b"[\x1b[0;32m  OK  \x1b[0m] \x1b[!p\x1b]104\x1b\\\x1b[?7h\x1b[6n\x1bP+q544e\x1b\\[fact] 1\r\n"
    (tmp_path / "console.log").write_bytes(coloured)
    assert vm.read_console() == "[  OK  ] [fact] 1\n"
