"""The attributes and methods of an optimizer's test."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lowdim.optim import ProjectedOptimizer
from lowdim.testing.optimizer_problem import OptimizerProblem

__all__ = ["OptimizerHooks", "raises"]


@contextmanager
def raises(error: type[Exception], pattern: str) -> Iterator[None]:
    """The block must raise `error` with a message that matches."""
    message = None
    try:
        yield
    except error as caught:
        message = str(caught)
    assert message is not None, f"{error.__name__} was not raised"
    assert re.search(pattern, message), f"{message!r} does not match {pattern!r}"


class OptimizerHooks(OptimizerProblem, ABC):
    """What the shared tests need: how to make an optimizer, and its step as a formula.

    Attributes:
        update_interval: steps between subspaces of the optimizer from `make`; tests run across at least one refresh.
        decay: the weight decay with which steps are compared with the formula.
        formula: allowed difference from the formula, relative to how far a parameter has moved (float64).
        rounding: allowed relative difference where only the order of sums differs (float64).
    """

    update_interval = 3
    decay = 0.1
    formula = 1e-9
    rounding = 1e-9

    @abstractmethod
    def make(self, params: Any, **options: Any) -> ProjectedOptimizer:
        """The optimizer with a small rank (at most 4) and a learning rate that brings the loss of the problem down."""

    @abstractmethod
    def reference_step(self, weight: Tensor, grad: Tensor, state: dict[str, Any], step: int, projected: bool) -> Tensor:
        """The next weight, by the paper's formulas in plain tensors.

        Written out in the test with the numbers that `make` passes: nothing of `lowdim` computes it.

        Args:
            weight, grad: of one parameter, in float64.
            state: the formula's own memory of this parameter, empty at step 0; it changes in place.
            step: steps done before this one.
            projected: whether it is in the group with a rank (matrices are, vectors are not).
        """
