"""The image at rest: reading it, telling what was changed, refreshing its rules, and putting a new version beside it."""
