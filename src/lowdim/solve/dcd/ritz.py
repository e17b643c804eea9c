"""Ritz vectors of a symmetric matrix, and right-hand sides made of them to train a network on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowdim.errors import check_float, check_int
from lowdim.linalg import canonical_signs, lanczos, stream
from lowdim.solve.core.reading import as_given, read_operator, read_vector

__all__ = ["dataset", "ritz_dataset", "ritz_vectors"]


def ritz_vectors(
    A: Any,  # (n, n)
    num_ritz: int,
    *,
    start: Any = None,  # (n,)
    seed: int = 0,
) -> tuple[Any, Any]:
    """Approximate eigenvalues and eigenvectors of a symmetric matrix, by Lanczos' method with full re-orthogonalisation.

    Formula: `T = Q A Qᵀ` in a basis of `span(v, A v, …)`, `T y_j = t_j y_j`, `w_j = Qᵀ y_j`; `v = A z`, z standard normal.

    Args:
        A: as in solve_dcd.
        num_ritz: steps, at most n; fewer vectors come out where an invariant subspace was found before.
        start: `v`, in place of `A z`.
        seed: of z.

    Returns:
        Values `(k,)` ascending and vectors `(n, k)`, one per column with its largest entry positive, in float64: tensors for a
        tensor A, else numpy arrays.

    Raises:
        ValueError: A not square, num_ritz outside [1, n], a start that is zero or of another length.

    Example:
        >>> import numpy as np
        >>> from lowdim.solve import ritz_vectors
        >>> values, vectors = ritz_vectors(np.diag([3.0, 1.0, 2.0]), 3)
        >>> values.round(6).tolist(), vectors.shape
        ([1.0, 2.0, 3.0], (3, 3))

    Memory: `num_ritz · n` numbers, twice.

    Source: Kaneda et al., ICML 2023, arXiv 2205.10763, section 4.
    """
    values, vectors = _ritz(A, num_ritz, start, seed)
    return as_given(values, A), as_given(vectors, A)


def ritz_dataset(
    A: Any,  # (n, n)
    num_ritz: int,
    num_samples: int,
    *,
    theta: int | None = None,
    low_weight: float = 9.0,
    cutoff: float = 1e-8,
    start: Any = None,  # (n,)
    seed: int = 0,
) -> Any:
    """Unit right-hand sides that stress low modes, which are hard to solve for: `Σ_j c_j w_j`, normalised.

    Formula: `w_j` the Ritz vectors with values >= cutoff; `c_j ~ N(0, 1)`, times `low_weight` for the first
    `num_ritz // 2 + theta` of them.

    Args:
        A, num_ritz, start: as in ritz_vectors.
        num_samples: how many.
        theta: `num_ritz // 20` by default.
        low_weight, cutoff: see above; values below the cutoff belong to the null space.
        seed: of the start and of the coefficients.

    Returns:
        `(num_samples, n)` float64, a tensor for a tensor A, else numpy.

    Raises:
        ValueError: as ritz_vectors; no Ritz value above the cutoff.

    Example:
        >>> import numpy as np
        >>> from lowdim.solve import ritz_dataset
        >>> samples = ritz_dataset(np.diag([3.0, 1.0, 2.0]), 3, 5)
        >>> samples.shape, bool(np.allclose((samples**2).sum(1), 1))
        ((5, 3), True)

    Source: Kaneda et al., ICML 2023, arXiv 2205.10763, section 4.
    """
    how = {"theta": theta, "low_weight": low_weight, "cutoff": cutoff, "start": start, "seed": seed}
    return as_given(dataset(A, num_ritz, num_samples, **how), A)


def dataset(
    A: Any,
    num_ritz: int,
    num_samples: int,
    *,
    theta: int | None = None,
    low_weight: float = 9.0,
    cutoff: float = 1e-8,
    start: Any = None,
    seed: int = 0,
) -> Tensor:
    """`ritz_dataset` as a tensor."""
    check_int("num_samples", num_samples, 1)
    check_float("low_weight", low_weight, 0.0, low_open=True)
    check_float("cutoff", cutoff, 0.0)
    values, vectors = _ritz(A, num_ritz, start, seed)
    theta = num_ritz // 20 if theta is None else theta
    check_int("theta", theta, 0)
    vectors = vectors[:, values >= cutoff]
    if not vectors.shape[1]:
        raise ValueError(f"no Ritz value of A is >= cutoff={cutoff:g}; the largest is {float(values[-1]):.3g}")
    generator = stream(seed, "coefficients")
    weights = torch.randn(num_samples, vectors.shape[1], dtype=torch.float64, generator=generator).to(vectors.device)
    weights[:, : num_ritz // 2 + theta] *= low_weight
    return torch.nn.functional.normalize(weights @ vectors.T, dim=1)


def _ritz(A: Any, num_ritz: int, start: Any, seed: int) -> tuple[Tensor, Tensor]:
    operator = read_operator("A", A)
    check_int("num_ritz", num_ritz, 1, operator.n)
    check_int("seed", seed, 0)
    if start is None:
        z = torch.randn(operator.n, dtype=torch.float64, generator=stream(seed, "ritz"))
        begin = operator @ z.to(A.device if isinstance(A, Tensor) else "cpu")
    else:
        begin = read_vector("start", start, on_cpu=False)
        if len(begin) != operator.n:
            raise ValueError(f"start must have {operator.n} entries; got {len(begin)}")
    found = lanczos(operator, begin, num_ritz)
    values, rotation = found.eigh()
    vectors = found.basis.T @ rotation.to(found.basis)
    return values.to(vectors.device), canonical_signs(vectors)[0]
