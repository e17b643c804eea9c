"""The largest stable rate of Adam's steps, from the curvature that its preconditioner sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowdim.diagnose.core.curvature import gradient_and_hessian
from lowdim.diagnose.core.quadrature import lanczos_quadrature
from lowdim.errors import check_float, check_int
from lowdim.linalg import Operator, stream

__all__ = ["AdamGroup", "AdamLimit", "adam_limit"]


@dataclass(frozen=True)
class AdamGroup:
    """Parameters that an optimizer of Adam's kind trains in one way.

    Attributes:
        params: the parameters.
        scale: their rate as a multiple of the rate that is asked for, > 0.
        beta1, eps: as in Adam.
    """

    params: Sequence[Tensor]
    scale: float = 1.0
    beta1: float = 0.9
    eps: float = 1e-8


@dataclass(frozen=True)
class AdamLimit:
    """The stable limit of Adam's rate.

    Attributes:
        lr: the limit.
        eigenvalue: the largest of the preconditioned Hessian.
        error: an eigenvalue lies within this of it (Lanczos' bound).
        idle: how many parameters have no gradient, take no step, and are left out.
    """

    lr: float
    eigenvalue: float
    error: float
    idle: int


def adam_limit(
    losses: Sequence[Callable[[], Tensor]],
    groups: Sequence[AdamGroup],
    *,
    steps: int = 16,
    seed: int = 0,
) -> AdamLimit:
    """The rate above which Adam's steps grow along the sharpest direction, with its preconditioner held fixed.

    Formula: `lr = (2 + 2 β₁) / ((1 − β₁) λ)` with `λ` the largest eigenvalue of `D^-½ H D^-½`, `H` the Hessian of the first
    loss, `D = (√v + eps) / scale`, `v` the mean of the squared gradients of all losses.

    A parameter without a gradient in any of the losses takes no step, and its row and column are left out: with `D = eps` its
    smallest curvature would be huge.

    Args:
        losses: closures that give the loss of a batch each, without calling backward. The first is differentiated twice; its
            own gradient is part of `v`, so that no parameter has curvature on it and only another batch's gradient.
        groups: what is trained.
        steps: Lanczos steps, >= 1; as many vectors as large as the parameters are kept.
        seed: of Lanczos' start.

    Raises:
        ValueError: no losses, groups of different `beta1`, no gradient, no positive curvature, or a loss that cannot be
            differentiated twice (the message says why).

    Example:
        >>> import torch
        >>> from lowdim.diagnose.core.preconditioned import AdamGroup, adam_limit
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 1.0]))  # gradients 8 and 1, curvatures 4 and 1
        >>> found = adam_limit([lambda: (torch.tensor([2.0, 0.5]) * w**2).sum()], [AdamGroup([w])])
        >>> round(found.eigenvalue, 4), round(found.lr, 4)
        (1.0, 38.0)

    Source: Cohen and others, "Adaptive gradient methods at the edge of stability", arXiv 2207.14484, 2022. `v` from a few
    batches in place of Adam's own average is ours.
    """
    check_int("steps", steps, 1)
    params = [p for group in groups for p in group.params]
    if not losses or not params:
        raise ValueError(f"losses and groups must not be empty; got {len(losses)} losses and {len(params)} parameters")
    betas = sorted({group.beta1 for group in groups})
    if len(betas) > 1:
        raise ValueError(f"groups must have one beta1: the limit is a formula of one; got {betas}")
    beta1 = betas[0]
    check_float("beta1", beta1, 0.0, 1.0, high_open=True)
    gradient, hessian = gradient_and_hessian(losses[0], params)
    square = gradient.square()
    for loss in losses[1:]:
        square += _gradient(loss, params, gradient).square()
    root = (square / len(losses)).sqrt()
    idle = root == 0
    if bool(idle.all()):
        raise ValueError("no trained parameter has a gradient, so Adam's step is not defined")
    scale, eps = (_spread(groups, name, gradient) for name in ("scale", "eps"))
    half = torch.where(idle, 0.0, (scale / (root + eps)).sqrt())

    operator = Operator(lambda v: half * hessian(half * v), hessian.n, dtype=hessian.dtype, device=hessian.device)
    start = torch.randn(hessian.n, generator=stream(seed, "adam_limit")).to(gradient).masked_fill(idle, 0.0)
    found = lanczos_quadrature(operator, start, steps=steps)
    largest, error = float(found.nodes[-1]), float(found.bounds[-1])
    if not largest > 0.0:
        raise ValueError(f"no positive curvature: the largest eigenvalue is {largest:.3g}, so nothing limits the rate")
    lr = (2.0 + 2.0 * beta1) / ((1.0 - beta1) * largest)
    if not math.isfinite(lr):
        raise ValueError(f"the curvature is too small to limit the rate: the largest eigenvalue is {largest:.3g}")
    return AdamLimit(lr, largest, error, int(idle.sum()))


def _gradient(loss: Callable[[], Tensor], params: Sequence[Tensor], like: Tensor) -> Tensor:
    """The flat gradient of a loss."""
    with torch.enable_grad():
        found = torch.autograd.grad(loss(), params, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(found, params)]).to(like)
    if not bool(torch.isfinite(flat).all()):
        raise ValueError("the gradient of a loss has NaN or infinite entries")
    return flat


def _spread(groups: Sequence[AdamGroup], name: str, like: Tensor) -> Tensor:
    """An attribute of the groups for each parameter."""
    return torch.cat([like.new_full((p.numel(),), float(getattr(group, name))) for group in groups for p in group.params])
