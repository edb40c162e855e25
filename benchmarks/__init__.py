"""Measurements: what the kit learns, and how fast. `python -m benchmarks.learning --help`."""
