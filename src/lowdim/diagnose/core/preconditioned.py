"""The largest stable rate of Adam's steps, from the curvature that its preconditioner sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowdim.diagnose.core.curvature import gradient_and_hessian, hessian_matvec
from lowdim.diagnose.core.quadrature import lanczos_quadrature
from lowdim.errors import check_float, check_int
from lowdim.linalg import Operator, stream

__all__ = ["AdamGroup", "AdamLimit", "Subspace", "adam_limit"]


@dataclass(frozen=True)
class Subspace:
    """Where a projected optimizer (GaLore and its kind) moves a parameter.

    Attributes:
        down: `Pᵀ`: a gradient of the parameter's shape to the small one that Adam sees.
        up: `P`: a small direction to a step of the parameter's shape. `P` has orthonormal columns.
    """

    down: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AdamGroup:
    """Parameters that an optimizer of Adam's kind trains in one way.

    Attributes:
        params: the parameters.
        scale: their rate as a multiple of the rate that is asked for, > 0.
        beta1, eps: as in Adam.
        subspace: where the parameters move, each of them in its own subspace of this kind; None: everywhere.
    """

    params: Sequence[Tensor]
    scale: float = 1.0
    beta1: float = 0.9
    eps: float = 1e-8
    subspace: Subspace | None = None

    def down(self, piece: Tensor) -> Tensor:
        """`Pᵀ v` of one parameter."""
        return self.subspace.down(piece) if self.subspace is not None else piece

    def up(self, piece: Tensor) -> Tensor:
        """`P v` of one parameter."""
        return self.subspace.up(piece) if self.subspace is not None else piece


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
    smooth: Callable[[], Tensor] | None = None,
    steps: int = 16,
    seed: int = 0,
) -> AdamLimit:
    """The rate above which Adam's steps grow along the sharpest direction, with its preconditioner held fixed.

    Formula: `lr = (2 + 2 β₁) / ((1 − β₁) λ)` with `λ` the largest eigenvalue of `D^-½ H D^-½`, `H` the Hessian of the first
    loss, `D = (√v + eps) / scale`, `v` the mean of the squared gradients of all losses. In a subspace with basis `P` the
    gradients are `Pᵀ g` and the Hessian is `Pᵀ H P`: what is outside is not moved, and its curvature limits nothing.

    A parameter without a gradient in any of the losses takes no step, and its row and column are left out: with `D = eps` its
    smallest curvature would be huge.

    Args:
        losses: closures that give the loss of a batch each, without calling backward. The first is differentiated twice; its
            own gradient is part of `v`, so that no parameter has curvature on it and only another batch's gradient.
        groups: what is trained.
        smooth: the first loss without terms that have a kink; None: all of it. Near its kink a norm has any curvature, but its
            gradient is bounded, so steps at any rate stay within their own size of it and do not grow.
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
    whole, hessian = gradient_and_hessian(losses[0], params)
    if smooth is not None:
        hessian = hessian_matvec(smooth, params)
    low = _Low(groups, whole)
    gradient = low.down(whole)
    square = gradient.square()
    for loss in losses[1:]:
        square += low.down(_gradient(loss, params, whole)).square()
    root = (square / len(losses)).sqrt()
    idle = root == 0
    if bool(idle.all()):
        raise ValueError("no trained parameter has a gradient, so Adam's step is not defined")
    scale, eps = low.spread("scale"), low.spread("eps")
    half = torch.where(idle, 0.0, (scale / (root + eps)).sqrt())

    def product(v: Tensor) -> Tensor:
        return half * low.down(hessian(low.up(half * v)))

    operator = Operator(product, len(gradient), dtype=hessian.dtype, device=hessian.device)
    start = torch.randn(len(gradient), generator=stream(seed, "adam_limit")).to(gradient).masked_fill(idle, 0.0)
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


class _Low:
    """Between flat vectors over whole parameters and flat vectors of what moves in their subspaces."""

    def __init__(self, groups: Sequence[AdamGroup], like: Tensor):
        self._like = like
        self._parts: list[tuple[AdamGroup, torch.Size, torch.Size]] = []
        whole = [(group, p.shape) for group in groups for p in group.params]
        for own, shape, piece in self._pieces(whole, like):
            self._parts.append((own, shape, own.down(piece).shape))

    def down(self, vector: Tensor) -> Tensor:
        """`Pᵀ v`."""
        parts = self._pieces([(group, shape) for group, shape, _ in self._parts], vector)
        return _flat((group.down(p) for group, _, p in parts), vector)

    def up(self, vector: Tensor) -> Tensor:
        """`P v`."""
        parts = self._pieces([(group, low) for group, _, low in self._parts], vector)
        return _flat((group.up(p) for group, _, p in parts), vector)

    def spread(self, name: str) -> Tensor:
        """An attribute of the groups for each number that moves."""
        return torch.cat([self._like.new_full((low.numel(),), float(getattr(g, name))) for g, _, low in self._parts])

    @staticmethod
    def _pieces(shapes: Sequence[tuple[AdamGroup, Any]], vector: Tensor) -> Iterator[tuple[AdamGroup, torch.Size, Tensor]]:
        pieces = vector.split([shape.numel() for _, shape in shapes])
        return ((group, shape, piece.view(shape)) for (group, shape), piece in zip(shapes, pieces))


def _flat(pieces: Iterator[Tensor], like: Tensor) -> Tensor:
    return torch.cat([piece.reshape(-1).to(like.dtype) for piece in pieces])
