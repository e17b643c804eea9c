"""Diagonal state spaces: their kernel, their first numbers, and sums of powers without a tensor of all powers (S4D)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lowdim.errors import check_choice, check_float, check_int
from lowdim.linalg.random import stream
from lowdim.linalg.wide import without_autocast

__all__ = ["DISCRETIZATIONS", "INITS", "DiscreteModes", "power_states", "power_sum", "s4d_discrete", "s4d_init", "s4d_kernel"]

#: Ways from continuous to discrete time.
DISCRETIZATIONS = ("zoh", "bilinear", "dss")
#: First diagonals.
INITS = ("lin", "inv", "legs", "real", "quad", "random")


class DiscreteModes(NamedTuple):
    """One step of a diagonal system in discrete time: `x ← exp(log_step) x + gain u`, both complex `(H, modes)`."""

    log_step: Tensor
    gain: Tensor


def s4d_kernel(
    A: Tensor,  # (H, modes), complex
    B: Tensor,  # (H, modes), complex
    C: Tensor,  # (H, modes) or (c, H, modes), complex
    dt: Tensor,  # (H,)
    length: int,
    disc: str = "zoh",
) -> Tensor:
    """The convolution kernel of `H` diagonal state spaces, `(H, length)` or `(c, H, length)`, real.

    Formula: with `z = dt A`, one mode of each conjugate pair in `A`::

        zoh        K[j] = 2 Re Σ C B (exp(z) − 1) / A · exp(j z)
        bilinear   K[j] = 2 Re Σ C B dt / (1 − z/2) · ((1 + z/2) / (1 − z/2))^j
        dss        K[j] = Re Σ B C (exp(z) − 1) r exp(j z),  r = d* / (d d* + 1e-7),  d = A (exp(length z) − 1)

    Memory grows with the root of the length, not with it: see `power_sum`.

    Raises:
        ValueError: an unknown `disc`, a length below 1, shapes that do not fit.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> A, one = torch.tensor([[-1.0 + 0j]]), torch.ones(1, 1, dtype=torch.complex64)
        >>> la.s4d_kernel(A, one, one / 2, torch.tensor([0.5]), 3)
        tensor([[0.3935, 0.2387, 0.1447]])

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", NeurIPS 2022, arXiv
    2206.11893; DSS: Gupta et al., arXiv 2203.14343.
    """
    check_choice("disc", disc, DISCRETIZATIONS)
    check_int("length", length, 1)
    if A.ndim != 2 or B.shape != A.shape or C.shape[-2:] != A.shape or dt.shape != A.shape[:1]:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("A", A), ("B", B), ("C", C), ("dt", dt)))
        raise ValueError(f"A and B must be (H, modes), C (H, modes) or (c, H, modes), dt (H,); got {shapes}")
    with without_autocast(A.device.type):
        if disc != "dss":
            modes = s4d_discrete(A, B, dt, disc)
            return 2 * power_sum(C * modes.gain, modes.log_step, length)
        z = dt[:, None] * A
        d = A * ((length * z).exp() - 1)
        r = d.conj() / (d * d.conj() + 1e-7)
        return power_sum(B * C * (z.exp() - 1) * r, z, length)


def s4d_discrete(
    A: Tensor,  # (H, modes), complex
    B: Tensor,  # (H, modes), complex
    dt: Tensor,  # (H,)
    disc: str = "zoh",
) -> DiscreteModes:
    """`x' = A x + B u` in steps of `dt`: the logarithm of the step's factor, and the factor of its input.

    Raises:
        ValueError: `disc` is neither zoh nor bilinear: the others have no recurrence.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> A = torch.tensor([[-1.0 + 0j]])
        >>> step = la.s4d_discrete(A, torch.ones_like(A), torch.tensor([0.5]), "bilinear")
        >>> step.log_step.exp().real, step.gain.real
        (tensor([[0.6000]]), tensor([[0.4000]]))

    Source: Gu et al., NeurIPS 2022, arXiv 2206.11893.
    """
    check_choice("disc", disc, ("zoh", "bilinear"))
    z = dt[:, None] * A
    if disc == "zoh":
        return DiscreteModes(z, B * (z.exp() - 1) / A)
    return DiscreteModes(((1 + z / 2) / (1 - z / 2)).log(), B * dt[:, None] / (1 - z / 2))


def power_sum(
    weights: Tensor,  # (..., H, modes), complex
    log_step: Tensor,  # (H, modes), complex
    length: int,
) -> Tensor:
    """`Re Σ_n weights_n exp(j log_step_n)` for j = 0 ... length − 1: `(..., H, length)`, real.

    Formula: with `j = a m + b` and `m` the root of the length, one matrix product for each h of the powers of `a m`, weighted,
    with those of `b`: `2 √length` powers for each mode, where the plain sum has `length`.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> la.power_sum(torch.tensor([[3.0 + 0j]]), torch.tensor([[0.5 + 0j]]).log(), 3)
        tensor([[3.0000, 1.5000, 0.7500]])

    Source: the chunked Vandermonde product.
    """
    block, count = _blocks(length)
    outer = weights[..., None, :] * _powers(log_step, count, block)  # (..., H, count, modes)
    inner = _powers(log_step, block, 1)
    found = torch.cat([outer.real, -outer.imag], -1) @ torch.cat([inner.real, inner.imag], -1).mT
    return found.flatten(-2)[..., :length]


def power_states(
    u: Tensor,  # (batch, length, H), real
    log_step: Tensor,  # (H, modes), complex
) -> Tensor:
    """`Σ_j exp((length − 1 − j) log_step) u_j`, complex `(batch, H, modes)`: what is left of an input after its last step.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> la.power_states(torch.tensor([[[1.0], [1.0]]]), torch.tensor([[0.5 + 0j]]).log()).real.round(decimals=4)
        tensor([[[1.5000]]])

    Source: the chunked Vandermonde product.
    """
    block, count = _blocks(u.shape[1])
    u = torch.nn.functional.pad(u.mT, (count * block - u.shape[1], 0))  # zeros before the first token
    inner = _powers(log_step, block, 1).flip(-2)  # (H, block, modes)
    pieces = u.unflatten(-1, (count, block))  # (batch, H, count, block)
    sums = torch.complex(pieces @ inner.real, pieces @ inner.imag)
    return (_powers(log_step, count, block).flip(-2) * sums).sum(-2)


def s4d_init(
    init: str,
    d_state: int,
    *,
    b_clip: float | None = 2.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The first `(A, B)` of one diagonal state space of size `d_state`, complex128 `(d_state / 2,)`: one of each pair.

    Formula: `A = −1/2 + i a_n` with, for n = 0, 1, ...::

        lin   a_n = π n                         quad    a_n = (2n + 1)² / π
        inv   a_n = (N/π) (N/(2n + 1) − 1)      random  a_n = exp(standard normal)
        real  A = −(n + 1)                      legs    eigenvalues of HiPPO-LegS without its rank-one part, largest first

    `B = 1`, and for `legs` the size of the input along the eigenvector.

    Args:
        b_clip: largest `B` of `legs`; None keeps all.
        seed: of `random`; a generator wins, and without both torch's default one draws.

    Raises:
        ValueError: an unknown `init`, a size that is not even and positive, `b_clip` not above 0.

    Example:
        >>> import lowdim.linalg as la
        >>> la.s4d_init("inv", 4)[0].imag
        tensor([3.8197, 0.4244], dtype=torch.float64)

    Source: Gu et al., NeurIPS 2022, arXiv 2206.11893.
    """
    check_choice("init", init, INITS)
    check_int("d_state", d_state, 2)
    if d_state % 2:
        raise ValueError(f"d_state must be even: one of each conjugate pair is stored; got {d_state}")
    if b_clip is not None:
        check_float("b_clip", b_clip, 0.0, low_open=True)
    n = torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    real, B = torch.full_like(n, -0.5), torch.ones_like(n)
    if init == "legs":
        imaginary, B = _legs(d_state)
        B = B if b_clip is None else B.clamp(max=b_clip)
    elif init == "random":
        draw = stream(seed, "s4d", "random") if generator is None and seed is not None else generator
        place = "cpu" if draw is None else draw.device
        imaginary = torch.randn(n.shape, generator=draw, dtype=torch.float64, device=place).cpu().exp()
    elif init == "real":
        real, imaginary = -(n + 1), torch.zeros_like(n)
    else:
        imaginary = {
            "lin": math.pi * n,
            "inv": d_state / math.pi * (d_state / (2 * n + 1) - 1),
            "quad": (2 * n + 1) ** 2 / math.pi,
        }[init]
    return torch.complex(real, imaginary), torch.complex(B, torch.zeros_like(B))


def _legs(N: int) -> tuple[Tensor, Tensor]:
    """Positive frequencies of the normal part of HiPPO-LegS, largest first, and the sizes of its input along them."""
    n = torch.arange(N, dtype=torch.float64, device="cpu")
    b, p = (2 * n + 1).sqrt(), (n + 0.5).sqrt()
    system = -torch.outer(b, b).tril(-1) - torch.diag(n + 1) + torch.outer(p, p)
    skew = (system - system.T) / 2  # the rest is −1/2 times the identity
    values, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -skew))
    sizes = (vectors.mH @ b.to(vectors.dtype)).abs()
    return values[N // 2 :].flip(0), sizes[N // 2 :].flip(0)


def _blocks(length: int) -> tuple[int, int]:
    """`(powers in a block, blocks)`: about the root of the length each."""
    block = max(math.isqrt(length), 1)
    return block, -(-length // block)


def _powers(log_step: Tensor, count: int, stride: int) -> Tensor:
    """`exp(a · stride · log_step)` for a = 0 ... count − 1: `(H, count, modes)`."""
    a = torch.arange(count, device=log_step.device, dtype=log_step.real.dtype) * stride
    return (a[:, None] * log_step[:, None, :]).exp()
