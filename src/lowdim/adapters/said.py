"""DID and SAID: every parameter moves inside one random subspace of few dimensions (intrinsic dimension of fine-tuning)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.adapters.core.subspace import DrawList, Subspace, SubspaceModel, select_parameters
from lowdim.adapters.core.whole import WholeAdapted, WholeMethod, refuse_adapted
from lowdim.errors import check_int

__all__ = ["SAID", "SubspaceAdapted", "said"]


class SubspaceAdapted(WholeAdapted):
    """Returned by `lowdim.adapt` for SAID: an `Adapted` with the names of `SubspaceModel`."""

    composition: Subspace

    @property
    def theta(self) -> nn.Parameter:
        """`(d − m,)`, or `(d,)` without scales."""
        return self.composition.theta

    @property
    def scales(self) -> nn.Parameter | None:
        """`(m,)`, or None."""
        return self.composition.scales

    @property
    def draws(self) -> DrawList:
        """`draws[i]` belongs to `names[i]`; assignable."""
        return DrawList(self.composition)

    @property
    def dimension(self) -> int:
        """The number of trained numbers, including the scales."""
        return self.composition.dimension

    @property
    def total(self) -> int:
        """The number of entries of the composed parameters."""
        return self.composition.total

    @property
    def projection(self) -> str:
        """The kind of random projection."""
        return self.composition.projection

    def param_groups(self, lr: float, weight_decay: float | None = None) -> list[dict[str, Any]]:
        """Optimizer groups for all trained parameters, without weight decay unless one is given."""
        return super().param_groups(lr, 0.0 if weight_decay is None else weight_decay)


@dataclass(frozen=True)
class SAID(WholeMethod):
    """All parameters of a pre-trained model move inside one random subspace: `d` numbers are trained, whatever its size.

    Formula: `θ_i = θ_i⁰ + λ_i · F_i(θ_{d−m})` for each of the `m` parameter tensors, `F_i` a Fastfood projection (see
    `lowdim.linalg.fastfood`) with draws of its own; `θ_{d−m} (d − m,)` starts at 0 and `λ (m,)` at 1, so the model does not
    change. DID is the same without `λ`: `θ_i = θ_i⁰ + F_i(θ_d)`.

    Args:
        dimension: `d`, scales included.
        structure_aware: with a learned scale for each tensor (SAID); False is DID.
        parameters: substrings of parameter names; None means all that require gradients. Modules in `modules_to_save` are
            excluded.

    Raises:
        ValueError: dimension below 1 (here); above the number of parameters, or not above the number of tensors with scales, or
            nothing selected (at attach).
        NoMatchingModuleError: a substring that matches no name.

    Example:
        >>> import torch, lowdim
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> adapted = lowdim.adapt(model, lowdim.adapters.SAID(dimension=12))
        >>> {name: tuple(p.shape) for name, p in adapted.trainable().items()}
        {'lowdim_shared.theta': (8,), 'lowdim_shared.scales': (4,)}

    It saves neither time nor memory: each forward pass computes all weights (`L log L` operations for a tensor of `L`
    numbers), the draws need 9 bytes per number, and activations are kept as in full fine-tuning. Use it to measure how few
    dimensions a task needs, or for checkpoints of a few kilobytes; to train fast use LoRA. Rates are tens of times those of
    full fine-tuning (3e-2 with Adam).

    Source: Aghajanyan, Gupta, Zettlemoyer, "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
    arXiv 2012.13255.
    """

    adapted_type: ClassVar[type[SubspaceAdapted]] = SubspaceAdapted

    dimension: int = 20_000
    structure_aware: bool = True
    parameters: Any = None

    def __post_init__(self) -> None:
        check_int("dimension", self.dimension, 1)
        if isinstance(self.parameters, Iterable) and not isinstance(self.parameters, str):
            object.__setattr__(self, "parameters", tuple(self.parameters))

    def select(self, model: nn.Module, kept: Iterable[str] = ()) -> dict[str, nn.Parameter]:
        """The tensors that are moved: floating point, by name or because they require gradients."""
        return select_parameters(model, self.parameters, kept)

    def composition(
        self, parameters: Mapping[str, Tensor], model: nn.Module, *, seed: int, dtype: torch.dtype | None, initialise: bool
    ) -> Subspace:
        """`theta`, `scales` and the draws."""
        return Subspace(
            parameters,
            self.dimension,
            structure_aware=self.structure_aware,
            seed=seed,
            dtype=dtype,
            initialise=initialise,
        )


def said(
    model: nn.Module, dimension: int, *, structure_aware: bool = True, seed: int = 0, parameters: Any = None
) -> SubspaceModel:
    """Train `dimension` numbers instead of the model's parameters.

    Formula: `θ_i = θ_i⁰ + λ_i · F_i(θ)`; see `SAID`, which is the same through `lowdim.adapt` (then with `save` and the rest).

    Args:
        model: frozen, and composed in place: it computes with the sum from now on.
        structure_aware: with a learned scale for each tensor (SAID); False is DID.
        parameters: substrings of parameter names; None means all that require gradients.

    Returns:
        A `SubspaceModel` around `model`.

    Raises:
        ValueError: as `SAID`; the model is already adapted.

    Example:
        >>> import torch, lowdim
        >>> sub = lowdim.adapters.said(torch.nn.Linear(6, 4), 5, structure_aware=False)
        >>> sub.theta.shape, sub.total, sub(torch.ones(2, 6)).shape
        (torch.Size([5]), 28, torch.Size([2, 4]))

    Source: Aghajanyan, Gupta, Zettlemoyer, arXiv 2012.13255.
    """
    method = SAID(dimension, structure_aware, parameters)
    refuse_adapted(model)
    return SubspaceModel(model, method.select(model), dimension, structure_aware=structure_aware, seed=seed)
