"""Q-GaLore: GaLore with 8-bit weights, a 4-bit projection, and subspaces that are chosen less often once they are stable."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import compute_dtype, dequantize_affine, has_numbers, pack_nibbles, quantize_affine, unpack_nibbles
from lowdim.optim.core import sharded
from lowdim.optim.core.checking import check_ranks, check_schedule
from lowdim.optim.core.driver import ProjectedOptimizer
from lowdim.optim.core.groups import projected_layers
from lowdim.optim.core.inner import AdamW8bitRule, AdamWRule
from lowdim.optim.core.int8 import Int8Linear, Int8Parameter, Int8Store, check_int8
from lowdim.optim.core.options import TrainingOptions
from lowdim.optim.core.parts import DenseStore, Layout, Parts, Projector, State
from lowdim.optim.core.projectors import Identity, SVDProjector
from lowdim.surgery import as_linear, is_linear, matrix_shape, never_called, swap_layers

__all__ = ["QGaLore", "QuantizedSVDProjector"]

_LOG = logging.getLogger("lowdim.optim")
#: A layer that only smaller groups fit stays in floating point: the scales would cost more than the bytes save.
_SMALLEST_GROUP = 16


@dataclass(frozen=True)
class QuantizedSVDProjector(SVDProjector):
    """Leading singular vectors stored in few bits, and chosen at longer intervals once they are stable.

    Formula: the basis, `Rᵀ (rank, n)` for `m >= n`, else `L (m, rank)`, is quantized group-wise; `down` and `up` both use the
    dequantized basis. With the k-th choice (k >= 2) `|cos(first vector before, first vector now)|` enters a queue; where the
    last `queue_size` numbers have a mean `>= cos_threshold`, `interval ← int(interval · gamma)`. A choice is due where the step
    (plus `phase`, if any) is a multiple of the interval of that moment.

    State: `right_codes` or `left_codes` (uint8, two codes a byte up to 4 bits) with `…_scales`, `…_zeros`, and
    `first_vector`; with `bits=None` instead `right_basis` or `left_basis`; `queue (queue_size,)` with the newest last,
    `energy`, `overlap`, and the numbers `interval` and `svd_count`.
    """

    bits: int | None = 4
    group_size: int = 256
    cos_threshold: float = 0.4
    gamma: float = 2
    queue_size: int = 5

    def due(self, state: State, step: int) -> bool:
        """Without a basis, and at multiples of the interval."""
        return not state.get("svd_count") or (step + state.get("phase", 0)) % state["interval"] == 0

    def prepare(self, a: Tensor, state: State, step: int) -> bool:
        """Decompose the gradient if due, quantize the basis, and decide whether the interval grows."""
        if not self.due(state, step):
            return False
        side = self.sides(tuple(a.shape))[0]
        held = self._load_basis(state)
        made: State = dict(held)  # without a count of choices, so that one is due
        if not super().prepare(a, made, step):  # not finite: the old basis stays
            return False
        basis = made[f"{side}_basis"]
        count = state["svd_count"] = state.get("svd_count", 0) + 1
        state["energy"], state["overlap"] = made["energy"], made["overlap"]
        if count == 1:
            state["interval"] = self.update_interval
            state["queue"] = torch.zeros(self.queue_size, dtype=basis.dtype, device=basis.device)
        else:
            before = held[f"{side}_basis"][:, 0] if self.bits is None else state["first_vector"]
            self._judge(state, before, basis[:, 0], count)
        if self.bits is None:
            state[f"{side}_basis"] = basis
        else:
            state["first_vector"] = basis[:, 0].clone()
            self._store_basis(state, side, basis.mT.contiguous() if side == "right" else basis)
        return True

    def kept(self, basis: Tensor, like: Tensor) -> Tensor:
        """The basis unchanged: it is rounded once, to codes."""
        return basis

    def _judge(self, state: State, before: Tensor, now: Tensor, count: int) -> None:
        cosine = (before @ now).abs() / (torch.linalg.vector_norm(before) * torch.linalg.vector_norm(now))
        state["queue"] = torch.cat([state["queue"][1:], cosine[None]])
        if count > self.queue_size and has_numbers(cosine) and float(state["queue"].mean()) >= self.cos_threshold:
            state["interval"] = int(state["interval"] * self.gamma)

    def _store_basis(self, state: State, side: str, basis: Tensor) -> None:
        """Store the basis; entries that do not fill a group are quantized as a smaller one."""
        assert self.bits is not None
        flat = basis.reshape(-1)
        pieces = [flat[rows] for rows in self._runs(flat.numel())]
        made = [quantize_affine(p, group_size=min(self.group_size, p.numel()), bits=self.bits) for p in pieces]
        codes, scales, zeros = (torch.cat(parts) for parts in zip(*made))
        state[f"{side}_codes"] = pack_nibbles(codes) if self.bits <= 4 else codes
        state[f"{side}_scales"], state[f"{side}_zeros"] = scales, zeros

    def _load_basis(self, state: State) -> State:
        """The basis in floating point, in a state for `SVDProjector`; empty if there is none."""
        side = "right" if "right_codes" in state or "right_basis" in state else "left"
        if f"{side}_codes" not in state:
            return {key: state[key] for key in (f"{side}_basis",) if key in state}
        short = len(state["first_vector"])
        codes, scales, zeros = (state[f"{side}_{name}"] for name in ("codes", "scales", "zeros"))
        if len(codes) != short * self.rank:
            codes = unpack_nibbles(codes, short * self.rank)
        whole, rest = self._runs(len(codes))[0], self._runs(len(codes))[1:]
        size = min(self.group_size, len(codes))
        flat = dequantize_affine(codes[whole], scales[: len(codes) // size], zeros[: len(codes) // size], group_size=size)
        for rows in rest:
            last = dequantize_affine(codes[rows], scales[-1:], zeros[-1:], group_size=len(codes[rows]))
            flat = torch.cat([flat, last])
        return {f"{side}_basis": flat.view(self.rank, short).mT if side == "right" else flat.view(short, self.rank)}

    def _runs(self, total: int) -> list[slice]:
        """The entries that fill groups, and the rest, if any."""
        whole = total // self.group_size * self.group_size
        return [rows for rows in (slice(0, whole), slice(whole, total)) if rows.start < rows.stop]

    def down(self, a: Tensor, state: State) -> Tensor:
        """`a R` or `Lᵀ a`."""
        return super().down(a, self._load_basis(state))

    def up(self, low: Tensor, state: State) -> Tensor:
        """`low Rᵀ` or `L low`."""
        return super().up(low, self._load_basis(state))

    def add_up(self, weight: Tensor, low: Tensor, state: State, *, alpha: float, beta: float = 1.0) -> None:
        """One multiply-add onto the weight."""
        super().add_up(weight, low, self._load_basis(state), alpha=alpha, beta=beta)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Codes, scales and zeros, the first vector and the queue."""
        (side,), wide = self.sides(shape), compute_dtype(dtype)
        short, scalar = min(shape), ((), torch.float32)
        total, groups = short * self.rank, ((-(-short * self.rank // self.group_size), 1), wide)
        rest: Layout = {"queue": ((self.queue_size,), wide), "energy": scalar, "overlap": scalar}
        if self.bits is None:
            return {f"{side}_basis": ((short, self.rank), wide), **rest}
        codes = ((-(-total // 2) if self.bits <= 4 else total,), torch.uint8)
        kept: Layout = {f"{side}_codes": codes, f"{side}_scales": groups, f"{side}_zeros": groups}
        return {**kept, "first_vector": ((short,), wide), **rest}


class QGaLore(ProjectedOptimizer):
    """GaLore on weights stored in 8 bits and rounded stochastically, with a projection stored in 4 bits.

    Formula: `P` the quantized basis of GaLore's subspace; `g = G P` (or `Pᵀ G`), `D = adam8bit(g)`,
    `W ← (1 − lr · weight_decay)(dequantize(W) − η · scale · D Pᵀ)`, `W ← quantize(W)` with new scales. A subspace is chosen
    every `interval` steps; if the first vectors of the last `queue_size` choices hardly changed, the interval grows by
    `gamma`.
    Composition: QuantizedSVDProjector × AdamW8bitRule × NoResidual × Int8Store.

    Args:
        params: groups as `lowdim.optim.param_groups(model, rank=…)` makes them after `quantize_linears` or `prepare_model`, or
            anything torch accepts; `Int8Parameter`s and floating parameters alike. Keywords up to `seed` can be set per group;
            `rank=None` leaves a group unprojected (scale 1, the same inner rule).
        lr: as for GaLore; the paper's runs use 0.004 (7B) to 0.015 (130M).
        rank, update_interval, scale: as for GaLore; `update_interval` is the initial interval.
        projector_bits: of the basis, 1 to 8 (up to 4: two codes a byte); None keeps it in floating point.
        projector_group_size: consecutive entries of the basis that share a scale.
        cos_threshold: mean `|cos|` of successive first vectors from which the interval grows; above 1 it never does.
        gamma: factor by which it grows, >= 1.
        queue_size: number of choices in the mean.
        inner: `"adamw8bit"` (moments as bytes), or `"adamw"` (float32 moments, the same formula).
        min_8bit_size: low gradients smaller than this keep float32 moments.
        svd, seed: as for GaLore; it also seeds the rounding noise, the same in all processes.
        layerwise, accumulate, max_norm, replicas, stagger, foreach: as for GaLore. Torch's own gradient clipping and a
            GradScaler do not see the gradient of an 8-bit weight; `max_norm` does.

    In several processes without `layerwise`, wrap the model in DDP as usual: it averages the gradients of floating
    parameters, and `QGaLore` those of 8-bit weights (projected ones while the subspace is fixed). Under FSDP2 pass 8-bit
    weights in `ignored_params`.

    State of a parameter: `step`, `interval`, `svd_count` (numbers), that of QuantizedSVDProjector, and `exp_avg`,
    `exp_avg_sq` of the low gradient's shape (uint8 with `absmax1`, `absmax2`, or float32).

    Raises:
        ValueError: a hyperparameter out of range; rank above the smaller side of a matrix; a rank on a group with tensors that
            are not matrices; the first gradient is not finite.
        TypeError: a uint8 parameter that is not an `Int8Parameter` (FSDP makes these; the message says what to do).

    Example:
        >>> import torch
        >>> from lowdim.optim import QGaLore, param_groups, quantize_linears
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
        >>> model = quantize_linears(model, None, group_size=16)
        >>> optimizer = QGaLore(param_groups(model, rank=4), lr=0.02, update_interval=20)
        >>> x, y, losses = torch.randn(64, 16), torch.randn(64, 8), []
        >>> for _ in range(100):
        ...     loss = (model(x) - y).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     losses.append(loss.item())
        >>> losses[-1] < 0.7 * losses[0]
        True

    Not where the weights fit in memory anyway: GaLore is faster and does not round. Do not use `stochastic_round=False` with
    updates below half a code (1/500 of a group's range): rounding to nearest discards them.

    Source: Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
    arXiv 2407.08296.
    """

    method = "Q-GaLore"
    hides_gradients = True
    structural = ("rank", "inner", "projector_bits", "projector_group_size", "queue_size")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        rank: int | None = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        projector_bits: int | None = 4,
        projector_group_size: int = 256,
        cos_threshold: float = 0.4,
        gamma: float = 2,
        queue_size: int = 5,
        inner: str = "adamw8bit",
        min_8bit_size: int = 4096,
        svd: str = "auto",
        seed: int = 0,
        **how: Unpack[TrainingOptions],
    ):
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_interval": update_interval,
            "scale": scale,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "projector_bits": projector_bits,
            "projector_group_size": projector_group_size,
            "cos_threshold": cos_threshold,
            "gamma": gamma,
            "queue_size": queue_size,
            "inner": inner,
            "min_8bit_size": min_8bit_size,
            "svd": svd,
            "seed": seed,
        }
        super().__init__(params, defaults, **how)

    @staticmethod
    def prepare_model(
        model: nn.Module,
        *,
        rank: int,
        target_modules: Any = None,
        group_size: int = 256,
        stochastic_round: bool = True,
        **_: Any,
    ) -> nn.Module:
        """Replace each layer that `param_groups(model, rank)` would project by an `Int8Linear`, in place.

        Where `group_size` does not divide the number of a layer's weights, its groups are as large as the largest divisor of
        `in_features` up to it; a layer with no divisor of at least 16 stays in floating point (and is projected all the same).

        Returns:
            The model. Build the optimizer afterwards.
        """
        check_int("group_size", group_size, 1)
        read = never_called(model)  # code around such a layer computes with its weight, which must stay as it is
        found = {name: m for name, m in projected_layers(model, rank, target_modules).items() if m not in read}
        sizes = {name: _group_size(m, group_size) for name, m in found.items() if is_linear(m)}
        for name in (name for name, size in sizes.items() if not size):
            _LOG.info("%s stays in floating point: no group size of 16 or more divides its inputs", name)
        layers = {name: found[name] for name, size in sizes.items() if size}

        def convert(name: str, layer: nn.Module) -> nn.Module:
            made = Int8Linear.from_linear(as_linear(layer), group_size=sizes[name], stochastic_round=stochastic_round)
            made.weight.trainable = True
            return made

        swap_layers(model, layers, convert)
        return model

    def parts(self, group: dict[str, Any], ndim: int) -> Parts:
        """The composition for parameters of `ndim` dimensions."""
        projector: Projector = Identity()
        if group["rank"] is not None:
            schedule = {"cos_threshold": group["cos_threshold"], "gamma": group["gamma"], "queue_size": group["queue_size"]}
            projector = QuantizedSVDProjector(
                group["rank"],
                group["update_interval"],
                group["scale"],
                svd=group["svd"],
                seed=group["seed"],
                bits=group["projector_bits"],
                group_size=group["projector_group_size"],
                **schedule,
            )
        how: dict[str, Any] = {"betas": tuple(group["betas"]), "eps": group["eps"], "eps_mode": "inside"}
        eight = group["inner"] == "adamw8bit"
        inner = AdamW8bitRule(**how, min_size=group["min_8bit_size"]) if eight else AdamWRule(**how)
        return Parts(projector, inner, store=DenseStore() if ndim == 1 else Int8Store())

    def check_group(self, group: dict[str, Any]) -> None:
        """Every hyperparameter, and the rank against every shape."""
        check_schedule(group)
        check_float("scale", group["scale"])
        check_float("eps", group["eps"], 0.0)
        if group["projector_bits"] is not None:
            check_int("projector_bits", group["projector_bits"], 1, 8)
        check_int("projector_group_size", group["projector_group_size"], 1)
        check_float("cos_threshold", group["cos_threshold"])
        check_float("gamma", group["gamma"], 1.0)
        check_int("queue_size", group["queue_size"], 1)
        check_choice("inner", group["inner"], ("adamw8bit", "adamw"))
        check_int("min_8bit_size", group["min_8bit_size"], 0)
        check_choice("svd", group["svd"], ("auto", "exact", "randomized"))
        if group["rank"] is not None:
            check_int("rank", group["rank"], 1)
        check_ranks(group)
        for p in group["params"]:
            check_int8(p)
            if group["rank"] is not None and p.ndim != 2:
                raise ValueError(
                    f"rank must be None for a group that holds tensors other than matrices; got shape {tuple(p.shape)}"
                )

    def _project(self, p: Tensor, a: Tensor, group: dict[str, Any], state: State, step: int, parts: Parts) -> Tensor:
        """DDP does not see the gradients of 8-bit weights: they are averaged over the processes here."""
        alone = self.layerwise or not isinstance(p, Int8Parameter)
        whole = not alone and self._keeps_full(parts, state)
        if whole:
            sharded.average(a)
        low = super()._project(p, a, group, state, step, parts)
        if not alone and not whole:
            sharded.average(low)
        return low

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; gradients of 8-bit weights are dropped."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                if isinstance(p, Int8Parameter):
                    p.float_grad = None


def _group_size(layer: nn.Module, largest: int) -> int:
    """The number of entries that share a scale; 0 if no sensible number fits."""
    out_features, in_features = matrix_shape(layer)
    if out_features * in_features % largest == 0:
        return largest
    fitting = max(size for size in range(1, min(largest, in_features) + 1) if in_features % size == 0)
    return fitting if fitting >= _SMALLEST_GROUP else 0
