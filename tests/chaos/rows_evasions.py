"""The same exploit in frames that try to slip past, as the tests of evasions send them."""

from __future__ import annotations

from collections.abc import Iterable

from tests.chaos.registry import EVASION_GOAL, Row, check, fault
from tests.chaos.stage import Stage
from tests.support import evasion_tools


@fault("evasions", seconds=400)
def try_evasions(stage: Stage) -> Iterable[Row]:
    """Every trick that the tests know, on a lab of its own, over IPv4 and IPv6."""
    stage.say("    a lab of its own; takes some minutes")
    with evasion_tools.standing_lab() as appliance:
        found = evasion_tools.run_all(appliance)
    delivered = [f"{name} ({family})" for name, family, arrived in found if arrived]
    figures = {
        "attacks": len(found),
        "ipv6": sum(family == "ipv6" for _name, family, _arrived in found),
        "delivered": len(delivered),
    }
    missed = check(
        (not delivered, f"delivered: {', '.join(delivered[:20])}"),
        (len(found) > 100, "too few were tried"),
    )
    yield Row("evasions", "closed", EVASION_GOAL, figures, missed)
