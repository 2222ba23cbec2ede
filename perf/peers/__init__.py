"""Servers to compare with: small honest programs, each behind the contract of ``base.py``."""
