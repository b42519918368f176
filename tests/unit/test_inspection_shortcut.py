"""The shortcut's marks, its file, what is told of it, and the redirection."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.inspection.config import EngineConfig, render_engine_config
from appliance.inspection.engine import render_start
from appliance.inspection.publish import ShortcutState
from appliance.inspection.redirect import PROGRAM, find_carrier_fault, find_filter_faults
from appliance.inspection.shortcut import (
    CLASS_MASK,
    CLASS_SHIFT,
    FINAL,
    STATE_SIZE,
    TRIGGER_SHIFT,
    UNTIL_AT,
    LibraryFigures,
    build_state_file,
    build_until,
    find_class_mark,
    find_shortcut,
    find_trigger_mark,
    parse_state_file,
)
from steering.model import Lane, Leg, Profile, Trigger

NATIVE = Path(__file__).parents[2] / "appliance/inspection/native/hairpin_shortcut.c"
LANE = Lane(
    1, Profile.PREVENT, 3901, (0,), Leg("a", "dev-a"), Leg("b", "dev-b"), Leg("c", "dev-c")
)  # fmt: skip


# --- marks, file, what is told ---------------------------------------------------------------------


def test_the_marks_of_classes_and_triggers_are_apart_from_each_other_and_from_lanes() -> None:
    classes = [find_class_mark(trigger) for trigger in Trigger]
    triggers = [find_trigger_mark(trigger) for trigger in Trigger]
    assert sorted(classes) == [0x10000, 0x20000, 0x30000, 0x40000, 0x50000]
    assert sorted(triggers) == [1 << bit for bit in range(25, 30)]
    assert all(mark & ~CLASS_MASK == 0 for mark in classes)
    assert not any(mark & (CLASS_MASK | FINAL | 0xFFFF) for mark in triggers)


def test_the_library_has_the_same_numbers() -> None:
    source = NATIVE.read_text()
    assert f"CLASS_SHIFT = {CLASS_SHIFT}, CLASS_MASK = {CLASS_MASK >> CLASS_SHIFT}" in source
    assert f"TRIGGER_SHIFT = {TRIGGER_SHIFT}" in source
    assert "FINAL = UINT32_C(1) << 31" in source
    assert FINAL == 1 << 31
    assert f"STATE_SIZE = {STATE_SIZE}" in source
    words = re.search(r"enum word \{(.*?)\};", source, re.DOTALL)
    assert words is not None
    names = re.findall(r"^\s+([A-Z_]+),", words[1], re.MULTILINE)
    assert [name.lower() for name in names] == ["magic", *LibraryFigures.__dataclass_fields__]


def test_the_file_is_read_as_it_was_written() -> None:
    content = build_state_file(300)
    assert len(content) == STATE_SIZE
    assert parse_state_file(content) == LibraryFigures(0, 300, *(0,) * 11)
    later = content[:UNTIL_AT] + build_until(2.5) + content[UNTIL_AT + 8 :]
    assert parse_state_file(later) == LibraryFigures(2_500_000_000, 300, *(0,) * 11)
    assert parse_state_file(b"") is None
    assert parse_state_file(b"X" * STATE_SIZE) is None


FIGURES = LibraryFigures(1, 300, 77, 3, 5, 2, 1, 0, 0, 4, 0, 9, 2)


@pytest.mark.parametrize(
    ("changed", "state", "reason"),
    [
        ({}, "on", ""),
        ({"figures": replace(FIGURES, entered=0)}, "ready", "no connection was let go yet"),
        ({"wanted": False}, "off", "no legC"),
        ({"built": False}, "off", "library: it was not built"),
        ({"redirection": "device: prev-c is down"}, "off", "device: prev-c is down"),
        ({"pid": None}, "off", "library: no engine runs"),
        ({"pid": 78}, "off", "library: the engine was started without it"),
        ({"figures": None}, "off", "library: the engine was started without it"),
        ({"rules": False}, "off", "rules: "),
    ],
)
def test_what_is_told_of_a_shortcut_is_what_was_seen(
    changed: dict[str, object], state: str, reason: str
) -> None:
    known: dict[str, object] = {
        "wanted": True, "built": True, "pid": 77, "figures": FIGURES, "rules": True, "redirection": "",
    }  # fmt: skip
    found = find_shortcut(**(known | changed))  # type: ignore[arg-type]
    assert found.state is ShortcutState(state)
    assert found.reason.startswith(reason) or reason in found.reason
    if state == "on":
        assert (found.entered, found.returned, found.refused_mixed) == (5, 2, 4)


def test_the_engine_is_told_where_the_file_is() -> None:
    argv = render_start(Path("/s"), "u", LANE, Path("/c"), Path("/q.so"), shortcut=Path("/x"))
    assert argv[argv.index("--") + 1 :][:4] == (
        "env", "LD_PRELOAD=/q.so", "HAIRPIN_SHORTCUT=/x", "/s",
    )  # fmt: skip
    small = render_start(Path("/s"), "u", LANE, Path("/c"), Path("/q.so"), super_packets=False)
    assert "HAIRPIN_NO_SUPER_PACKETS=1" in small


def test_the_engine_itself_never_bypasses(tmp_path: Path) -> None:
    text = render_engine_config(EngineConfig(LANE, Path("/l"), Path("/r"), Path("/s")))
    assert "\n  bypass: no\n" in text
    assert "encryption-handling: default" in text
    assert "bypass-mark" not in text
    assert re.search(r"flow-timeouts:\n  tcp:\n    established: 300\n", text)


# --- the redirection -------------------------------------------------------------------------------


def listed(target: str = "dev-c", **changed: object) -> str:
    """As `tc -j filter show` prints it (iproute2 6.1): each filter twice, first without its options."""
    steps = [dict(zip(("code", "jt", "jf", "k"), step, strict=True)) for step in PROGRAM]
    action = {
        "order": 1, "kind": "mirred", "mirred_action": "redirect", "direction": "egress", "to_dev": target,
    }  # fmt: skip
    options = {"handle": "0x1", "bytecode": {"length": 5, "insns": steps}, "actions": [action]}
    head = {"protocol": "all", "pref": 1, "kind": "bpf", "chain": 0}
    return json.dumps([head, {**head, "options": {**options, **changed}}])


def test_the_filter_is_read_back() -> None:
    assert find_filter_faults(listed(), "leg", "dev-c") == ()
    assert find_filter_faults("", "leg", "dev-c") == ("no filter on leg",)
    assert find_filter_faults("[]", "leg", "dev-c") == ("no filter on leg",)
    assert find_filter_faults("{", "leg", "dev-c") == ("the filters on leg can't be read",)
    # As the kernel tells a device that is gone.
    assert find_filter_faults(listed("*"), "leg", "dev-c") == ("another filter on leg",)
    assert find_filter_faults(listed(actions=[]), "leg", "dev-c") == ("another filter on leg",)
    other = {"insns": [{"code": 6, "jt": 0, "jf": 0, "k": 0xFFFFFFFF}]}
    assert find_filter_faults(listed(bytecode=other), "leg", "dev-c") == ("another filter on leg",)
    twice = json.dumps(json.loads(listed()) * 2)
    assert find_filter_faults(twice, "leg", "dev-c") == ("2 filters on leg",)


def test_the_program_looks_at_the_final_bit_alone() -> None:
    load, mask, jump, match, miss = PROGRAM
    assert load[3] == 0xFFFFF014  # SKF_AD_OFF + SKF_AD_MARK
    assert mask[3] == FINAL
    assert (jump[1], jump[2], jump[3]) == (1, 0, 0)
    assert (match[3], miss[3]) == (0xFFFFFFFF, 0)


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        (None, "no device c"),
        ({"flags": 0x40}, "is down"),
        ({"flags": 0x1}, "has no carrier"),
        ({"flags": 0x41}, ""),
    ],
)
def test_a_device_that_does_not_carry_is_told(link: dict[str, int] | None, fault: str) -> None:
    assert fault in find_carrier_fault("c", link)
    assert bool(find_carrier_fault("c", link)) is bool(fault)
