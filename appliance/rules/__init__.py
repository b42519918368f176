"""Rules: sources, profiles, staging, the engine's own test, and the last good ruleset."""
