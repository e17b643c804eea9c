"""Shared by all layers: swapping them into a model, and making a model dense again."""
