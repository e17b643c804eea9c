"""Random streams that never share numbers: one generator per (seed, purpose)."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

__all__ = ["derive_seed", "real_numbers", "seeded", "stream", "stream_on"]


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed from `seed` and `purpose`; another purpose gives an independent stream."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def stream(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose, the same on every machine.

    Example:
        >>> import torch
        >>> from lowdim.linalg import stream
        >>> a, b = (torch.randn(2, generator=stream(0, "basis")) for _ in range(2))
        >>> bool(torch.equal(a, b))
        True
    """
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def seeded(seed: int | None, generator: torch.Generator | None) -> torch.Generator | None:
    """The generator of a layer with both options: the given one has priority; None, torch's default one, without either.

    Example:
        >>> from lowdim.linalg import seeded
        >>> seeded(3, None).initial_seed(), seeded(None, None)
        (3, None)
    """
    return torch.Generator().manual_seed(seed) if generator is None and seed is not None else generator


def stream_on(device: torch.device | str, seed: int, *purpose: object) -> torch.Generator:
    """A generator for one purpose on the given device, for GPU code that draws millions of numbers per step.

    On other devices it is `stream`. The numbers differ between kinds of devices, as sums do.

    Example:
        >>> from lowdim.linalg import stream_on
        >>> stream_on("cpu", 0, "noise").device.type
        'cpu'
    """
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return stream(seed, *purpose)
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))


def real_numbers() -> Any:
    """A context in which tensors have numbers even in a forecast, for draws whose values are read.

    Example:
        >>> import torch
        >>> from torch._subclasses.fake_tensor import FakeTensorMode
        >>> from lowdim.linalg import real_numbers
        >>> with FakeTensorMode(), real_numbers():
        ...     torch.ones(2).tolist()
        [1.0, 1.0]
    """
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()
