"""Figures that only a lesson draws. Each takes plain numbers that its notebook computed beside it."""
