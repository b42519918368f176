"""In which order tests run. A pytest plugin, loaded by `tests/conftest.py`.

What needs no lab runs first: it is quick, and tells of a fault sooner. Side by side (pytest-xdist) what takes
longest begins first, or it would be waited for in the end. Files are moved whole: a file's tests may tell one story,
and its first ones need what is new (a lane without rules), which those marked `slow` would have used up.
"""

from __future__ import annotations

import pytest


def find_place(item: pytest.Item, *, several: bool) -> int:
    """Small ones run first; ``several``: other tests run beside it."""
    if item.get_closest_marker("side_by_side") is not None:
        if not several:
            return 3
        return 0 if item.get_closest_marker("slow") is not None else 1
    return 4 if item.get_closest_marker("lab") is not None else 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file has the place of that test of its which would run soonest."""
    several = hasattr(config, "workerinput")
    places = [(item.path, find_place(item, several=several)) for item in items]
    soonest = dict(sorted(places, key=lambda one: -one[1]))
    items.sort(key=lambda item: soonest[item.path])
