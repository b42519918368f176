"""The version of this program, from the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def find_version() -> str:
    """As in `0.1.0`; `0+unknown` when run from a tree that is not installed."""
    try:
        return version("hairpin-ips")
    except PackageNotFoundError:
        return "0+unknown"
