"""Archives from outside: whatever they hold, nothing is unpacked and everything is bounded."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile

import pytest

from appliance.rules import archive
from appliance.rules.archive import read_rule_files
from appliance.rules.model import RulesError

RULE = b'alert tcp any any -> any any (msg:"m"; sid:1; rev:1;)\n'


def build_tar(
    members: dict[str, bytes], mode: str = "w:gz", extra: tuple[tarfile.TarInfo, ...] = ()
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as made:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
        for info in extra:
            made.addfile(info)
    return buffer.getvalue()


def build_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        build_tar({"rules/b.rules": RULE, "rules/LICENSE": b"x", "rules/a.rules": b""}),
        build_tar({"rules/b.rules": RULE, "rules/a.rules": b"", "x/deleted.rules": RULE}, "w:"),
        build_zip({"rules/b.rules": RULE, "rules/a.rules": b"", "sid-msg.map": b"x"}),
    ],
    ids=["tar.gz", "tar", "zip"],
)
def test_rule_files_of_an_archive_in_order(data: bytes) -> None:
    assert read_rule_files(data) == [("rules/a.rules", b""), ("rules/b.rules", RULE)]


@pytest.mark.parametrize("data", [RULE, gzip.compress(RULE)], ids=["plain", "gzip"])
def test_a_bare_rule_file(data: bytes) -> None:
    assert read_rule_files(data) == [("source.rules", RULE)]


def test_names_that_climb_are_only_names(tmp_path: object) -> None:
    data = build_tar({"../../../../tmp/w/climbed.rules": RULE, "/etc/cron.d/x.rules": RULE})
    assert [content for _, content in read_rule_files(data)] == [RULE, RULE]


def test_links_and_devices_are_not_followed() -> None:
    link = tarfile.TarInfo("rules/shadow.rules")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/shadow"
    hard = tarfile.TarInfo("rules/passwd.rules")
    hard.type, hard.linkname = tarfile.LNKTYPE, "/etc/passwd"
    device = tarfile.TarInfo("rules/zero.rules")
    device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 5
    data = build_tar({"rules/a.rules": RULE}, extra=(link, hard, device))
    assert read_rule_files(data) == [("rules/a.rules", RULE)]


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(b"#" * 5000),
        build_tar({"a.rules": b"#" * 5000}),
        build_zip({"a.rules": b"#" * 3000, "b.rules": b"#" * 3000}),
        b"#" * 2000,
    ],
    ids=["gzip", "tar.gz", "zip", "size"],
)
def test_what_is_too_large_is_refused(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "UNPACKED_LIMIT", 4096)
    monkeypatch.setattr(archive, "ARCHIVE_LIMIT", 1024)
    with pytest.raises(RulesError, match="bytes"):
        read_rule_files(data)


@pytest.mark.parametrize("build", [build_tar, build_zip])
def test_too_many_files_are_refused(build: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MEMBER_LIMIT", 3)
    data = build({f"{number}.rules": b"" for number in range(4)})  # type: ignore[operator]
    with pytest.raises(RulesError, match="more than 3 files"):
        read_rule_files(data)


@pytest.mark.parametrize(
    "data",
    [
        build_tar({"a.rules": RULE * 500})[:-40],
        build_tar({"a.rules": RULE * 50}, "w:")[:800],
        build_zip({"a.rules": RULE})[:-30],
        b"PK\x03\x04 no zip",
        b"\x1f\x8b no gzip",
    ],
    ids=["torn tar.gz", "torn tar", "torn zip", "false zip", "false gzip"],
)
def test_a_damaged_archive_is_refused(data: bytes) -> None:
    with pytest.raises(RulesError, match="damaged"):
        read_rule_files(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_any_changed_byte_of_a_zip_is_an_answer(method: int) -> None:
    """`lzma.LZMAError` is no kind of ValueError: an update ended with a traceback."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        made.writestr("a.rules", RULE * 200)
    data = buffer.getvalue()
    for at in range(4, len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x41
        try:
            read_rule_files(bytes(changed))
        except RulesError:
            continue


def test_the_files_of_a_zip_are_counted_before_it_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each takes 46 bytes in the archive and ten times as many in memory, by more than a million."""
    data = build_zip({f"{number}": b"" for number in range(archive.MEMBER_LIMIT + 1)})

    def refuse(*_: object) -> None:
        pytest.fail("it was opened")

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(RulesError, match="more than 4000 files"):
        read_rule_files(data)
