"""Exact gradient flow of linear regression on given data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowdim.diagnose.generalization_dynamics.theory import as_float64, read_times
from lowdim.errors import check_float

__all__ = ["LinearFlow", "Modes"]


class Modes:
    """The thin SVD `X = U S Vᵀ` of data, without the singular values up to `rtol` of the largest.

    Raises:
        ValueError: not a matrix of finite numbers with at least two rows.
    """

    def __init__(self, X: Any, rtol: float = 1e-10):
        check_float("rtol", rtol, 0.0, 1.0, high_open=True)
        self.X = as_float64(X)
        if self.X.ndim != 2:
            raise ValueError(f"X must be 2-D, (samples, weights); got shape {tuple(self.X.shape)}")
        if len(self.X) < 2 or not self.X.shape[1]:
            raise ValueError(f"X must have at least two samples and one weight; got shape {tuple(self.X.shape)}")
        if not bool(torch.isfinite(self.X).all()):
            raise ValueError("X has NaN or infinite entries")
        U, S, Vh = torch.linalg.svd(self.X, full_matrices=False)
        self.rank = int((rtol * S[0] < S).sum()) if float(S[0]) > 0 else 0
        self.U, self.S, self.Vh = U[:, : self.rank], S[: self.rank], Vh[: self.rank]


class LinearFlow:
    """Gradient flow `dw/dt = Xᵀ(y − X w)` from `w0`, in closed form.

    Formula: `w(t) = w0 + V [(1 − e^(−S² t)) (S⁻¹ Uᵀy − Vᵀw0)]` with the thin SVD `X = U S Vᵀ`. Directions without data are
    frozen: gradient descent never changes them. Gradient descent with rate `eta` has `t = eta · steps`.

    Args:
        X: `(P, N)` samples, torch or numpy; for a network the features of its last hidden layer.
        y: `(P,)` targets.
        w0: `(N,)` initial weights; None: zeros.
        rtol: singular values up to this share of the largest count as zero, in [0, 1). It decides what is frozen.

    Attributes:
        eigenvalues: those of `XᵀX` that are not zero, `(rank,)` descending, float64.
        frozen_dim: `N − rank`.

    Raises:
        ValueError: `X` is not 2-D or has fewer than two samples, lengths that differ, entries that are not finite.

    Example:
        >>> import numpy as np
        >>> from lowdim.diagnose import LinearFlow
        >>> flow = LinearFlow(np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), np.array([1.0, 2.0]), w0=np.ones(3))
        >>> flow.frozen_dim, flow.weights(0.0).tolist(), [round(w, 4) for w in flow.weights(1e6).tolist()]
        (1, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
        >>> [round(each, 4) for each in flow.complexity(10.0)]  # nothing had to be learnt
        [1.9365, 0.0]

    For the weights at the end of time alone, `numpy.linalg.lstsq` gives the same from `w0 = 0`.

    Source: Advani, Saxe, Sompolinsky, arXiv 1710.03667; the exact form of `complexity` is ours.
    """

    def __init__(self, X: Any, y: Any, w0: Any = None, rtol: float = 1e-10, *, modes: Modes | None = None):
        self.modes = Modes(X, rtol) if modes is None else modes
        self.X, N = self.modes.X, self.modes.X.shape[1]
        self.y = self._vector("y", y, len(self.X))
        self.w0 = torch.zeros(N, dtype=torch.float64) if w0 is None else self._vector("w0", w0, N)
        m = self.modes
        self.eigenvalues = m.S.square()
        self.frozen_dim = N - m.rank
        self._way = m.U.T @ self.y / m.S - m.Vh @ self.w0  # (rank,), from the start to the end in each mode

    def weights(self, t: float) -> Tensor:
        """`w(t)`, `(N,)`; `t = inf` is the end."""
        return self.w0 + self.modes.Vh.T @ self._moved(t)

    def train_error(self, t: float) -> float:
        """`mean((X w(t) − y)²)`."""
        return self.test_error(t, self.X, self.y)

    def test_error(self, t: float, X: Any, y: Any) -> float:
        """The same on other rows, `X (n, N)` and `y (n,)`."""
        rows, targets = as_float64(X), as_float64(y)
        if rows.ndim != 2 or rows.shape[1] != len(self.w0) or targets.shape != rows.shape[:1]:
            raise ValueError(
                f"X and y must be (n, {len(self.w0)}) and (n,); got shapes {tuple(rows.shape)} and {tuple(targets.shape)}"
            )
        return float((rows @ self.weights(t) - targets).square().mean())

    def frozen_projector(self) -> Tensor:
        """`I − V Vᵀ`, `(N, N)`: onto the directions that do not move."""
        return torch.eye(len(self.w0), dtype=torch.float64) - self.modes.Vh.T @ self.modes.Vh

    def complexity(self, t: float) -> tuple[float, float]:
        """Bounds on the Rademacher complexity of what the flow can reach by `t`: naive, and aware of the frozen directions.

        Formula: `√(Σ S²) ‖w(t)‖ / P` and `√(Σ S²) ‖w(t) − w0‖ / P`.
        """
        trace, P = float(self.eigenvalues.sum().sqrt()), len(self.X)
        return trace * float(self.weights(t).norm()) / P, trace * float(self._moved(t).norm()) / P

    def _moved(self, t: float) -> Tensor:
        if isinstance(t, (int, float)) and t == math.inf:  # the end: the solution of least norm from w0
            return self._way
        time = read_times(t)
        if len(time) != 1:
            raise ValueError(f"t must be one time; got {len(time)}")
        return -torch.expm1(-self.eigenvalues * time) * self._way

    @staticmethod
    def _vector(name: str, values: Any, length: int) -> Tensor:
        found = as_float64(values)
        if found.shape != (length,):
            raise ValueError(f"{name} must have shape ({length},); got {tuple(found.shape)}")
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"{name} has NaN or infinite entries")
        return found
