"""DID and SAID: every parameter moves inside one random subspace of few dimensions (intrinsic dimension of fine-tuning)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.adapters.core.composed import Composition, compose, is_composed, places_of, refuse_spread
from lowdim.adapters.core.fingerprints import digest_weight
from lowdim.adapters.core.merging import MergeReport
from lowdim.adapters.core.whole import WholeAdapted, WholeMethod, make_for_itself, merge_parameters, refuse_adapted
from lowdim.errors import CheckpointError, NoMatchingModuleError, check_int, nearest
from lowdim.linalg import FastfoodDraws, fastfood_draws, fastfood_size, wide
from lowdim.linalg.fastfood import fastfood_op
from lowdim.surgery import freeze, submodule

__all__ = ["SAID", "SubspaceAdapted", "SubspaceModel", "said"]


class Subspace(Composition):
    """`offset_i = λ_i · F_i θ`: `theta (d − m,)` and `scales (m,)` trained, `F_i` a Fastfood projection with its own draws.

    Without structure `scales` is None and `theta` is `(d,)`. The draws are buffers that are not in checkpoints.
    """

    projection = "fastfood"

    theta: nn.Parameter
    scales: nn.Parameter | None

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        dimension: int,
        *,
        structure_aware: bool,
        seed: int,
        dtype: torch.dtype | None = None,
        initialise: bool = True,
    ):
        super().__init__(parameters)
        self.dimension, self.seed = dimension, seed
        self.total = sum(p.numel() for p in parameters.values())
        _check_dimension(dimension, len(self.names) if structure_aware else 0, self.total)
        first = next(iter(parameters.values()))
        where: dict[str, Any] = {"dtype": dtype or first.dtype, "device": first.device}
        free = dimension - len(self.names) if structure_aware else dimension
        self.theta = nn.Parameter(torch.zeros(free, **where))
        self.register_parameter("scales", nn.Parameter(torch.ones(len(self.names), **where)) if structure_aware else None)
        self.energies = [1.0] * len(self.names)
        kinds = {"signs": torch.int8, "permutation": torch.int32, "gaussian": torch.int32}
        for index, parameter in enumerate(parameters.values()):
            size = fastfood_size(parameter.numel())
            for kind, stored in kinds.items():
                blank = torch.empty(size, dtype=stored, device=parameter.device)
                self.register_buffer(f"{kind}_{index}", blank, persistent=False)
        self.drawn = initialise
        if initialise:
            self.draw()

    def draw(self) -> None:
        """Draw all numbers from the seed: parameter by parameter, each signs, permutation, Gaussian."""
        generator = torch.Generator().manual_seed(self.seed)
        for index in range(len(self.names)):
            self.set_draws(index, fastfood_draws(self._count(index), generator))
        self.drawn = True

    def get_draws(self, index: int) -> FastfoodDraws:
        """The draws of parameter `names[index]`."""
        signs, permutation, gaussian = self._stored(index)
        return FastfoodDraws(signs, permutation, gaussian)

    def set_draws(self, index: int, draws: FastfoodDraws) -> None:
        """Use other draws for parameter `names[index]`."""
        size = fastfood_size(self._count(index))
        if len(draws) != size:
            raise ValueError(f"draws for {self.names[index]} must have length {size}; got {len(draws)}")
        bits = torch.int64 if draws.gaussian.dtype == torch.float64 else torch.int32
        gaussian = draws.gaussian if bits == torch.int64 else draws.gaussian.float()
        # as bits, because model.to(torch.bfloat16) would round floating point buffers
        stored = {"signs": draws.signs.to(torch.int8), "permutation": draws.permutation.int(), "gaussian": gaussian.view(bits)}
        for kind, value in stored.items():
            setattr(self, f"{kind}_{index}", value.to(getattr(self, f"{kind}_{index}").device))
        self.energies[index] = draws.energy

    def offset(self, index: int) -> Tensor:
        """`λ_i · F_i θ` in the parameter's shape."""
        count = self._count(index)
        signs, permutation, gaussian = self._stored(index)
        part = self.theta
        if len(part) > len(gaussian):  # a bias, a norm: fewer numbers than coordinates
            part = part[: len(gaussian)]
        part = wide(part)
        if self.scales is not None:  # on θ, not on the projection: autograd would keep that
            part = part * self.scales[index].to(part.dtype)
        out = fastfood_op(part.to(gaussian.device), signs, permutation, gaussian, count, self.energies[index])
        return out.view(self.shapes[index])

    def about(self) -> dict[str, Any]:
        """A digest of each parameter's draws, since a file does not hold them."""
        return {"draws": [_digest(self, index) for index in range(len(self.names))]}

    def check(self, about: Mapping[str, Any]) -> None:
        """The draws must be the ones used in training."""
        mine = self.about()["draws"]
        for name, one, other in zip(self.names, mine, about.get("draws", mine)):
            if one != other:
                raise CheckpointError(
                    f"the random projection of {name} is not the one used in training: this torch draws other numbers "
                    f"from seed {self.seed}, or the draws were assigned by hand"
                )

    def _count(self, index: int) -> int:
        return math.prod(self.shapes[index])

    def _stored(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        signs, permutation, bits = (getattr(self, f"{kind}_{index}") for kind in ("signs", "permutation", "gaussian"))
        return signs, permutation, bits.view(torch.float64 if bits.dtype == torch.int64 else torch.float32)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.drawn and not self.theta.is_meta:  # allocated without numbers, which are now loaded
            self.draw()


class DrawList:
    """The draws of all composed parameters, in the order of `names`; an entry can be assigned."""

    def __init__(self, subspace: Subspace):
        self._subspace = subspace

    def __len__(self) -> int:
        return len(self._subspace.names)

    def __getitem__(self, index: int) -> FastfoodDraws:
        return self._subspace.get_draws(range(len(self))[index])

    def __setitem__(self, index: int, draws: FastfoodDraws) -> None:
        self._subspace.set_draws(range(len(self))[index], draws)

    def __iter__(self) -> Iterator[FastfoodDraws]:
        return (self[index] for index in range(len(self)))


class SubspaceModel(Subspace):
    """A model that is trained inside a random subspace: made by `said`. Trained are `theta`, and `scales` if there are any.

    Attributes:
        model: the given model, frozen; it computes with `θ_i⁰ + offset_i` from now on, and its own tensors are never written.
        theta: `(d,)`, or `(d − m,)` with scales.
        scales: `(m,)`, or None.
        names: the composed parameters.
        dimension, total, seed, projection: `d`, `D`, the seed of the draws, and their kind.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], dimension: int, **options: Any):
        super().__init__(parameters, dimension, **options)
        self._places = places_of(model, self.names)
        freeze(model)
        compose(model, self, self._places)
        self.model = model
        make_for_itself(self, self.unsaved())

    @property
    def draws(self) -> DrawList:
        """`draws[i]` belongs to `names[i]`; assignable. Not in `state_dict()`: drawn again from the seed."""
        return DrawList(self)

    def offsets(self) -> dict[str, Tensor]:
        """`θ_i − θ_i⁰` by name, in the parameters' shapes."""
        return {name: self.offset(index) for index, name in enumerate(self.names)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The composed model's output."""
        return self.model(*args, **kwargs)

    def merge(self) -> nn.Module:
        """Add the offsets to the model's parameters for good, and return the plain model."""
        if not is_composed(self.model):
            raise ValueError("the model has been merged already")
        refuse_spread(self.parameters())
        self.merge_report: MergeReport | None = merge_parameters(self.model, self, self._places)
        return self.model


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
        whole = {id(p) for name in kept for p in submodule(model, name).parameters()}
        every = {
            name: p
            for name, p in model.named_parameters()
            if p.is_floating_point() and p.dtype.itemsize > 1 and id(p) not in whole
        }
        if self.parameters is None:
            chosen = {name: p for name, p in every.items() if p.requires_grad}
        else:
            patterns = [self.parameters] if isinstance(self.parameters, str) else list(self.parameters)
            for pattern in patterns:
                if not any(pattern in name for name in every):
                    close = ", ".join(nearest(pattern, every))
                    raise NoMatchingModuleError(f"parameters: {pattern!r} matches no parameter name (nearest: {close})")
            chosen = {name: p for name, p in every.items() if any(pattern in name for pattern in patterns)}
        if not chosen:
            raise ValueError(
                f"no parameter of {type(model).__name__} is selected (parameters={self.parameters!r}); None selects those that "
                "require gradients"
            )
        odd = next((name for name, p in chosen.items() if type(p.data).__module__.startswith("torchao.")), None)
        if odd is not None:
            raise ValueError(f"parameter {odd} is quantized and cannot have an offset; select other ones with parameters")
        return chosen

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


def _check_dimension(dimension: int, scales: int, total: int) -> None:
    if not 1 <= dimension <= total:
        raise ValueError(f"dimension must be in [1, {total}], the number of selected parameters; got {dimension}")
    if dimension <= scales:
        raise ValueError(
            f"dimension must be above {scales}, one for the scale of each selected tensor; got {dimension} "
            "(structure_aware=False needs none)"
        )


def _digest(subspace: Subspace, index: int) -> str:
    parts = subspace._stored(index)
    step = (len(parts[0]) // 4096) | 1
    return digest_weight(torch.cat([part[::step].float() for part in parts]))
