"""What the tests of updates have in common: the version of an image, and a machine that lives several times."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.support.qemu import Vm
from tests.support.vm_probe import BEGIN, END
from tests.vm.test_image_boot import parse_facts

LIFE_SECONDS = 1800.0
"""Of one boot, to what is waited for in it: under TCG on two busy cores."""
LINUX = "/boot/EFI/Linux"


def find_version(image: Path) -> str:
    return image.name.removeprefix("hairpin_").removesuffix(".raw")


def render_wait(*conditions: str) -> str:
    """sh that waits until all are so, long enough."""
    together = " && ".join(conditions)
    return f"n=0; while [ $n -lt 1700 ] && ! {{ {together}; }}; do sleep 1; n=$((n+1)); done"


@dataclass
class Life:
    """A machine, and where on its console its last boot began."""

    vm: Vm
    read: int = 0

    def wait(self) -> dict[str, str]:
        """What the next probe that ends tells; one that is broken off by a restart is passed over."""
        end = END.format("life")
        self.vm.wait_for(re.escape(end), LIFE_SECONDS, after=self.read)
        text = self.vm.read_console()
        at = text.index(end, self.read)
        facts = text[text.rindex(BEGIN.format("life"), 0, at) : at]
        self.read = at + len(end)
        return parse_facts(facts)
