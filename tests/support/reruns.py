"""What a lab test that failed leaves behind: nothing. A pytest plugin, loaded by `tests/conftest.py`.

A test that failed may have left its lab broken, or half changed. So all that it used is taken down,
modules' and the session's fixtures too: its second try, and the tests after it, begin on fresh ones.
pytest-rerunfailures by itself keeps what is of a wider scope than the test, and with it the damage.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    failed_before = report.when != "setup" and item.stash.get(_FAILED, False)
    item.stash[_FAILED] = failed_before or report.failed
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if item.get_closest_marker("lab") is not None and item.stash.get(_FAILED, False):
        # As for the last test of a session. There is no public way to ask for it.
        item.session._setupstate.teardown_exact(None)
