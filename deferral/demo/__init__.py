"""Demonstrations on real data: each makes one comparison of methods from nothing."""

OURS = "two-stage deferral"
