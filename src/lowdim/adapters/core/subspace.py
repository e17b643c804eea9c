"""Parameters that move inside one random subspace: a projection for each tensor, or one for all of them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.adapters.core.composed import Composition, compose, is_composed, places_of, refuse_spread
from lowdim.adapters.core.fingerprints import digest_weight
from lowdim.adapters.core.merging import MergeReport
from lowdim.adapters.core.projections import KINDS
from lowdim.adapters.core.whole import make_for_itself, merge_parameters, refuse_adapted
from lowdim.errors import CheckpointError, NoMatchingModuleError, check_choice, check_int, nearest
from lowdim.linalg import wide
from lowdim.surgery import freeze, submodule

__all__ = ["DrawList", "Subspace", "SubspaceModel", "intrinsic_subspace", "select_parameters"]


class Subspace(Composition):
    """`offset_i = λ_i · P_i θ`, or all offsets together `P θ` (`joint`): `theta` and `scales (m,)` are trained.

    Without structure `scales` is None and `theta` is `(d,)`, else `(d − m,)`. The draws are buffers that are not in
    checkpoints: they are drawn again from the seed.
    """

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
        projection: str = "fastfood",
        joint: bool = False,
    ):
        super().__init__(parameters)
        self.dimension, self.seed, self.projection = dimension, seed, projection
        self.joint = self.wraps = joint
        self.total = sum(p.numel() for p in parameters.values())
        _check_dimension(dimension, len(self.names) if structure_aware else 0, self.total)
        first = next(iter(parameters.values()))
        where: dict[str, Any] = {"dtype": dtype or first.dtype, "device": first.device}
        free = dimension - len(self.names) if structure_aware else dimension
        self.theta = nn.Parameter(torch.zeros(free, **where))
        self.register_parameter("scales", nn.Parameter(torch.ones(len(self.names), **where)) if structure_aware else None)
        devices = [p.device for p in parameters.values()]
        self.targets = ["all parameters"] if joint else self.names
        self.counts = [self.total] if joint else [math.prod(shape) for shape in self.shapes]
        self.energies = [1.0] * len(self.targets)
        self._kind = KINDS[projection]
        for index, count in enumerate(self.counts):
            for name, blank in self._kind.blank(count, free).items():
                self.register_buffer(f"{name}_{index}", blank.to(devices[index]), persistent=False)
        self._latest: _Whole | None = None
        self._depth = 0
        self.drawn = initialise
        if initialise:
            self.draw()

    def draw(self) -> None:
        """Draw all numbers from the seed: projection by projection; of Fastfood's signs, permutation, Gaussian."""
        generator = torch.Generator().manual_seed(self.seed)
        for index, count in enumerate(self.counts):
            self.set_draws(index, self._kind.draw(count, len(self.theta), generator))
        self.drawn = True

    def get_draws(self, index: int) -> Any:
        """The draws of projection `index`."""
        return self._kind.draws(self._stored(index), self.counts[index], len(self.theta))

    def set_draws(self, index: int, draws: Any) -> None:
        """Use other draws for projection `index`."""
        try:
            stored = self._kind.keep(draws, self.counts[index], len(self.theta))
        except ValueError as error:
            raise ValueError(f"draws for {self.targets[index]} {error}") from None
        for name, value in stored.items():
            setattr(self, f"{name}_{index}", value.to(getattr(self, f"{name}_{index}").device))
        self.energies[index] = getattr(draws, "energy", 1.0)
        self._latest = None

    def offset(self, index: int) -> Tensor:
        """`λ_i · P_i θ` in the parameter's shape."""
        shape = self.shapes[index]
        if self.joint:
            start = sum(math.prod(earlier) for earlier in self.shapes[:index])
            return self._whole()[start : start + math.prod(shape)].view(shape)
        part = self.theta
        if self.projection == "fastfood" and len(part) > (length := len(self._stored(index)["gaussian"])):
            part = part[:length]  # a bias, a norm: fewer numbers than coordinates
        part = wide(part)
        if self.scales is not None:  # on θ, not on the projection: autograd would keep that
            part = part * self.scales[index].to(part.dtype)
        return self._project(part, index).view(shape)

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass, before which the joint projection is computed once."""
        if not self.joint:
            return forward(*args, **kwargs)
        if not self._depth:
            self._latest = _Whole(self.theta, self._project(wide(self.theta), 0))
        self._depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self._depth -= 1

    def _whole(self) -> Tensor:
        """All offsets in a row, kept after the pass: gradient checkpointing reads parameters again in the backward pass."""
        if self._latest is None or not (self._depth or self._latest.fits(self.theta)):
            self._latest = _Whole(self.theta, self._project(wide(self.theta), 0))
        return self._latest.offsets

    def _project(self, theta: Tensor, index: int) -> Tensor:
        return self._kind.apply(theta, self._stored(index), self.counts[index], self.energies[index])

    def about(self) -> dict[str, Any]:
        """A digest of each projection's draws, since a file does not hold them."""
        return {"draws": [self._digest(index) for index in range(len(self.targets))]}

    def check(self, about: Mapping[str, Any]) -> None:
        """The draws must be the ones used in training."""
        mine = self.about()["draws"]
        for name, one, other in zip(self.targets, mine, about.get("draws", mine)):
            if one != other:
                raise CheckpointError(
                    f"the random projection of {name} is not the one used in training: this torch draws other numbers "
                    f"from seed {self.seed}, or the draws were assigned by hand"
                )

    def _digest(self, index: int) -> str:
        parts = self._stored(index)
        flat = [(part.view(_NUMBERS[part.dtype]) if name in _AS_BITS else part).reshape(-1) for name, part in parts.items()]
        step = (len(flat[0]) // 4096) | 1
        return digest_weight(torch.cat([part[::step].float() for part in flat]))

    def _stored(self, index: int) -> dict[str, Tensor]:
        names = self._kind.blank(1, 1)
        return {name: getattr(self, f"{name}_{index}") for name in names}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.drawn and not self.theta.is_meta:  # allocated without numbers, which are now loaded
            self.draw()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}  # it belongs to a graph, which cannot be copied


_AS_BITS = ("gaussian", "matrix", "values")
_NUMBERS = {torch.int32: torch.float32, torch.int64: torch.float64}


class _Whole:
    """The offsets of one forward pass, and the `θ` that they are for."""

    def __init__(self, theta: Tensor, offsets: Tensor):
        self.offsets = offsets
        self._version, self._graph, self._theta = theta._version, torch.is_grad_enabled(), theta.detach().clone()

    def fits(self, theta: Tensor) -> bool:
        """Whether `θ` is the same; fused optimizers do not raise a tensor's version, so numbers are compared too."""
        known = self._theta
        same = (theta._version, theta.dtype, theta.device) == (self._version, known.dtype, known.device)
        return same and torch.is_grad_enabled() == self._graph and torch.equal(theta.detach(), known)


class DrawList:
    """The draws of all projections, in their order; an entry can be assigned."""

    def __init__(self, subspace: Subspace):
        self._subspace = subspace

    def __len__(self) -> int:
        return len(self._subspace.targets)

    def __getitem__(self, index: int) -> Any:
        return self._subspace.get_draws(range(len(self))[index])

    def __setitem__(self, index: int, draws: Any) -> None:
        self._subspace.set_draws(range(len(self))[index], draws)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


class SubspaceModel(Subspace):
    """A model that is trained inside a random subspace. Trained are `theta`, and `scales` if there are any.

    Made by `said` (a projection for each parameter) and `intrinsic_subspace` (one for all parameters together).

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
        """`draws[i]` belongs to `names[i]`, or to all of them together; assignable. Drawn again from the seed, not saved."""
        return DrawList(self)

    def offsets(self) -> dict[str, Tensor]:
        """`θ_i − θ_i⁰` by name, in the parameters' shapes."""
        if self.joint:
            self._latest = None
        return {name: self.offset(index) for index, name in enumerate(self.names)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The composed model's output."""
        return self.model(*args, **kwargs)

    def merge(self) -> nn.Module:
        """Add the offsets to the model's parameters for good, and return the plain model."""
        if not is_composed(self.model):
            raise ValueError("the model has been merged already")
        refuse_spread(self.parameters())
        self._latest = None
        self.merge_report: MergeReport | None = merge_parameters(self.model, self, self._places)
        return self.model


class _JointModel(SubspaceModel):
    """A `SubspaceModel` with one projection. Its state holds the digest of the draws, which a state that is loaded must fit."""

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(bytes.fromhex(self._digest(0))), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if not self.drawn:
            self.draw()
        if not torch.equal(state.cpu(), self.get_extra_state()):
            self.check({"draws": ["other"]})


def intrinsic_subspace(
    model: nn.Module, dimension: int, *, projection: str = "fastfood", seed: int = 0, parameters: Any = None
) -> SubspaceModel:
    """Train `dimension` numbers instead of all of the model's, through one random projection of them all.

    Formula: `θ = θ⁰ + P θ_d`, `θ (D,)` the selected parameters in a row, `θ_d (d,)` from 0. `P (D, d)` has nearly orthogonal
    columns of unit length over all `D` rows, so a step in `θ_d` moves `θ` by its length.

    Args:
        model: frozen, and composed in place: it computes with the sum from now on.
        dimension: `d`, in [1, D].
        projection: `"fastfood"` (O(D) memory), `"dense"` (O(D d)) or `"sparse"` (about `d √D` numbers).
        seed: of the projection.
        parameters: substrings of parameter names; None means all that require gradients.

    Returns:
        A `SubspaceModel` around `model`: `theta`, `offsets()`, `merge()`.

    Raises:
        ValueError: a dimension out of range, an unknown projection, nothing selected, a model that is already adapted.
        NoMatchingModuleError: a substring that matches no name.

    Example:
        >>> import torch, lowdim
        >>> sub = lowdim.adapters.intrinsic_subspace(torch.nn.Linear(6, 4), 5)
        >>> sub.theta.shape, sub.total, sub(torch.ones(2, 6)).shape
        (torch.Size([5]), 28, torch.Size([2, 4]))

    Rates are tens of times those of direct training (3e-2 with Adam), and `θ_d` takes no weight decay. Use it with
    `lowdim.diagnose.intrinsic_dimension`, or for a network of `d` numbers and a seed; to train in less memory use LoRA.

    Source: Li, Farkhoor, Liu, Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", arXiv 1804.08838.
    """
    check_int("dimension", dimension, 1)
    check_choice("projection", projection, KINDS)
    refuse_adapted(model)
    chosen = select_parameters(model, parameters)
    return _JointModel(model, chosen, dimension, structure_aware=False, seed=seed, projection=projection, joint=True)


def select_parameters(model: nn.Module, parameters: Any, kept: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """The tensors that are moved: floating point, by substrings of their names, or because they require gradients.

    Args:
        kept: modules that are trained whole.

    Raises:
        ValueError: nothing is selected, or a quantized parameter. NoMatchingModuleError: a substring that matches no name.
    """
    whole = {id(p) for name in kept for p in submodule(model, name).parameters()}
    every = {
        name: p for name, p in model.named_parameters() if p.is_floating_point() and p.dtype.itemsize > 1 and id(p) not in whole
    }
    if parameters is None:
        chosen = {name: p for name, p in every.items() if p.requires_grad}
    else:
        patterns = [parameters] if isinstance(parameters, str) else list(parameters)
        for pattern in patterns:
            if not any(pattern in name for name in every):
                close = ", ".join(nearest(pattern, every))
                raise NoMatchingModuleError(f"parameters: {pattern!r} matches no parameter name (nearest: {close})")
        chosen = {name: p for name, p in every.items() if any(pattern in name for pattern in patterns)}
    if not chosen:
        raise ValueError(
            f"no parameter of {type(model).__name__} is selected (parameters={parameters!r}); None selects those that "
            "require gradients"
        )
    odd = next((name for name, p in chosen.items() if type(p.data).__module__.startswith("torchao.")), None)
    if odd is not None:
        raise ValueError(f"parameter {odd} is quantized and cannot have an offset; select other ones with parameters")
    return chosen


def _check_dimension(dimension: int, scales: int, total: int) -> None:
    if not 1 <= dimension <= total:
        raise ValueError(f"dimension must be in [1, {total}], the number of selected parameters; got {dimension}")
    if dimension <= scales:
        raise ValueError(
            f"dimension must be above {scales}, one for the scale of each selected tensor; got {dimension} "
            "(structure_aware=False needs none)"
        )
