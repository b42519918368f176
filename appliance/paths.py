"""Where the engine's configuration and the starter rules are: data beside the code, not in a package."""

from __future__ import annotations

import os
from pathlib import Path

from steering.errors import HairpinError

INSTALLED_DATA = Path("/usr/share/hairpin/suricata")


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
