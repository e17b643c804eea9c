"""Arrays in, arrays out: a function that works with tensors gives back the kind of array that it was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_given", "as_tensor"]


def as_tensor(array: Any) -> Tensor:
    """A tensor of a numpy array, a list or a tensor; without a copy if torch can share the memory (no negative strides)."""
    return array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))


def as_given(answer: Tensor, like: Any) -> Any:
    """The result as a tensor on its device if the argument `like` was one, else as a numpy array.

    Example:
        >>> import numpy as np
        >>> from lowdim.linalg import as_given, as_tensor
        >>> given = np.array([1.0, 2.0])
        >>> as_given(2 * as_tensor(given), like=given)
        array([2., 4.])
    """
    return answer.to(like.device) if isinstance(like, Tensor) else answer.numpy()
