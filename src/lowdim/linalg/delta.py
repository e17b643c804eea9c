"""Products of generalized Householder transformations as a recurrence, token by token or in chunks (DeltaProduct)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lowdim.errors import check_float, check_int
from lowdim.linalg.wide import without_autocast

__all__ = ["delta_product", "unit_rows"]


def delta_product(
    q: Tensor,  # (B, T, H, K)
    k: Tensor,  # (B, T * n, H, K)
    v: Tensor,  # (B, T * n, H, V)
    beta: Tensor,  # (B, T * n, H)
    g: Tensor | None = None,  # (B, T, H)
    *,
    num_householder: int = 1,
    scale: float | None = None,
    initial_state: Tensor | None = None,  # (B, H, K, V)
    normalize_qk: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A linear recurrence whose transition is a product of `n` generalized Householder matrices (times a decay).

    Formula: per batch and head, with state `S (K, V)`, for each token t::

        S ← exp(g_t) S
        S ← S + beta_i k_i (v_i − Sᵀ k_i)ᵀ        for its micro-steps i = 1 ... n, in order
        o_t = scale · Sᵀ q_t

    Micro-step i (from 0) of token t is at index `t · n + i` of `k`, `v` and `beta`. With unit keys, `beta` in [0, 1] gives
    eigenvalues in [0, 1], and up to 2 allows reflections. Larger ones, and longer keys, make the recurrence explode.

    Args:
        g: log decay, at most 0, once for each token before its micro-steps; None for none.
        num_householder: `n`, micro-steps for each token.
        scale: of the queries; None is `K ** -0.5`.
        initial_state: before the first token; None is 0.
        normalize_qk: divide each query and key by the root of its sum of squares + 1e-6.
        chunk_size: None runs token by token; an int runs chunks of that many tokens, each by a triangular system. Both are
            equal up to rounding, and differentiable in every tensor.

    Returns:
        `o (B, T, H, V)` in the dtype of `v`, and the state after the last token, `(B, H, K, V)`. Everything is computed in
        float32 or better, under autocast too, and the state stays so.

    Raises:
        ValueError: shapes that do not fit, `num_householder` or `chunk_size` below 1.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> key = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> o, state = la.delta_product(key, key, torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1), scale=1.0)
        >>> o.flatten().tolist(), state[0, 0].tolist()
        ([1.0, 1.0, 1.0], [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])

    Source: Siems et al., "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", arXiv 2502.10297.
    """
    n = num_householder
    check_int("num_householder", n, 1)
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, 1)
    _check_shapes(q, k, v, beta, g, initial_state, n)
    size = q.shape[-1] ** -0.5 if scale is None else scale
    check_float("scale", size)
    given = [tensor for tensor in (q, k, v, beta, g, initial_state) if tensor is not None]
    dtype = torch.float32
    for tensor in given:
        dtype = torch.promote_types(dtype, tensor.dtype)
    with without_autocast(q.device.type):
        heads = [tensor.to(dtype).transpose(1, 2) for tensor in (q, k, v, beta)]  # (B, H, T or T * n, ...)
        queries, keys, values, rates = heads
        decay = None if g is None else g.to(dtype).transpose(1, 2)
        if normalize_qk:
            queries, keys = unit_rows(queries), unit_rows(keys)
        queries = size * queries
        if initial_state is None:
            state = keys.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        else:
            state = initial_state.to(dtype)
        length = q.shape[1]
        if length == 0:
            return torch.zeros_like(v), state
        if chunk_size is None:
            o, state = _tokens(queries, keys, values, rates, decay, state, n)
        else:
            out, start = [], 0
            for c in _sizes(length, chunk_size):
                stop = start + c[0] * c[1]
                part = slice(start * n, stop * n)
                piece = None if decay is None else decay[:, :, start:stop]
                o, state = _chunks(
                    queries[:, :, start:stop], keys[:, :, part], values[:, :, part], rates[:, :, part], piece, state, n, c[1]
                )
                out.append(o)
                start = stop
            o = out[0] if len(out) == 1 else torch.cat(out, 2)
        return o.transpose(1, 2).to(v.dtype), state


def unit_rows(
    x: Tensor,  # (..., K)
) -> Tensor:
    """Each row divided by `√(Σ x² + 1e-6)`.

    Example:
        >>> import torch, lowdim.linalg as la
        >>> [round(entry, 4) for entry in la.unit_rows(torch.tensor([3.0, 4.0])).tolist()]
        [0.6, 0.8]

    Source: the l2 norm of flash-linear-attention.
    """
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def _sizes(length: int, chunk: int) -> list[tuple[int, int]]:
    """`(chunks, tokens of each)`: the whole ones, then the rest."""
    whole, rest = divmod(length, chunk)
    return [(number, size) for number, size in ((whole, chunk), (1, rest)) if number and size]


def _tokens(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written; `(B, H, T, ...)`."""
    out = []
    decays = None if g is None else g.exp()[..., None, None].unbind(2)
    # Rows are taken apart at once: the backward pass of an index would fill a whole tensor for each token.
    steps = zip(k[:, :, :, None].unbind(2), v[:, :, :, None].unbind(2), (beta[..., None] * k)[..., None].unbind(2), strict=True)
    for t, query in enumerate(q[:, :, :, None].unbind(2)):
        if decays is not None:
            state = decays[t] * state
        for key, value, scaled in itertools.islice(steps, n):
            state = state + scaled @ (value - key @ state)
        out.append(query @ state)
    return torch.cat(out, 2), state


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, n: int, c: int
) -> tuple[Tensor, Tensor]:
    """Whole chunks of `c` tokens.

    What the micro-steps of a chunk write, `U`, solves `(I + A) U = diag(beta) (V − diag(exp D) K S)` with
    `A[s, r] = beta_s exp(D_s − D_r) k_s · k_r` for r < s, `S` the state before the chunk, `D` the decay since then. Only
    differences of decays are exponentiated, of later to earlier, so that nothing overflows.
    """
    q, k, v = q.unflatten(2, (-1, c)), k.unflatten(2, (-1, c * n)), v.unflatten(2, (-1, c * n))
    rate = beta.unflatten(2, (-1, c * n))[..., None]
    token = torch.arange(c * n, device=q.device) // n
    unseen = token > torch.arange(c, device=q.device)[:, None]  # (c, m): micro-steps of later tokens
    system, seen = ((rate * k) @ k.mT).tril(-1), q @ k.mT
    reads, writes, kept = rate * k, k, None
    if g is None:
        seen = seen.masked_fill(unseen, 0)
    else:
        G = g.unflatten(2, (-1, c)).cumsum(-1)
        D = G.repeat_interleave(n, -1)
        later = token[:, None] < token
        system = system * (D[..., :, None] - D[..., None, :]).masked_fill(later, -torch.inf).exp()
        seen = seen * (G[..., :, None] - D[..., None, :]).masked_fill(unseen, -torch.inf).exp()
        q, reads = G.exp()[..., None] * q, D.exp()[..., None] * reads
        kept, writes = G[..., -1:, None].exp(), (G[..., -1:] - D).exp()[..., None] * k
    factors = [None] * q.shape[2] if kept is None else kept.unbind(2)
    parts = zip(*(part.unbind(2) for part in (system, rate * v, reads, q, seen, writes)), factors, strict=True)
    out = []
    for matrix, value, read, query, share, write, factor in parts:
        written = torch.linalg.solve_triangular(matrix, value - read @ state, upper=False, unitriangular=True)
        out.append(query @ state + share @ written)
        state = (state if factor is None else factor * state) + write.mT @ written
    return torch.cat(out, 2), state


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None, n: int
) -> None:
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q and v must be (B, T, H, K) and (B, T * {n}, H, V); got shapes {tuple(q.shape)} and {tuple(v.shape)}"
        )
    B, T, H, K = q.shape
    wanted = {
        "k": (k, (B, T * n, H, K)),
        "v": (v, (B, T * n, H, v.shape[3])),
        "beta": (beta, (B, T * n, H)),
        "g": (g, (B, T, H)),
        "initial_state": (initial_state, (B, H, K, v.shape[3])),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} with q of {tuple(q.shape)} and num_householder={n}; got shape {tuple(tensor.shape)}"
            )
