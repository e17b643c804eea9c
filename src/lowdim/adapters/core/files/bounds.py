"""No file makes its reader allocate far more than the file or the model holds: a rank of 10^9 takes a dozen bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["BoundedAllocation"]

#: Entries of a tensor that are always allowed: 64 MiB in float32.
_FREE = 2**24
#: An adapter may have this many times the entries of the largest tensor in its file or base: a large rank, a dense basis.
_FACTOR = 64
#: Tensors that reading makes beside the file's own: for each of those, and in all.
_EACH, _ALWAYS = 100, 10_000


class BoundedAllocation(TorchDispatchMode):
    """Within it, a tensor out of all proportion raises ValueError before it is allocated, and so do too many tensors.

    Args:
        tensors: of the file.
        shapes: of the weights that it is for.
    """

    def __init__(self, tensors: Mapping[str, Tensor], shapes: Sequence[Sequence[int]]):
        super().__init__()
        held = [tensor.numel() for tensor in tensors.values()] + [math.prod(shape) for shape in shapes]
        self.most_entries = max(_FREE, _FACTOR * max(held, default=0))
        self.left = _ALWAYS + _EACH * (len(tensors) + len(shapes))

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check calls whose first argument is a size."""
        if args and not isinstance(args[0], Tensor):
            size = args[0]
            count = math.prod(size) if isinstance(size, (list, tuple)) and all(isinstance(n, int) for n in size) else size
            if isinstance(count, int) and count > self.most_entries:
                raise ValueError(
                    f"it asks for a tensor of {count:.3g} entries; at most {self.most_entries:.3g} are in proportion to its "
                    "file and the model"
                )
            self.left -= 1
            if self.left < 0:
                raise ValueError("it asks for far more tensors than its file holds")
        return func(*args, **(kwargs or {}))
