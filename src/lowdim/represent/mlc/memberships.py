"""Soft clusters as doubly stochastic matrices, by Sinkhorn's iteration in the log domain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import as_given, as_tensor, compute_dtype
from lowdim.linalg.eager import is_eager

__all__ = ["KERNELS", "membership", "sinkhorn_projection"]

KERNELS = ("abs", "inner")
_BALANCE = 10_000  # steps of `balanced` at most
#: Largest difference of scores whose exponentials keep their digits.
_SPREAD = {torch.float32: 30.0, torch.float64: 200.0}


def sinkhorn_projection(
    S: Any,  # (n, n)
    eta: float = 0.175,
    *,
    iterations: int = 5,
    tol: float | None = None,
) -> Any:
    """The doubly stochastic matrix nearest to an affinity, with entropy.

    Formula: `Γ = argmax ⟨S, Γ⟩ - η Σ Γ log Γ` over doubly stochastic Γ, which is `diag(e^u) exp(S/η) diag(e^v)`. From
    `u = v = 0` one iteration updates one of them: `u = -logsumexp_j(S_ij/η + v_j)` and `v = -logsumexp_i(S_ij/η + u_i)` in
    turn. After an odd number rows sum to 1 exactly, columns nearly.

    Args:
        S: affinities, numpy or torch; gradients flow through all iterations.
        eta: η > 0, the weight of the entropy.
        iterations: single updates, u first, at most.
        tol: stops after a u, from the second on, that moved by no more than this; None makes all iterations.

    Returns:
        Γ `(n, n)` in float32 or better, in the kind of S.

    Raises:
        ValueError: S not square, η <= 0, fewer than 1 iteration.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import sinkhorn_projection
        >>> gamma = sinkhorn_projection(np.array([[1.0, 0.0], [0.2, 1.0]]), eta=1.0, iterations=1000, tol=1e-12)
        >>> gamma.sum(axis=0).round(9), gamma.sum(axis=1).round(9)
        (array([1., 1.]), array([1., 1.]))

    Source: Ding et al., arXiv 2301.01805; Cuturi, "Sinkhorn Distances", NeurIPS 2013.
    """
    check_float("eta", eta, 0.0, low_open=True)
    check_int("iterations", iterations, 1)
    if tol is not None:
        check_float("tol", tol, 0.0)
    affinities = S if isinstance(S, Tensor) else as_tensor(S)
    if affinities.ndim != 2 or affinities.shape[0] != affinities.shape[1] or not len(affinities):
        raise ValueError(f"S must be a square matrix; got shape {tuple(affinities.shape)}")
    with torch.autocast(affinities.device.type, enabled=False):
        scores = affinities.to(compute_dtype(affinities.dtype)) / eta
        if _narrow(scores):
            recorded = scores.requires_grad and torch.is_grad_enabled()
            gamma: Any = _Products.apply(scores, iterations, tol) if recorded else _by_products(scores, iterations, tol)[0]
        else:
            gamma = _by_logarithms(scores, iterations, tol)
    return gamma if isinstance(S, Tensor) else as_given(gamma, S)


def membership(
    C: Any,  # (n, d)
    eta: float = 0.175,
    *,
    kernel: str = "abs",
    iterations: int = 5,
    tol: float | None = None,
) -> Any:
    """Memberships of samples in each other's clusters, from cluster features.

    Formula: `sinkhorn_projection(S)` with `S = |C Cᵀ|` (`kernel="abs"`, so that opposite directions are one subspace) or `C Cᵀ`
    (`"inner"`).

    Args:
        C: cluster features, rows of length 1; numpy or torch.
        eta, iterations, tol: as in `sinkhorn_projection`.

    Returns:
        Γ `(n, n)` in float32 or better, in the kind of C.

    Raises:
        ValueError: C not 2-D, an unknown kernel, options out of range.

    Example:
        >>> import numpy as np
        >>> from lowdim.represent import membership
        >>> membership(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), iterations=1).round(2)
        array([[0.5 , 0.5 , 0.  ],
               [0.5 , 0.5 , 0.  ],
               [0.  , 0.  , 0.99]])

    Source: Ding et al., arXiv 2301.01805; `"abs"` as in the same group's successor, CPP.
    """
    check_choice("kernel", kernel, KERNELS)
    features = C if isinstance(C, Tensor) else as_tensor(C)
    if features.ndim != 2:
        raise ValueError(f"C must be (n, d); got shape {tuple(features.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(compute_dtype(features.dtype))
        S = features @ features.T
    gamma = sinkhorn_projection(S.abs() if kernel == "abs" else S, eta, iterations=iterations, tol=tol)
    return gamma if isinstance(C, Tensor) else as_given(gamma, C)


def balanced(
    C: Tensor,  # (n, d)
    eta: float,
    *,
    kernel: str = "abs",
    tol: float = 1e-10,
) -> tuple[Tensor, Tensor]:
    """The kernel K of all samples, and the scale s that makes `diag(s) K diag(s)` doubly stochastic: `membership` at its end.

    K is symmetric, and so both scales of Sinkhorn are the same in the end. With `r = s ⊙ K s`, the step `s ← s r^(-2/3)`
    leaves at most a third of an error in each direction (two steps of Sinkhorn leave the square of Γ's second eigenvalue,
    near 1 between clusters). It is an average with a map that widens no difference of `log s`, and so it converges from
    anywhere.

    Args:
        tol: of the row sums.

    Source: Knight, Ruiz, Uçar, "A symmetry preserving algorithm for matrix scaling", SIAM J. Matrix Anal. 2014, with their
    power 1/2; Edelstein, O'Brien, J. London Math. Soc. 1978, for the average.
    """
    scores = C @ C.T
    scores = (scores.abs_() if kernel == "abs" else scores).div_(eta)
    if not _narrow(scores):
        return _by_logarithms(scores, _BALANCE, tol), torch.ones_like(scores[0])
    K = scores.sub_(scores.max()).exp_()
    scale = K.sum(1).rsqrt()
    for _ in range(_BALANCE):
        rows = scale * (K @ scale)
        if float((rows - 1).abs().max()) <= tol:
            break
        scale = scale * rows.pow(-2 / 3)
    return K, scale


def _narrow(scores: Tensor) -> bool:
    """Whether exponentials of all differences keep their digits, where numbers can be looked at."""
    return is_eager() and float(scores.detach().max() - scores.detach().min()) <= _SPREAD[scores.dtype]


def _by_logarithms(scores: Tensor, iterations: int, tol: float | None) -> Tensor:
    u = v = scores.new_zeros(len(scores))
    for i in range(iterations):
        if i % 2:
            v = -(scores + u[:, None]).logsumexp(0)
            continue
        last, u = u, -(scores + v).logsumexp(1)
        if i and tol is not None and float((u - last).detach().abs().max()) <= tol:
            break
    return (scores + u[:, None] + v).exp()


def _by_products(scores: Tensor, iterations: int, tol: float | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same updates of `e^u` and `e^v`, by products with the kernel: Γ, the kernel, and both in turn from `e^v = 1` on."""
    scores = scores.detach()
    kernel = (scores - scores.max()).exp_()
    steps = [torch.ones_like(kernel[0])]
    for i in range(iterations):
        steps.append(1 / (steps[-1] @ kernel if i % 2 else kernel @ steps[-1]))
        if i > 1 and not i % 2 and tol is not None and float((steps[-1].log() - steps[-3].log()).abs().max()) <= tol:
            break
    v, u = steps[-2:] if len(steps) % 2 == 0 else steps[:-3:-1]
    return (kernel * u[:, None]).mul_(v), kernel, steps


class _Products(torch.autograd.Function):
    """Γ by products, with its gradient: back through each `e^u = 1 / (K e^v)` by one product with the kernel."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, iterations: int, tol: float | None) -> Tensor:
        gamma, kernel, steps = _by_products(scores, iterations, tol)
        ctx.save_for_backward(scores, gamma, kernel, *steps)
        return gamma

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scores, gamma, kernel, *steps = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled():  # a gradient that is to be differentiated
            again = _by_logarithms(scores, len(steps) - 1, None)
            return torch.autograd.grad(again, scores, grad, create_graph=True)[0], None, None
        direct = gamma * grad
        sums = direct.sum(1), direct.sum(0)  # by u and v
        rows, columns = [], []
        ahead = sums[len(steps) % 2] / steps[-1]  # by the last step; its partner gets what is left of the sums
        partner = sums[1 - len(steps) % 2] / steps[-2]
        for i in range(len(steps) - 1, 0, -1):
            inner = -ahead * steps[i] ** 2
            pair = (inner, steps[i - 1]) if i % 2 else (steps[i - 1], inner)
            rows.append(pair[0])
            columns.append(pair[1])
            ahead, partner = partner + (inner @ kernel if i % 2 else kernel @ inner), 0.0
        return torch.addcmul(direct, kernel, torch.stack(rows, 1) @ torch.stack(columns)), None, None
