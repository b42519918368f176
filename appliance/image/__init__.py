"""The image at rest: reading it, telling what was changed, refreshing its rules, a new version beside it."""
