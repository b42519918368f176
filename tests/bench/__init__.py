"""Peers and product side by side, in one run: `python -m tests.bench` (docs/performance.md)."""
