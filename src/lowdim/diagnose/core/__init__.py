"""Shared by diagnostics: reading weights, and subspaces."""
