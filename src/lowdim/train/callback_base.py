"""The base of trainer callbacks, which also exists where transformers is not installed."""

from __future__ import annotations

__all__ = ["callback_base"]


def callback_base() -> type:
    """`transformers.TrainerCallback`, or `object` without transformers."""
    try:
        from transformers import TrainerCallback
    except ImportError:
        return object
    return TrainerCallback
