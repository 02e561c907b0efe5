"""Measurements and demonstrations; run as ``python -m benchmarks.<name>`` from the repository root."""
