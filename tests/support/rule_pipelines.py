"""Rule pipelines on directories of their own, and feeds to give them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from appliance.rules.pipeline import RulePipeline
from appliance.settings import Settings
from steering.model import Profile

ROOT = Path(__file__).resolve().parents[2]
ENGINE_DATA = ROOT / "suricata"
SURICATA = Path("/usr/bin/suricata")


def build_settings(directory: Path, *, third_leg: bool = False, **rules: object) -> Settings:
    def leg(name: str) -> dict[str, str]:
        return {"interface": name, "device": name}

    lanes = [
        {"profile": "prevent", "vlan": 100, "queues": [0], "legA": leg("pa"), "legB": leg("pb")},
        {"profile": "detect", "vlan": 101, "queues": [1], "legA": leg("da"), "legB": leg("db")},
    ]
    if third_leg:
        lanes[0]["legC"] = leg("pc")
    return Settings.model_validate(
        {"stateDir": str(directory), "runDir": str(directory), "lanes": lanes, "rules": rules}
    )


def build_pipeline(
    directory: Path,
    test_config: Callable[[Profile], Path] | None = None,
    *,
    third_leg: bool = False,
    **rules: object,
) -> RulePipeline:
    """``third_leg``: the lane that prevents has one."""
    settings = build_settings(directory, third_leg=third_leg, **rules)
    return RulePipeline(settings, ENGINE_DATA, test_config, SURICATA)


def source(name: str, path: Path) -> dict[str, str]:
    return {"name": name, "url": path.as_uri()}


def rule(sid: int, options: str = "", msg: str = "", rev: int = 1, metadata: str = "") -> str:
    """A rule that loads: `content` is its sid."""
    extra = f" metadata:{metadata};" if metadata else ""
    return (
        f'alert tcp any any -> any any (msg:"{msg or f"rule {sid}"}"; content:"{sid}"; {options} '
        f"sid:{sid}; rev:{rev};{extra})"
    )


ATTACK = "classtype:attempted-admin;"
CRITICAL = "signature_severity Critical"


def write_feed(path: Path, *lines: str, **members: bytes) -> Path:
    """A feed as published ones are: a tar.gz with `rules/*.rules`; more members by their names."""
    with tarfile.open(path, "w:gz") as archive:
        files = {"rules/feed.rules": "\n".join(lines).encode() + b"\n", **members}
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
