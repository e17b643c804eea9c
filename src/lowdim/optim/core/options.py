"""Training options that are independent of the method: the keywords that all optimizers here share."""

from __future__ import annotations

from typing import TypedDict

__all__ = ["TrainingOptions"]


class TrainingOptions(TypedDict, total=False):
    """Keywords that every optimizer here accepts besides its hyperparameters; see `ProjectedOptimizer`."""

    layerwise: bool
    accumulate: int
    max_norm: float | None
    replicas: bool | None
    stagger: bool
    foreach: bool
    master_weights: bool
