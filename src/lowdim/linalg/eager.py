"""Whether torch computes a call as it is written, which shortcuts past torch's own operations need to know."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["is_eager"]


def is_eager() -> bool:
    """Whether no compiler, no tracer, no `torch.func` transform and no forward-mode gradient sees what is computed now.

    These follow torch's operations. Numpy, numbers read from tensors and an autograd.Function are lost on them.

    Example:
        >>> import torch
        >>> from lowdim.linalg.eager import is_eager
        >>> seen = []
        >>> _ = torch.func.vmap(lambda x: seen.append(is_eager()) or x)(torch.ones(2))
        >>> is_eager(), seen
        (True, [False])
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
