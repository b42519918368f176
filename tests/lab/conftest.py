"""The lab's fixtures, for every test in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.evasion_tools import SharedLab, Stage
from tests.support.lab import bare_lab, end_in_order, is_last_user, lab, module_lab

__all__ = ["bare_lab", "end_in_order", "lab", "module_lab"]


@pytest.fixture(scope="session")
def evasions_lab() -> Iterator[SharedLab]:
    lab = SharedLab()
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def evasions(evasions_lab: SharedLab, request: pytest.FixtureRequest) -> Iterator[Stage]:
    """A stage for attacks, anew for each module, on one lab for all modules with such a stage."""
    with evasions_lab.open_stage() as stage:
        yield stage
    if is_last_user(request):
        evasions_lab.close()
