"""Measurements: `speed` (make bench), `studies` of learning, `size` of models and of the package."""
