"""Shared by layers: swapping them into a model, making it dense again, what token mixers and block-diagonal factors share."""
