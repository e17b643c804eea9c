"""The attributes and methods of a mixer's test, and how its outputs are compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.linalg import Cost, stream

__all__ = ["BATCH", "DTYPES", "LENGTH", "MixerHooks", "parts"]

BATCH, LENGTH = 3, 11
DTYPES = [torch.float64, torch.float32]


class MixerHooks(ABC):
    """What the shared tests need: how to make a mixer, and its output as a formula.

    Attributes:
        mixer_class: the class under test, made as `mixer_class(features, seed=…, device=…, dtype=…, **how)`.
        features: entries of a token.
        how: its hyperparameters.
        tolerances: largest error relative to the largest entry, by dtype and for gradients (in float64).
    """

    mixer_class: ClassVar[type[nn.Module]]
    features: ClassVar[int] = 6
    how: ClassVar[dict[str, Any]] = {}
    tolerances: ClassVar[dict[str, float]] = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 5e-2, "gradient": 1e-9}

    @abstractmethod
    def reference(self, mixer: Any, x: Tensor) -> Tensor:
        """The output for whole sequences `(batch, length, features)` as a formula of the parameters, differentiable.

        Written out from the paper: no method of the mixer, hyperparameters as the test states them.
        """

    def make(self, *, dtype: torch.dtype = torch.float64, device: Any = None, seed: int = 0) -> Any:
        """A fresh mixer."""
        return self.mixer_class(self.features, seed=seed, device=device, dtype=dtype, **self.how)

    def tokens(self, dtype: torch.dtype = torch.float64, *, length: int = LENGTH, seed: int = 0) -> Tensor:
        """Inputs `(batch, length, features)`."""
        draw = stream(seed, "mixer", "tokens", length)
        return torch.randn(BATCH, length, self.features, generator=draw, dtype=torch.float64).to(dtype)

    def chunked(self, mixer: Any, x: Tensor, size: int) -> Tensor:
        """The output in chunks of `size` tokens; by default one call per chunk, passing on the state."""
        state, out = None, []
        for piece in x.split(size, dim=1):
            y, state = mixer(piece, state, return_state=True)
            out.append(y)
        return torch.cat(out, 1)

    def expected_cost(self, batch: int, length: int) -> Cost | None:
        """The cost, by its formula; None if the test gives none."""
        return None

    def close(self, got: Tensor, want: Tensor, operation: str | torch.dtype) -> None:
        """Compare at the operation's tolerance."""
        name = str(operation).removeprefix("torch.")
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
        error = float((got.detach() - want.detach()).abs().max() / want.detach().abs().max().clamp_min(1e-30))
        assert error <= self.tolerances[name], f"{name}: {error:.3g} > {self.tolerances[name]:.3g}"

    def same_state(self, got: Any, want: Any, dtype: torch.dtype) -> None:
        """Two states, part by part."""
        for a, b in zip(parts(got), parts(want), strict=True):
            self.close(a, b, dtype)


def parts(state: Any) -> list[Tensor]:
    """The tensors of a state."""
    return list(_parts(state))


def _parts(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from _parts(part)
