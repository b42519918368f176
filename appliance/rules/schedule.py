"""When the sources are read again by themselves. Pure; times are passed in.

Counted from when a source was last *read*, which stands in the rulesets' reports: a restart changes nothing, and an
appliance that was off for long is due as soon as it is up.
"""

from __future__ import annotations

from appliance.rules.model import BUNDLE, STARTER, RulesState

RETRY_SECONDS = 1800.0
"""After an update that failed, or read nothing: not each moment, nor only after a day."""


def is_update_due(state: RulesState, now: float, every: float | None, tried: float | None) -> bool:
    """``every`` in seconds, None: only when asked. ``tried``: when an update was last begun by this process."""
    if every is None:
        return False
    if tried is not None and 0 <= now - tried < min(RETRY_SECONDS, every):
        return False
    read = _find_last_read(state)
    # A clock behind the rules is told by health: by it nothing can be said to be fresh.
    return not (read is not None and 0 <= now - read < every)


def _find_last_read(state: RulesState) -> float | None:
    """Of the source that was read last: one that fails is told as stale, and tried with the others."""
    times = [
        source.fetched
        for one in state.profiles
        if one.report
        for source in one.report.sources
        if source.name not in (STARTER, BUNDLE) and source.fetched > 0
    ]
    return max(times, default=None)
