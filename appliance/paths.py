"""Where the engine's configuration and the starter rules are: data beside the code, not in a package."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from steering.errors import HairpinError

INSTALLED_DATA = Path("/usr/share/hairpin/suricata")
QUEUE_LIBRARY = Path("lib/hairpin/hairpin_queue.so")
"""What is preloaded into the engines, under the Python environment's prefix, where set-up builds it."""


IMAGE_CERTIFICATE = Path("/usr/lib/hairpin/image.crt")
"""In the image: what updates and rules bundles are signed with."""

BOOT_REPORT = Path("/run/hairpin-boot/versions.json")
"""In the image: which versions the boot loader has (`appliance/image/boots.py`)."""


def find_engine_data() -> Path:
    """The `suricata` data directory: configuration template, classifications, `rules/`.

    Looked for next to the packages (a checkout), then in /usr/share/hairpin/suricata, then in
    `$HAIRPIN_DATA`. Raises HairpinError when none of them holds `suricata.yaml.j2`.
    """
    candidates = [Path(__file__).resolve().parent.parent / "suricata", INSTALLED_DATA]
    if named := os.environ.get("HAIRPIN_DATA"):
        candidates.append(Path(named))
    for candidate in candidates:
        if (candidate / "suricata.yaml.j2").is_file():
            return candidate
    raise HairpinError(
        f"no engine data in {', '.join(map(str, candidates))}",
        "install the suricata directory as /usr/share/hairpin/suricata, or name it in HAIRPIN_DATA",
    )


def find_queue_library() -> Path | None:
    """The library that lets an engine take super-packets; None where it was not built."""
    library = Path(sys.prefix) / QUEUE_LIBRARY
    return library if library.is_file() else None
