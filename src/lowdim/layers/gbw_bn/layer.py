"""GBWBN's layer: centre, scale and bias of a batch of SPD matrices, in the geometry of Bures and Wasserstein."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg import (
    bw_distance2,
    bw_exp,
    bw_geodesic,
    bw_log,
    bw_transport,
    has_numbers,
    many_processes,
    mean_over_processes,
    spd_exp,
    spd_log,
    spd_power,
    symmetric_abs,
    without_autocast,
)

__all__ = ["GBWBatchNorm"]


class GBWBatchNorm(nn.Module):
    """Batch normalisation of symmetric positive definite (SPD) matrices that withstands ill-conditioned ones.

    With the parameters `bias = G`, `metric = M`, `scale = s`, the `mean` and `var` of the batch (in evaluation the running
    ones), and log, exp and transport of the Bures-Wasserstein metric (`lowdim.linalg.bw_log`, `bw_exp`, `bw_transport`):

        Y = M^-½ X^θ M^-½,  H = M^-½ G^θ M^-½
        Z = exp_I( transport(mean → I)[ log_mean(Y) ] )        centre
        Z ← exp_I( s / √(var + eps) · log_I(Z) )               scale
        Z ← exp_H( transport(I → H)[ log_I(Z) ] )              bias
        output = (M^½ Z M^½)^(1/θ)

    `mean` is the arithmetic mean after `n_iter` steps towards the Bures-Wasserstein mean, `var` the mean squared distance over
    `θ²`. Neither carries a gradient. Leading dimensions (batch, channels) share them. The running mean moves along the
    geodesic. In several processes the statistics are those of the whole batch. Everything is computed in float64 and returned
    in the input's dtype.

    `G` and `M` must stay positive definite: train them with `SPDSGD`, or set `unconstrained=True` and train all parameters with
    one optimizer.

    Args:
        num_features: `n`, the size of the matrices, >= 1.
        theta: power of the matrices, not 0. Below 1 it weakens the spread of eigenvalues; 0.25 to 0.5 is a good start.
        momentum: share of the batch in the running statistics, in [0, 1].
        eps: added to the variance, > 0.
        n_iter: steps of the mean, >= 1.
        variance_about: `"identity"` measures the distance to the identity, as in the authors' code; `"mean"` to the mean, as in
            the paper.
        unconstrained: `bias` and `metric` are exponentials of symmetric matrices that any optimizer may train. The state dict
            then has torch's names, `parametrizations.bias.original`.

    Shapes: input and output `(..., n, n)`; `bias (n, n)`, `metric (n, n)`, `scale (1,)`; buffers `running_mean (n, n)`,
    `running_var ()`.

    Raises:
        ValueError: options outside their ranges; an input of another shape, not symmetric, not positive definite or not finite;
            an empty batch in training.

    Example:
        >>> import torch
        >>> from lowdim.layers import GBWBatchNorm
        >>> norm = GBWBatchNorm(2, theta=0.5)
        >>> x = torch.tensor([[[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 1e-6]]])
        >>> y = norm(x)
        >>> tuple(y.shape), bool((torch.linalg.eigvalsh(y) > 0).all())
        ((2, 2, 2), True)

    Where matrices are well conditioned or training is short, compare with no normalisation at all, which costs much less.

    Source: Wang et al., "Learning to Normalize on the SPD Manifold under Bures-Wasserstein Geometry", arXiv 2504.00660.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        theta: float = 1.0,
        momentum: float = 0.1,
        eps: float = 1e-5,
        n_iter: int = 1,
        variance_about: str = "identity",
        unconstrained: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = torch.float64,
    ):
        super().__init__()
        check_int("num_features", num_features, 1)
        check_int("n_iter", n_iter, 1)
        check_float("theta", theta)
        check_float("momentum", momentum, 0.0, 1.0)
        check_float("eps", eps, 0.0, low_open=True)
        check_choice("variance_about", variance_about, ("identity", "mean"))
        if theta == 0:
            raise ValueError("theta must not be 0, since every matrix to the power of 0 is the identity; got 0")
        self.num_features, self.theta, self.momentum, self.eps = num_features, theta, momentum, eps
        self.n_iter, self.variance_about, self.unconstrained = n_iter, variance_about, unconstrained
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        eye = torch.eye(num_features, **how)
        self.bias = nn.Parameter(eye + torch.diag(1e-7 * torch.arange(1, num_features + 1, **how)))
        self.metric = nn.Parameter(eye.clone())
        self.scale = nn.Parameter(torch.ones(1, **how))
        self.register_buffer("running_mean", eye.clone())
        self.register_buffer("running_var", torch.ones((), **how))
        if unconstrained:
            for name in ("bias", "metric"):
                parametrize.register_parametrization(self, name, _Exponential())

    def forward(self, X: Tensor) -> Tensor:  # (..., n, n)
        """The normalised matrices, of the input's shape and dtype."""
        self._check(X)
        with without_autocast(X.device.type):
            return self._normalise(_exact(X).reshape(-1, *X.shape[-2:])).to(X.dtype).view_as(X)

    def _normalise(self, X: Tensor) -> Tensor:  # (batch, n, n)
        bias, metric, scale = _exact(self.bias), _exact(self.metric), _exact(self.scale)
        root, inverse = spd_power(metric, 0.5), spd_power(metric, -0.5)
        Y = _around(inverse, spd_power(X, self.theta))
        H = _around(inverse, spd_power(bias, self.theta))
        mean, var = self._statistics(Y.detach()) if self.training else (_exact(self.running_mean), _exact(self.running_var))
        eye = torch.eye(self.num_features, dtype=X.dtype, device=X.device)
        # Between the steps `log_I(exp_I(S)) = 2 (|I + S / 2| − I)`: the square of an ill-conditioned matrix is never built.
        Z = symmetric_abs(eye + bw_transport(mean, bw_log(mean, Y), inverse=True) / 2)
        Z = symmetric_abs(eye + scale / (var + self.eps).sqrt() * (Z - eye))
        Z = bw_exp(H, bw_transport(H, 2 * (Z - eye)))
        return _symmetric(spd_power(_around(root, Z), 1 / self.theta))

    @torch.no_grad()
    def _statistics(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the batch; moves the running ones."""
        if not len(Y):
            raise ValueError("GBWBatchNorm needs at least one matrix in training; got an empty batch")
        mean = _average(Y)
        for _ in range(self.n_iter):
            root, inverse = spd_power(mean, 0.5), spd_power(mean, -0.5)
            middle = _average(spd_power(_around(root, Y), 0.5))
            mean = _around(inverse, middle @ middle)
        center = mean if self.variance_about == "mean" else torch.eye(self.num_features, dtype=Y.dtype, device=Y.device)
        var = _average(bw_distance2(Y, center)) / self.theta**2
        self.running_mean.copy_(bw_geodesic(_exact(self.running_mean), mean, self.momentum))
        self.running_var.copy_((1 - self.momentum) * _exact(self.running_var) + self.momentum * var)
        return mean, var

    def _check(self, X: Tensor) -> None:
        n = self.num_features
        if X.ndim < 2 or X.shape[-2:] != (n, n):
            raise ValueError(f"the input of GBWBatchNorm must have shape (..., {n}, {n}); got {tuple(X.shape)}")
        if not X.is_floating_point():
            raise ValueError(f"the input of GBWBatchNorm must be real floating-point numbers; got {X.dtype}")
        if not has_numbers(X):
            return
        exact = _exact(X.detach())
        if not bool(exact.isfinite().all()):
            raise ValueError("the input of GBWBatchNorm has NaN or infinite entries")
        size = exact.abs().amax((-2, -1))
        gap = (exact - exact.mT).abs().amax((-2, -1))
        if bool((gap > max(1e-8, 16 * torch.finfo(X.dtype).eps) * size).any()):
            raise ValueError(f"the input of GBWBatchNorm must be symmetric; entries differ by up to {float(gap.max()):.3g}")
        if bool((torch.linalg.cholesky_ex(exact)[1] != 0).any()):  # cheap; a matrix that fails may only be ill-conditioned
            least = float(torch.linalg.eigvalsh(exact)[..., 0].min())
            if least <= 0:
                raise ValueError(
                    f"the input of GBWBatchNorm must be positive definite; its smallest eigenvalue is {least:.3g}. Add "
                    "1e-5 times the identity, or raise small eigenvalues before it (ReEig)"
                )

    def extra_repr(self) -> str:
        """Size and options, for `print`."""
        return (
            f"{self.num_features}, theta={self.theta}, momentum={self.momentum}, eps={self.eps}, n_iter={self.n_iter}, "
            f"variance_about={self.variance_about!r}, unconstrained={self.unconstrained}"
        )


class _Exponential(nn.Module):
    """A positive definite matrix as the exponential of the symmetric part of a free one."""

    def forward(self, free: Tensor) -> Tensor:
        return spd_exp(free).to(free.dtype)

    def right_inverse(self, matrix: Tensor) -> Tensor:
        return spd_log(matrix).to(matrix.dtype)


def _exact(tensor: Tensor) -> Tensor:
    """In float64, or float32 where the device has no float64; differentiable."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.mT) / 2


def _around(A: Tensor, X: Tensor) -> Tensor:  # (n, n), (..., n, n)
    """`A X A`, symmetric to the bit. Expanded, so that the same kernel runs with and without gradients."""
    A = A.expand(X.shape)
    return _symmetric(A @ X @ A)


def _average(values: Tensor) -> Tensor:  # (batch, ...)
    """The mean over the rows of all processes, which need not hold equally many."""
    total, count = values.sum(0), torch.full((), float(len(values)), dtype=values.dtype, device=values.device)
    if many_processes():
        total, count = mean_over_processes(total), mean_over_processes(count)
    return total / count
