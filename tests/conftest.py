"""For all tests: the fast ones first, and only warnings of the product's own logs."""

from __future__ import annotations

import logging
import signal

import pytest
import structlog
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.support.reruns"]

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))

# A run in the background of a script ignores Ctrl-C, and so would every program it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine's other load than about the code; with CI set,
# hypothesis takes the same examples each time.
settings.register_profile(
    "hairpin",
    parent=settings(),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("hairpin")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs no lab runs first: it is quick, and tells of a fault sooner. Else the order stays.

    Side by side (pytest-xdist) what takes longest begins first, or it would be waited for in the end.
    A lab test that fails is run once more, and the summary tells why (RERUN): see docs/decisions.md.
    """
    several = hasattr(config, "workerinput")

    def place(item: pytest.Item) -> int:
        if item.get_closest_marker("side_by_side") is not None:
            if not several:
                return 3
            return 0 if item.get_closest_marker("slow") is not None else 1
        return 4 if item.get_closest_marker("lab") is not None else 2

    items.sort(key=place)
    for item in items:
        if item.get_closest_marker("lab") is not None:
            item.add_marker(pytest.mark.flaky(reruns=1))
