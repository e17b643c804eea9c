"""Shared by all adapters: the layer around a frozen weight, updates, attaching, merging, files."""
