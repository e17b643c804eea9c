"""GaLore: Adam (or Adafactor) in a low-dimensional subspace of each matrix's gradient."""

from __future__ import annotations

from typing import Any, Unpack

from lowdim.errors import check_choice, check_float, check_int
from lowdim.optim.core.adafactor import AdafactorRule
from lowdim.optim.core.checking import check_ranks, check_schedule
from lowdim.optim.core.driver import ProjectedOptimizer
from lowdim.optim.core.half import AdamW16bitRule
from lowdim.optim.core.inner import AdamW8bitRule, AdamWRule
from lowdim.optim.core.options import TrainingOptions
from lowdim.optim.core.parts import InnerRule, Parts
from lowdim.optim.core.projectors import PROJ_TYPES, Identity, Projector, SVDProjector, TuckerProjector

__all__ = ["GaLore"]

#: Allowed keys of `inner_options`, and the source of each default.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "adamw": (),
    "adamw16bit": (),
    "adamw8bit": ("min_size",),
    "adafactor": ("eps", "clip_threshold", "decay_rate", "beta1", "scale_parameter", "relative_step", "warmup_init"),
}


class GaLore(ProjectedOptimizer):
    """Train all weights with the optimizer state of a low-rank adapter, by projecting gradients onto their leading subspace.

    Formula: every `update_interval` steps `G = U S Vᵀ`, `R = V[:, :rank]` (`m >= n`, else `L = U[:, :rank]`); every step
    `g = G R`, `(D, η) = inner(g)`, `W ← W − η · scale · D Rᵀ`, then `W ← W − lr · weight_decay · W`. The moments of `inner`
    are kept unchanged when the subspace changes. Composition: SVDProjector (TuckerProjector for more than two
    dimensions) × AdamWRule | AdamW8bitRule | AdafactorRule × NoResidual × DenseStore.

    Args:
        params: groups as `lowdim.optim.param_groups(model, rank=…)` makes them, or anything torch accepts. Every keyword up to
            `seed` can be set per group; `rank=None` leaves a group unprojected (scale 1, the same inner rule).
        lr: with `scale` 0.25 about four to ten times that of AdamW; the paper trains with 0.005 to 0.01.
        rank: number of directions; for tensors of more than two dimensions limited to each dimension, or a tuple of ranks.
        update_interval: steps between subspaces, T.
        scale: factor on the projected update.
        proj_type: `"std"` projects the shorter side, `"reverse_std"` the longer, `"right"`/`"left"` a fixed one, `"full"` both.
        inner: `"adamw"`, `"adamw16bit"` (moments in bfloat16), `"adamw8bit"` (as bytes), `"adafactor"`.
        eps: None for the rule's own: 1e-6 (adamw, added to the uncorrected √v), 1e-8 (adamw8bit).
        correct_bias: Adam's bias correction (False: η = lr).
        inner_options: adamw8bit: `min_size=4096`, low gradients smaller than this keep float32 moments; adafactor: `eps`,
            `clip_threshold`, `decay_rate`, `beta1`, `scale_parameter`, `relative_step`, `warmup_init`.
        svd: `"auto"`: exact for matrices with a side up to 512, else a sketch that starts from the old basis; or `"exact"`,
            `"randomized"`.
        seed: of the sketches.
        layerwise: update inside the backward pass and free each gradient at once; not with a GradScaler or torch's own gradient
            clipping, which need all gradients at once (`max_norm` does not).
        accumulate: micro-batches per step with `layerwise` (save checkpoints between steps).
        max_norm: clip by the global norm of the projected gradients (and of those of unprojected parameters).
        replicas: with `layerwise` where several processes hold the same parameters and no DDP averages their gradients.
        stagger: spread the choices of subspaces over the interval, so that only the first step makes all of them.
        foreach: update unprojected parameters in one fused call.

    State of a parameter: `step` (int), `right_basis (n, rank)` or `left_basis (m, rank)` (`factor0`, … for tensors), `energy`
    (share of ‖G‖² in the subspace at its choice), `overlap` (share of it in the previous one), `phase` if staggered,
    `exp_avg`, `exp_avg_sq` of the low gradient's shape (uint8 with `absmax1`, `absmax2` in 8 bits), or `row`, `col`.
    Moments are float32 where parameters have half precision.

    Raises:
        ValueError: a hyperparameter out of range; rank above the smaller side of a matrix; a rank on a group with vectors; the
            first gradient is not finite (later such gradients leave the old subspace).
        TypeError: sparse gradients.

    Example:
        >>> import torch
        >>> from lowdim.optim import GaLore, param_groups
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
        >>> optimizer = GaLore(param_groups(model, rank=4), lr=0.02, update_interval=20)
        >>> x, y, losses = torch.randn(64, 16), torch.randn(64, 8), []
        >>> for _ in range(100):
        ...     loss = (model(x) - y).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     losses.append(loss.item())
        >>> losses[-1] < 0.7 * losses[0]
        True

    Not for models whose optimizer state is small compared with the activations (long sequences, small models), where plain
    AdamW is faster; nor for short training (fewer steps than one or two intervals).

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024, arXiv 2403.03507.
    """

    method = "GaLore"
    structural = ("rank", "proj_type", "inner")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        rank: int | tuple[int, ...] | None = 128,
        update_interval: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        inner: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        inner_options: dict[str, Any] | None = None,
        svd: str = "auto",
        seed: int = 0,
        **how: Unpack[TrainingOptions],
    ):
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_interval": update_interval,
            "scale": scale,
            "proj_type": proj_type,
            "inner": inner,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "inner_options": inner_options,
            "svd": svd,
            "seed": seed,
        }
        super().__init__(params, defaults, **how)

    def parts(self, group: dict[str, Any], ndim: int) -> Parts:
        """The composition for parameters of `ndim` dimensions."""
        projector: Projector
        if group["rank"] is None:
            projector = Identity()
        elif ndim > 2:
            projector = TuckerProjector(group["rank"], group["update_interval"], group["scale"])
        else:
            projector = SVDProjector(
                group["rank"], group["update_interval"], group["scale"], group["proj_type"], group["svd"], group["seed"]
            )
        return Parts(projector, _rule(group), decay="before" if group["inner"] == "adafactor" else "after")

    def check_group(self, group: dict[str, Any]) -> None:
        """Every hyperparameter, and the rank against every shape."""
        check_schedule(group)
        check_float("scale", group["scale"])
        check_choice("proj_type", group["proj_type"], PROJ_TYPES)
        check_choice("inner", group["inner"], _OPTIONS)
        check_choice("svd", group["svd"], ("auto", "exact", "randomized"))
        if group["eps"] is not None:
            if group["inner"] == "adafactor":
                raise ValueError(
                    f"eps of adafactor is a pair in inner_options={{'eps': (1e-30, 1e-3)}}; got eps={group['eps']!r}"
                )
            check_float("eps", group["eps"], 0.0)
        _check_options(group)
        check_ranks(group)


def _check_options(group: dict[str, Any]) -> None:
    options, inner = group["inner_options"] or {}, group["inner"]
    for name in options:
        if name not in _OPTIONS[inner]:
            allowed = ", ".join(_OPTIONS[inner]) or "nothing"
            raise ValueError(f"inner_options of {inner} may hold {allowed}; got {name!r}")
    if inner == "adamw8bit":
        check_int("min_size", options.get("min_size", 0), 0)
    if inner == "adafactor":
        check_float("clip_threshold", options.get("clip_threshold", 1.0), 0.0, low_open=True)
        check_float("decay_rate", options.get("decay_rate", -0.8), high=0.0)
        if options.get("beta1") is not None:
            check_float("beta1", options["beta1"], 0.0, 1.0, high_open=True)
        if options.get("warmup_init") and not options.get("relative_step"):
            raise ValueError("warmup_init=True needs relative_step=True")


def _rule(group: dict[str, Any]) -> InnerRule:
    options, eps = group["inner_options"] or {}, group["eps"]
    if group["inner"] == "adafactor":
        return AdafactorRule(**options)
    rule = {"adamw": AdamWRule, "adamw16bit": AdamW16bitRule, "adamw8bit": AdamW8bitRule}[group["inner"]]
    given = {} if eps is None else {"eps": eps}
    return rule(betas=tuple(group["betas"]), correct_bias=group["correct_bias"], **given, **options)
