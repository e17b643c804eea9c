"""Shared by compression systems: reports, and reading compressed models."""
