"""The schedule of N:M decay: how strongly masked weights still act, and which pattern holds, at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, cast

from lowdim.errors import Options, check_choice, check_float, check_int, shown
from lowdim.surgery import Patterns

__all__ = ["NMDecayConfig"]

Pattern = tuple[int, int]
_STRUCTURES = ("stepwise", "geometric", "densify")
#: Frames of the structures "geometric" and "densify".
_FRAMES = 4
#: What is left of a masked weight when the exponential decay ends.
_LEFT = 1e-3


@dataclass(frozen=True)
class NMDecayConfig(Options):
    """How `nm_decay` thins out a model while it trains.

    Formula: with t finished optimizer steps, `dense = round(dense_fraction total_steps)`, `fine = round(fine_tune_fraction
    total_steps)`, the mask value is 1 for `t < dense`, 0 for `t >= total_steps - fine`, and between them, with
    `τ = t - dense` and `c = decay_coef`, 0 (step), `max(1 - c τ, 0)` (linear) or `exp(-c τ)` (exp).

    Attributes:
        n: weights that are kept of every `m`, >= 1.
        m: size of a group, >= 1; it must divide the grouped dimension of each layer.
        total_steps: optimizer steps of the training, >= 1; `lowdim run`, `compare` and `plan` fill it in.
        method: "decay", or "srste" (masked weights are 0 and shrink by `srste_lambda`).
        decay: of the mask value: "exp", "linear" or "step".
        decay_coef: c, > 0; null: `1 / S` (linear), `ln(1000) / S` (exp) for the `S` steps of the decay.
        structure: "stepwise" (from m-1 of m down to n), "geometric" (coarser groups first), "densify" (sparser first), or a
            mapping `{first step: (n, m)}`, dense before the first one, the last one at the end; null: one pattern throughout.
        dense_fraction: share of the steps before any mask, in [0, 1).
        fine_tune_fraction: share of the steps at the end in which masked weights are exactly 0, in [0, 1).
        srste_lambda: strength of SR-STE's shrinkage, >= 0.
        dim: axis of the stored weight along which groups run, -1 or 0: an nn.Linear's inputs or outputs; of transformers'
            Conv1D, which stores (in, out), its outputs or inputs; a convolution's input or output channels.
        gradient: "straight_through" (masked weights get the gradient of the weight in use) or "masked" (times the mask value).
        target_modules: names, dotted suffixes or a regular expression; null selects every linear layer but the head.
        exclude: skip a layer whose name contains one of these.

    Raises:
        ValueError: a value out of range, `n > m`, fractions that add up to more than 1, an unknown word.

    Example:
        >>> from lowdim.compress import NMDecayConfig
        >>> config = NMDecayConfig(1, 8, total_steps=100, structure="stepwise")
        >>> config.frames()
        {0: (7, 8), 22: (4, 8), 45: (2, 8), 67: (1, 8)}
        >>> config.pattern(30), round(config.mask_value(30), 3), config.mask_value(95)
        ((4, 8), 0.1, 0.0)

    Source: Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", arXiv 2402.04744.
    """

    n: int = 2
    m: int = 4
    _: KW_ONLY
    total_steps: int | None = None
    method: str = "decay"
    decay: str = "exp"
    decay_coef: float | None = None
    structure: str | Mapping[int, Pattern] | None = None
    dense_fraction: float = 0.0
    fine_tune_fraction: float = 0.1
    srste_lambda: float = 2e-4
    dim: int = -1
    gradient: str = "straight_through"
    target_modules: Patterns = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_int("m", self.m, 1)
        check_int("n", self.n, 1, self.m)
        if self.total_steps is not None:
            check_int("total_steps", self.total_steps, 1)
        check_choice("method", self.method, ("decay", "srste"))
        check_choice("decay", self.decay, ("exp", "linear", "step"))
        check_choice("gradient", self.gradient, ("straight_through", "masked"))
        if self.decay_coef is not None:
            check_float("decay_coef", self.decay_coef, 0.0, low_open=True)
        for name in ("dense_fraction", "fine_tune_fraction"):
            check_float(name, getattr(self, name), 0.0, 1.0, high_open=True)
        if self.dense_fraction + self.fine_tune_fraction > 1:
            raise ValueError(
                "dense_fraction and fine_tune_fraction must add up to 1 at most; got "
                f"{self.dense_fraction:g} and {self.fine_tune_fraction:g}"
            )
        check_float("srste_lambda", self.srste_lambda, 0.0)
        if self.dim not in (-1, 0) or isinstance(self.dim, bool):
            raise ValueError(f"dim must be -1 (the last axis of a stored matrix) or 0 (the first one); got {shown(self.dim)}")
        if isinstance(self.structure, str):
            check_choice("structure", self.structure, _STRUCTURES)
        elif self.structure is not None:
            object.__setattr__(self, "structure", _explicit(self.structure))
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))

    @property
    def dense_steps(self) -> int:
        """Steps before any mask."""
        return round(self.dense_fraction * self._total)

    @property
    def decay_steps(self) -> int:
        """S, the steps between the dense ones and those of fine-tuning."""
        return max(self._total - self.dense_steps - self._fine_steps, 0)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns in their order; the last one holds at the end."""
        n, m = self.n, self.m
        if self.structure is None:
            return ((n, m),)
        if not isinstance(self.structure, str):
            return tuple(self.structure.values())
        if self.structure == "stepwise":
            halvings = (m // n).bit_length() - 1  # int(log2(m / n))
            counts = [m - 1, *(m // 2**i for i in range(1, halvings))] if halvings else []
            return (*((count, m) for count in counts), (n, m))
        times = [2 ** (_FRAMES - 1 - i) for i in range(_FRAMES)]
        return tuple((n * (k if self.structure == "geometric" else 1), m * k) for k in times)

    def frames(self) -> dict[int, Pattern]:
        """The first step of each pattern, and the pattern `(n, m)`.

        Frame i of F starts at `dense_steps + int(i S / F)`; of those that start at one step the last holds.
        """
        if isinstance(self.structure, Mapping):
            self._total  # noqa: B018 (raises without it)
            return dict(self.structure)
        found = self.patterns
        return {self.dense_steps + i * self.decay_steps // len(found): pattern for i, pattern in enumerate(found)}

    def pattern(self, step: int) -> Pattern | None:
        """The pattern `(n, m)` after `step` finished steps; None while the layers are dense."""
        if step < self.dense_steps:
            return None
        started = [pattern for first, pattern in self.frames().items() if first <= step]
        return started[-1] if started else None

    def mask_value(self, step: int) -> float:
        """What a masked weight is multiplied by after `step` finished steps: 1.0 while the layers are dense."""
        if self.pattern(step) is None:
            return 1.0
        if step >= self._total - self._fine_steps or self.method == "srste" or self.decay == "step":
            return 0.0
        spent = step - self.dense_steps
        if self.decay == "linear":
            return max(1.0 - (self.decay_coef or 1.0 / self.decay_steps) * spent, 0.0)
        return math.exp(-(self.decay_coef or math.log(1 / _LEFT) / self.decay_steps) * spent)

    def description(self) -> dict[str, Any]:
        """The fields that a layer follows, as JSON values; `NMDecayConfig(**description)` is the same schedule."""
        names = ("n", "m", "total_steps", "method", "decay", "decay_coef", "structure", "dense_fraction", "fine_tune_fraction",
                 "srste_lambda", "dim", "gradient")  # fmt: skip
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        if isinstance(self.structure, Mapping):
            found["structure"] = {str(step): list(pattern) for step, pattern in self.structure.items()}
        return found

    @property
    def _total(self) -> int:
        if self.total_steps is None:
            raise ValueError(
                "total_steps of NMDecayConfig must be the number of optimizer steps of the training, an int >= 1; got None "
                "(lowdim run, compare and plan fill it in)"
            )
        return self.total_steps

    @property
    def _fine_steps(self) -> int:
        return round(self.fine_tune_fraction * self._total)


def _explicit(structure: Any) -> dict[int, Pattern]:
    """A checked mapping in the order of its steps; keys that are digits, as in JSON, are numbers."""
    if not isinstance(structure, Mapping) or not structure:
        raise ValueError(
            f"structure must be one of {', '.join(_STRUCTURES)}, None or a mapping of first steps to (n, m); "
            f"got {shown(structure)}"
        )
    found: dict[int, Pattern] = {}
    for step, pattern in structure.items():
        first = int(step) if isinstance(step, str) and step.isdigit() else step
        check_int("a first step in structure", first, 0)
        if not isinstance(pattern, (tuple, list)) or len(pattern) != 2:
            raise ValueError(f"structure must map step {first} to a pair (n, m); got {shown(pattern)}")
        check_int(f"m in structure at step {first}", pattern[1], 1)
        check_int(f"n in structure at step {first}", pattern[0], 1, pattern[1])
        found[cast(int, first)] = cast(Pattern, tuple(pattern))
    return dict(sorted(found.items()))
