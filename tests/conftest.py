"""For all tests: their order, a second try for those in the lab, and only warnings of the product's own logs."""

from __future__ import annotations

import logging
import signal

import pytest
import structlog
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.support.order", "tests.support.reruns"]

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A lab test that fails is run once more, and the summary tells why (RERUN): see docs/decisions.md."""
    for item in items:
        if item.get_closest_marker("lab") is not None:
            item.add_marker(pytest.mark.flaky(reruns=1))
