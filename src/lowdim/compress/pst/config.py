"""What PST trains, and the share of weights that it takes away at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowdim.errors import Options, check_float, check_int, shown
from lowdim.surgery import Patterns

__all__ = ["PSTConfig"]

#: The fields that a layer follows; the others say which layers, and where their random numbers come from.
_FOLLOWED = ("total_steps", "sparsity", "weight_rank", "mask_rank", "weight_beta", "mask_alpha1", "mask_alpha2",
             "initial_sparsity", "initial_warmup", "final_warmup", "train_others")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PSTConfig(Options):
    """How `pst` thins out a model while it is fine-tuned.

    Formula: after t of T optimizer steps, with `a = initial_warmup T` and `b = T - final_warmup T`, the sparsity is
    `initial_sparsity` for `t <= a`, `sparsity` for `t > b`, and between them
    `sparsity + (initial_sparsity - sparsity) (1 - (t - a) / (b - a))³`.

    Attributes:
        total_steps: optimizer steps of the training, >= 1; `lowdim run`, `compare` and `plan` fill it in.
        sparsity: share of zeros in each layer at the end, in [0, 1).
        weight_rank: rank of the trained update of a weight, >= 1.
        mask_rank: rank of the trained low-rank part of the scores, >= 1.
        weight_beta: factor of the update.
        mask_alpha1: factor of the low-rank part of the scores.
        mask_alpha2: factor of the scores of whole rows and columns.
        initial_sparsity: share of zeros at the first step, in [0, 1); of a pruned model, its sparsity.
        initial_warmup: share of the steps at the start with `initial_sparsity`, in [0, 1].
        final_warmup: share of the steps at the end with `sparsity`, in [0, 1].
        target_modules: names, dotted suffixes or a regular expression; null selects every linear layer but the head.
        exclude: skip a layer whose name contains one of these.
        train_others: train what is outside of these layers, too, such as embeddings and norms; it is frozen otherwise.
        seed: of the random factors at the start.

    Raises:
        ValueError: a value out of range, or warm-ups that add up to more than 1.

    Example:
        >>> from lowdim.compress import PSTConfig
        >>> config = PSTConfig(total_steps=100, sparsity=0.8)
        >>> [round(config.sparsity_at(step), 3) for step in (0, 10, 20, 40, 70, 100)]
        [0.0, 0.0, 0.337, 0.7, 0.8, 0.8]

    Source: Li et al., "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", IJCAI 2022, arXiv 2205.11005.
    """

    total_steps: int | None = None
    sparsity: float = 0.9
    weight_rank: int = 8
    mask_rank: int = 8
    weight_beta: float = 1.0
    mask_alpha1: float = 1.0
    mask_alpha2: float = 1.0
    initial_sparsity: float = 0.0
    initial_warmup: float = 0.1
    final_warmup: float = 0.3
    target_modules: Patterns = None
    exclude: tuple[str, ...] = ()
    train_others: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.total_steps is not None:
            check_int("total_steps", self.total_steps, 1)
        for name in ("sparsity", "initial_sparsity"):
            check_float(name, getattr(self, name), 0.0, 1.0, high_open=True)
        for name in ("weight_rank", "mask_rank"):
            check_int(name, getattr(self, name), 1)
        for name in ("weight_beta", "mask_alpha1", "mask_alpha2"):
            check_float(name, getattr(self, name))
        for name in ("initial_warmup", "final_warmup"):
            check_float(name, getattr(self, name), 0.0, 1.0)
        if self.initial_warmup + self.final_warmup > 1:
            raise ValueError(
                "initial_warmup and final_warmup must add up to 1 at most; got "
                f"{self.initial_warmup:g} and {self.final_warmup:g}"
            )
        if not isinstance(self.train_others, bool):
            raise ValueError(f"train_others must be True or False; got {shown(self.train_others)}")
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))

    def sparsity_at(self, step: int) -> float:
        """The share of zeros after `step` finished optimizer steps.

        Raises:
            ValueError: `total_steps` is None, or a negative step.
        """
        total = self.steps
        check_int("step", step, 0)
        start, stop = self.initial_warmup * total, total - self.final_warmup * total
        if step <= start:
            return self.initial_sparsity
        if step > stop:
            return self.sparsity
        left = 1 - (step - start) / (stop - start)
        return self.sparsity + (self.initial_sparsity - self.sparsity) * left**3

    @property
    def steps(self) -> int:
        """`total_steps`, which must be known.

        Raises:
            ValueError: it is None.
        """
        if self.total_steps is None:
            raise ValueError(
                "total_steps of PSTConfig must be the number of optimizer steps of the training, an int >= 1; got None "
                "(lowdim run, compare and plan fill it in)"
            )
        return self.total_steps

    def description(self) -> dict[str, Any]:
        """The fields that a layer follows, as JSON values; `PSTConfig(**description)` is the same schedule."""
        return {name: getattr(self, name) for name in _FOLLOWED}
