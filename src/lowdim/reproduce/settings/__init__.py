"""Shared by the experiments: data, models, timing, outcomes."""
