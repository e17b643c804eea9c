"""SaRA: the smallest entries of a weight are trained, the others stay."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.convolution import Convolution
from lowdim.adapters.core.guards import pristine_matrix, whole_parameters
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.method import Method, Stats, open_field
from lowdim.adapters.core.shared import StepCounter
from lowdim.adapters.core.update import WeightUpdate
from lowdim.adapters.sara.entries import EntriesLayer, apply_entries, put_entries
from lowdim.errors import CheckpointError, check_float, check_int
from lowdim.linalg import gather, has_numbers, local, match, pack_bits, stream, svd, unpack_bits, wide
from lowdim.surgery import CONVOLUTIONS, describe, model_device

__all__ = ["SaRA", "SaRAAdapted", "SaRAUpdate"]

#: The trained share of a weight that a forecast assumes: the largest in the paper.
NOMINAL = 0.2


class SaRAUpdate(WeightUpdate):
    """The entries of the weight where `mask` is True: `values (nnz,)` in row-major order, trained; nothing else moves.

    `active (nnz,)` marks those that are still trained. The others are held at the value that they had when they became
    inactive; `restore()` resets them to it after each optimizer step. Without an entry, `values` is an empty buffer.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        count: int,
        shape: tuple[int, ...],
        threshold: float,
        *,
        dtype: Any,
        device: Any,
    ):
        super().__init__(out_features, in_features)
        self.threshold = threshold
        values = torch.empty(count, dtype=dtype, device=device)
        if count:
            self.values = nn.Parameter(values)
        else:  # FSDP2 cannot shard an empty parameter
            self.register_buffer("values", values)
        self.register_buffer("mask", torch.zeros(shape, dtype=torch.bool, device=device))
        self.register_buffer("active", torch.ones(count, dtype=torch.bool, device=device))
        self.register_buffer("initial", torch.empty(count, dtype=dtype, device=device))  # W₀ at the mask
        self.register_buffer("index", torch.zeros(count, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("held", None, persistent=False)  # values of inactive entries; None while all are active

    values: Tensor
    mask: Tensor
    active: Tensor
    initial: Tensor
    index: Tensor
    held: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.out_features, self.in_features

    def current(self) -> Tensor:
        """The entries of the effective weight, `(nnz,)`; no gradient reaches inactive ones."""
        return self.values if self.held is None else torch.where(self.active, self.values, self.held.to(self.values.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`ΔW x`, where the entries cannot be put into the weight itself."""
        return apply_entries(x, self.current() - self.initial, self.index, self.shape)

    def convolve(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """A convolution with the kernel `ΔW`: patches, many times the input, are never built."""
        return cast(Convolution, conv)._conv_forward(x, self.dense().to(x.dtype).view(conv.weight.shape), None)

    def dense(self) -> Tensor:
        """`ΔW`: `values − W₀` at the mask, zero elsewhere."""
        change = self.current() - self.initial
        return change.new_zeros(math.prod(self.shape)).index_copy(0, self.index, change).view(self.shape)

    @torch.no_grad()
    def exact(self) -> Tensor:
        """`dense()` with the difference computed in float32 or better."""
        change = wide(self.current()) - wide(self.initial)
        return put_entries(None, change, self.index, self.shape, change.dtype)

    def nuclear_norm(self) -> Tensor:
        """The sum of the singular values of the weight with zeros at all but the active entries; differentiable, 0-dim."""
        return cast(Tensor, _Nuclear.apply(torch.where(self.active, self.values, 0.0), self.index, self.shape))

    @torch.no_grad()
    def initialise_from(self, mask: Tensor, weight: Tensor) -> None:
        """Start on the entries of `weight (out, in)` where `mask` is True."""
        self.mask.copy_(mask.view(self.mask.shape))
        self._settle()
        self.initial.copy_(weight.reshape(-1)[self.index])
        self.values.copy_(self.initial)

    @torch.no_grad()
    def select(self, threshold: float | None = None) -> None:
        """Keep training the active entries with `|value| < threshold` only; the others are held at their current value."""
        self.restore()
        now = gather(self.values.detach())
        self.active &= wide(now).abs() < (self.threshold if threshold is None else threshold)
        self.held = now.clone()

    def restore(self, tensors: Mapping[str, Tensor] | None = None, weight: Tensor | None = None) -> None:
        """Without arguments: reset the inactive entries to their held values. With arguments: load a checkpoint."""
        if tensors is None or weight is None:
            if self.held is not None:
                with torch.no_grad():
                    mine = local(self.values)
                    active, held = local(match(self.active, self.values)), local(match(self.held, self.values))
                    mine.copy_(torch.where(active, mine, held.to(mine.dtype)))
            return
        super().restore(tensors, weight)
        with torch.no_grad():
            self.initial.copy_(weight.reshape(-1)[self.index])

    def step(self) -> None:
        """Undo what the optimizer did to inactive entries."""
        self.restore()

    def meta(self) -> dict[str, Any]:
        """How many entries are trained, and the weight's own shape."""
        return {"entries": len(self.values), "shape": list(self.mask.shape)}

    def saved(self) -> dict[str, Tensor]:
        """`mask` packed to bits, `values` and `active`."""
        state = self.state_dict()
        return {"mask": pack_bits(self.mask), "values": state["values"], "active": state["active"]}

    def _settle(self) -> None:
        """Compute what depends on the mask and the active entries."""
        index = self.mask.reshape(-1).nonzero().squeeze(1)
        if len(index) != len(self.index):
            raise CheckpointError(f"the mask has {len(index)} entries; values has {len(self.index)}")
        self.index.copy_(index)
        self.held = None if bool(self.active.all()) else gather(self.values.detach()).clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = prefix + "mask"
        if key in state_dict and state_dict[key].dtype == torch.uint8:  # a checkpoint's
            state_dict = {**state_dict, key: unpack_bits(state_dict[key], self.mask.numel()).view(self.mask.shape)}
        super()._load_from_state_dict(state_dict, prefix, *args)
        if key in state_dict and has_numbers(self.mask):
            self._settle()


class _Nuclear(torch.autograd.Function):
    """`‖P‖_*` of the matrix `P (out, in)` with `entries (nnz,)` at `index`; the gradient is `U Vᵀ` there, 0 where P is."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
        u, s, vh = svd(put_entries(None, entries, index, shape, wide(entries).dtype))
        if ctx.needs_input_grad[0]:
            kept = s > torch.finfo(s.dtype).eps * max(shape) * s[:1]  # the nonzero directions of P
            ctx.save_for_backward(((u * kept) @ vh).reshape(-1)[index].to(entries.dtype))
        return s.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (direction,) = ctx.saved_tensors
        return grads[0].to(direction.dtype) * direction, None, None


class SaRAAdapted(Adapted):
    """Returned by `lowdim.adapt(model, SaRA(...))`: decides when to select again and which layer to penalise."""

    method: SaRA

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Restore inactive entries, count the step, and select again when it is due."""
        super().step(optimizer)
        if not isinstance(self.shared, StepCounter):  # merged
            return
        self.shared.count()
        if self.shared.done == self.method.selection_step:
            for update in self._updates():
                update.select()

    def regularizer(self) -> Tensor:
        """`lambda_rank` times the nuclear norm of one layer, drawn again in each step, the same on all processes; else 0."""
        drawn = self._drawn()
        if drawn is None:
            return torch.zeros((), device=model_device(self.model))
        with whole_parameters(drawn):
            return self.method.lambda_rank * drawn.nuclear_norm()

    def _drawn(self) -> SaRAUpdate | None:
        method = self.method
        if method.lambda_rank == 0 or not isinstance(self.shared, StepCounter):
            return None
        eligible = [u for u in self._updates() if u.mask.ndim == 2 and min(u.shape) > method.nuclear_min_dim]
        if not eligible:
            return None
        generator = stream(method.seed, "SaRA", self.seed, self.shared.done)
        update = eligible[int(torch.randint(len(eligible), (), generator=generator))]
        return update if int(update.active.sum()) > method.nuclear_min_count else None

    def _updates(self) -> list[SaRAUpdate]:
        return [cast(SaRAUpdate, layer.update) for layer in self.layers.values()]


@dataclass(frozen=True)
class SaRA(Method):
    """The entries of a weight that are smallest in absolute value are trained, in place; all others stay.

    Formula: `M = |W₀| < threshold`, `W_eff = W₀` with the trained `values (nnz,)` at `M`, `y = W_eff x + b`. After step number
    `progressive_iter` of `adapted.step()` only entries with `|value| < threshold` are trained; the others keep their value. The
    loss gets `lambda_rank · ‖W_eff ∘ M_active‖_*` of one layer, drawn uniformly for each step, by `adapted.regularizer()`.

    Args:
        threshold: in units of the weight; choose it so that 5 to 20 % of the weights are below it.
        progressive_iter: step after which entries are selected again; None means the middle of `total_steps`; without
            `total_steps` entries are never selected again.
        lambda_rank: weight of the nuclear norm; its decomposition takes time, so it is off by default.
        nuclear_min_dim, nuclear_min_count: only linear layers with `min(out, in)` above the first can be drawn, and one with
            no more active entries than the second gives 0.
        target_modules: which layers (see `lowdim.surgery.find_layers`).
        seed: of the draw, in addition to that of `lowdim.adapt`.
        dropout: on the update's input, while training; it costs a second product.
        total_steps: optimizer steps of the training; `lowdim.train` fills it in.

    Raises:
        ValueError: a hyperparameter out of range.
        TypeError: a layer without a floating point weight (at attach).

    Example:
        >>> import torch, lowdim
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[0.5, -0.001, 0.0]])
        >>> lowdim.adapters.SaRA(threshold=2e-3).attach(layer).update.values.detach()
        tensor([-0.0010,  0.0000])

    Weight decay acts on the values themselves. A step costs as much time as in full fine-tuning; only the optimizer's memory is
    smaller. If time matters, use LoRA.

    Source: Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
    arXiv 2409.06633.
    """

    adapted_type: ClassVar[type[SaRAAdapted]] = SaRAAdapted
    layer_type: ClassVar[type[AdaptedLayer]] = EntriesLayer

    threshold: float = 2e-3
    progressive_iter: int | None = None
    lambda_rank: float = 0.0
    nuclear_min_dim: int = 64
    nuclear_min_count: int = 100
    target_modules: Any = None
    seed: int = 0
    dropout: float = 0.0
    total_steps: int | None = open_field()

    def __post_init__(self) -> None:
        check_float("threshold", self.threshold, 0.0, low_open=True)
        if self.progressive_iter is not None:
            check_int("progressive_iter", self.progressive_iter, 1)
        if self.total_steps is not None:
            check_int("total_steps", self.total_steps, 1)
        check_float("lambda_rank", self.lambda_rank, 0.0)
        check_int("nuclear_min_dim", self.nuclear_min_dim, 0)
        check_int("nuclear_min_count", self.nuclear_min_count, 0)
        check_int("seed", self.seed, 0)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)

    @property
    def selection_step(self) -> int | None:
        """The step after which entries are selected again, or None."""
        if self.progressive_iter is not None or self.total_steps is None:
            return self.progressive_iter
        return max(1, self.total_steps // 2)

    @staticmethod
    def default_lr(threshold: float) -> float:
        """The authors' learning rate for AdamW with weight decay 0.01: `1e-3 · exp(−350 · threshold)`.

        Example:
            >>> round(SaRA.default_lr(2e-3), 7)
            0.0004966
        """
        check_float("threshold", threshold, 0.0, low_open=True)
        return 1e-3 * math.exp(-350 * threshold)

    def attach(self, layer: nn.Module, *, stats: Stats | None = None, initialise: bool = True, **kwargs: Any) -> AdaptedLayer:
        """Wrap one layer; the number of trained entries depends on its weight."""
        given = dict(stats or {})
        if self.accepts(layer):
            plain = layer.plain if isinstance(layer, AdaptedLayer) else layer
            if isinstance(plain, CONVOLUTIONS):
                given["shape"] = tuple(plain.weight.shape)
            weight = pristine_matrix(layer).detach()
            if has_numbers(weight):
                given["mask"] = wide(weight).abs() < self.threshold
                given["entries"] = int(given["mask"].sum())
        adapted = super().attach(layer, stats=given, initialise=initialise, **kwargs)
        if initialise and not given["entries"]:
            what = f"no entry of {describe(adapted.plain)} is below threshold={self.threshold:g}"
            warnings.warn(f"{what}: nothing is trained there", stacklevel=2)
        return adapted

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> SaRAUpdate:
        """Allocate `mask`, `values`, `active`; from shapes alone, where the weight decides, for `NOMINAL` of the entries."""
        shape = tuple(stats.get("shape", (out_features, in_features)))
        count = stats.get("entries", round(NOMINAL * out_features * in_features))
        return SaRAUpdate(out_features, in_features, count, shape, self.threshold, dtype=dtype, device=device)

    def initialise(self, update: SaRAUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Take the entries below the threshold."""
        update.initialise_from(stats["mask"], weight)

    def shared(self, layers: Mapping[str, nn.Module], *, seed: int, initialise: bool = True) -> StepCounter:
        """The number of steps, which decides the selection and the draw."""
        return StepCounter(model_device(next(iter(layers.values()))))
