"""What was made last, kept until it would be made of something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Last(Generic[P, T]):
    """``make``, a pure function; called anew only for arguments that do not equal the last ones.

    Unlike `functools.lru_cache` it hashes nothing: large values that are the same objects as before cost
    nothing, and they may hold mappings.
    """

    def __init__(self, make: Callable[P, T]) -> None:
        self._make = make
        self._last: tuple[tuple[object, ...], T] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        given = (*args, *sorted(kwargs.items()))
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != given:
            last = self._last = given, self._make(*args, **kwargs)
        return last[1]

    def cache_clear(self) -> None:
        """Forget it."""
        self._last = None
