"""Where first boot reads and writes; all below one root, which is `/` outside of tests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from appliance.firstboot.plan import CONFIG_DIR, SETTINGS

SYSTEM_CREDENTIALS = "/run/credentials/@system"


@dataclass(frozen=True, slots=True)
class Places:
    root: Path
    credentials: Path
    """Credentials, one file each (systemd.exec(5), CREDENTIALS)."""

    def put(self, path: str) -> Path:
        """An absolute path of the appliance, below the root."""
        return self.root / path.lstrip("/")

    @property
    def config_dir(self) -> Path:
        return self.put(CONFIG_DIR)

    @property
    def settings(self) -> Path:
        return self.put(SETTINGS)

    @property
    def faults(self) -> Path:
        return self.put(f"{CONFIG_DIR}/faults.json")

    @property
    def boot_record(self) -> Path:
        """What the console tells of a first boot that went well."""
        return self.put(f"{CONFIG_DIR}/boot.json")

    @property
    def kept_dir(self) -> Path:
        """For root alone: what was accepted has the seed's secrets."""
        return self.put("/var/lib/hairpin-firstboot")

    @property
    def kept(self) -> Path:
        return self.kept_dir / "accepted.json"


def find_places(root: Path, env: Mapping[str, str]) -> Places:
    """As systemd tells this service (`$CREDENTIALS_DIRECTORY`), else the system's own credentials."""
    named = env.get("CREDENTIALS_DIRECTORY", "")
    if os.path.isabs(named):
        return Places(root, Path(named))
    return Places(root, root / SYSTEM_CREDENTIALS.lstrip("/"))
