"""Evaluation: comparisons with intervals, reward hacking, diversity, noise and audits of rewards."""
