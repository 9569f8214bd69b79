"""Measured ratios; ``python -m benchmarks`` prints them all."""
