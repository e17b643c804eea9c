"""Learning rate and momentum of SGD from the curvature of one batch, while training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowdim.diagnose.core.curvature import gradient_and_hessian
from lowdim.diagnose.core.quadrature import lanczos_quadrature
from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import stream

__all__ = ["RULES", "heavy_ball", "tune_sgd"]

RULES = ("heavy_ball", "gradient")


def heavy_ball(
    nodes: Any,  # (m,)
    *,
    floor: float = 1e-3,
) -> tuple[float, float]:
    """Polyak's learning rate and momentum for a spectrum.

    Formula: `lr = 4/(√top + √low)²`, `momentum = ((√top − √low)/(√top + √low))²`, with `top` the largest node and `low` the
    smallest one above `floor · top`. Negative nodes never count.

    Args:
        nodes: eigenvalues, or the nodes of `lanczos_quadrature`.
        floor: share of the largest below which nodes are noise, in [0, 1).

    Raises:
        ValueError: no positive node, nodes that are not finite, a floor out of range.

    Example:
        >>> from lowdim.diagnose import heavy_ball
        >>> heavy_ball([-0.5, 1.0, 4.0])
        (0.4444444444444444, 0.1111111111111111)

    Source: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964; set from Lanczos nodes while
    training: Granziol, Zohren, Roberts, arXiv 2006.09092. Floor and choice of `low` are ours.
    """
    check_float("floor", floor, 0.0, 1.0, high_open=True)
    values = torch.as_tensor(nodes).detach().double().reshape(-1)
    if not len(values) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"nodes must be finite numbers; got {values.tolist()[:5]}")
    top = float(values.max())
    if top <= 0.0:
        raise ValueError(f"no positive node: the largest is {top:g}, so the curvature gives no learning rate")
    low = float(values[values > floor * top].min())
    sums, difference = top**0.5 + low**0.5, top**0.5 - low**0.5
    return 4.0 / sums**2, (difference / sums) ** 2


def tune_sgd(
    optimizer: Any,
    loss_closure: Callable[[], Tensor],
    *,
    rule: str = "heavy_ball",
    steps: int = 10,
    floor: float = 1e-3,
    seed: int = 0,
    scheduler: Any = None,
) -> tuple[float, float]:
    """Set learning rate and momentum of SGD from the curvature of a batch; call it once an epoch.

    Formula: `rule="heavy_ball"`: `heavy_ball` of the nodes of the batch's Hessian, `steps` products. `rule="gradient"`:
    `lr = gᵀg / gᵀHg` with the batch's gradient `g`, one product; momentum stays.

    Args:
        optimizer: one whose groups have a `momentum` (torch's SGD), or accelerate's wrapper of one.
        loss_closure: gives the batch's loss without calling backward; called once, without moving the global random stream.
        rule: "heavy_ball" or "gradient".
        steps: Lanczos steps, >= 1.
        floor: as in `heavy_ball`, in [0, 1).
        seed: of Lanczos' start.
        scheduler: the optimizer's scheduler, if it has one, since it writes the rate at each step from its `base_lrs`: they get
            the new rate too. `LambdaLR` only, which all schedules of transformers are.

    Returns:
        `(lr, momentum)`, set in every group. Parameters, their `.grad` and the optimizer's buffers are untouched.

    Raises:
        TypeError: an optimizer without a momentum, a scheduler of another kind.
        ValueError: an option out of range, no positive curvature, a loss that cannot be differentiated twice.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import tune_sgd
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
        >>> sgd = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        >>> lr, momentum = tune_sgd(sgd, lambda: (torch.tensor([2.0, 0.5]) * w**2).sum())  # curvatures 4 and 1
        >>> round(lr, 4), round(momentum, 4), sgd.param_groups[0]["lr"] == lr
        (0.4444, 0.1111, True)

    The rate is right for the batch that it was measured on: measure on batches of the size that is trained with. For Adam
    use `max_lr`.

    Source: Granziol, Zohren, Roberts, arXiv 2006.09092; `rule="gradient"`: the first author's program MLRG_DeepCurvature.
    """
    check_choice("rule", rule, RULES)
    check_int("steps", steps, 1)
    check_float("floor", floor, 0.0, 1.0, high_open=True)
    plain, schedule = getattr(optimizer, "optimizer", optimizer), _plain_schedule(scheduler)
    groups = plain.param_groups
    if any("momentum" not in group for group in groups):
        raise TypeError(f"tune_sgd needs an optimizer with a momentum, such as torch.optim.SGD; got {type(plain).__name__}")
    params = [p for group in groups for p in group["params"] if p.requires_grad]
    kept = [p.grad for p in params]
    devices = sorted({p.device.index for p in params if p.device.type == "cuda" and p.device.index is not None})
    try:
        with torch.random.fork_rng(devices=devices):
            gradient, hessian = gradient_and_hessian(loss_closure, params)
    finally:
        for p, grad in zip(params, kept):
            p.grad = grad
    momentum = float(groups[0]["momentum"])
    if rule == "gradient":
        curvature, square = float(gradient @ hessian(gradient)), float(gradient @ gradient)
        if not curvature > 0.0:
            raise ValueError(
                f'rule="gradient" needs positive curvature along the gradient; got g\'Hg = {curvature:g} (|g|² = {square:g}). '
                'rule="heavy_ball" uses the positive part of the spectrum'
            )
        lr = square / curvature
    else:
        start = torch.randn(hessian.n, generator=stream(seed, "tune_sgd"), dtype=torch.float32)
        nodes = lanczos_quadrature(hessian, start.to(gradient), steps=steps).nodes
        lr, momentum = heavy_ball(nodes, floor=floor)
    for group in groups:
        group["momentum"] = momentum if rule == "heavy_ball" else group["momentum"]
        _set_rate(group, lr)
    if schedule is not None:
        schedule.base_lrs = [lr] * len(groups)
        schedule._last_lr = [lr] * len(groups)
    return lr, momentum


def _set_rate(group: dict[str, Any], lr: float) -> None:
    if "initial_lr" in group:
        group["initial_lr"] = lr
    if isinstance(group["lr"], Tensor):  # in place: captured graphs read it
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _plain_schedule(scheduler: Any) -> Any:
    if scheduler is None:
        return None
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if not isinstance(inner, torch.optim.lr_scheduler.LambdaLR):
        raise TypeError(
            f"scheduler must be a LambdaLR, whose base_lrs can be replaced; got {type(inner).__name__}, which would overwrite "
            "the rate. Leave it out, and call tune_sgd after each of its steps"
        )
    return inner
