"""Benchmarks of chatcore: ``python -m perf NAME``."""
