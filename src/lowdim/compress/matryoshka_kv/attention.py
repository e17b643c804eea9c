"""Attention on projected keys and values, and its place among the attention functions of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lowdim.linalg import compute_dtype

__all__ = ["attend", "grouped", "joined", "leading", "matryoshka_attention", "restored"]


def matryoshka_attention(
    query: Tensor,  # (batch, heads, queries, d), after the rotary embedding
    key: Tensor,  # (batch, kv_heads, tokens, d), after the rotary embedding
    value: Tensor,  # (batch, kv_heads, tokens, d)
    *,
    key_basis: Tensor,  # (kv_heads, d, d), orthogonal
    value_basis: Tensor,  # (kv_heads, d, d), orthogonal
    value_mean: Tensor,  # (kv_heads, d)
    key_ranks: Tensor | Sequence[int],  # (kv_heads,)
    value_ranks: Tensor | Sequence[int],  # (kv_heads,)
    scaling: float,
    attention_mask: Tensor | None = None,  # (batch or 1, 1, queries, >= tokens), added to the scores
    compressed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention with keys and values in the leading directions of each KV head.

    Formula: with `U_r` the first r columns of a head's basis, `k̃ = k U_k,r`, `ṽ = (v - μ) U_v,r`, `q̃ = q U_k,r` (of the query
    head's KV head), `A = softmax(scaling · q̃ k̃ᵀ + mask)`, output `(A ṽ) U_v,rᵀ + μ`. At full rank this is ordinary attention.

    Args:
        scaling: that of the whole head, usually `d ** -0.5`.
        compressed: key and value are projected already, and padded with zeros to d or to the largest rank.

    Returns:
        Output `(batch, queries, heads, d)` and weights `(batch, heads, queries, tokens)`. Weights are computed in float32 or
        better.

    Example:
        >>> import torch
        >>> from lowdim.compress import matryoshka_attention
        >>> q, kv, eye = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8), torch.eye(8).expand(2, 8, 8)
        >>> how = dict(key_basis=eye, value_basis=eye, value_mean=torch.zeros(2, 8), scaling=8**-0.5)
        >>> output, weights = matryoshka_attention(q, kv, kv, key_ranks=[8, 8], value_ranks=[4, 8], **how)
        >>> output.shape, weights.shape
        (torch.Size([1, 1, 4, 8]), torch.Size([1, 4, 1, 5]))

    Source: Lin et al., "MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection", arXiv 2410.14731.
    """
    key_basis, value_basis = leading(key_basis, key_ranks), leading(value_basis, value_ranks)
    if compressed:
        key_basis, value_basis = key_basis[..., : key.shape[-1]], value_basis[..., : value.shape[-1]]
    else:
        key, value = key @ key_basis, (value - value_mean[:, None]) @ value_basis
    queries = query.shape[2]
    mixed, weights = attend(
        grouped(query, len(key_basis)) @ key_basis, key, value, queries, scaling=scaling, mask=attention_mask, weights=True
    )
    assert weights is not None
    return restored(mixed, value_basis, value_mean, queries), weights


def leading(
    basis: Tensor,  # (kv_heads, d, d)
    ranks: Tensor | Sequence[int],  # (kv_heads,)
) -> Tensor:
    """The bases with zeros from each head's rank on."""
    kept = torch.as_tensor(ranks, device=basis.device)[:, None] > torch.arange(basis.shape[-1], device=basis.device)
    return basis * kept[:, None].to(basis.dtype)


def grouped(
    query: Tensor,  # (batch, heads, queries, d)
    kv_heads: int,
) -> Tensor:
    """`(batch, kv_heads, group · queries, d)`: the queries of all heads that share a KV head."""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])


def restored(
    mixed: Tensor,  # (batch, kv_heads, group · queries, r)
    value_basis: Tensor,  # (kv_heads, d, r)
    value_mean: Tensor,  # (kv_heads, d)
    queries: int,
) -> Tensor:
    """The output in the values' own coordinates, `(batch, queries, heads, d)`."""
    return joined(mixed @ value_basis.mT + value_mean[:, None], queries)


def joined(
    mixed: Tensor,  # (batch, kv_heads, group · queries, d)
    queries: int,
) -> Tensor:
    """`(batch, queries, heads, d)`, as attention functions of transformers return it."""
    return mixed.reshape(mixed.shape[0], -1, queries, mixed.shape[-1]).transpose(1, 2).contiguous()


def attend(
    query: Tensor,  # (batch, kv_heads, group · queries, r)
    key: Tensor,  # (batch, kv_heads, tokens, r)
    value: Tensor,  # (batch, kv_heads, tokens, s)
    queries: int,
    *,
    scaling: float,
    mask: Tensor | None = None,  # (batch or 1, 1, queries, >= tokens): added, or bool (True: attended to)
    causal: bool = False,
    dropout: float = 0.0,
    softcap: float | None = None,
    weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of groups of query heads: the mixed values `(batch, kv_heads, group · queries, s)`, and the weights.

    Several queries at once go through torch's fused attention, which never holds the weights; a single query, a cap on the
    scores, and a call that asks for the weights are computed by two products.

    Args:
        causal: without a mask, query i attends to tokens up to i.
        softcap: scores become `softcap · tanh(scores / softcap)` before the mask.
        weights: return the weights `(batch, heads, queries, tokens)`, otherwise None.
    """
    batch, kv_heads, rows, _ = query.shape
    tokens, group = key.shape[2], rows // queries
    if mask is not None:
        mask = mask[..., :tokens]
    if softcap is None and not weights and queries > 1:
        sides = [x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (key, value)]
        heads = query.view(batch, kv_heads * group, queries, -1)
        mixed = F.scaled_dot_product_attention(
            heads, *sides, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scaling
        )
        return mixed.reshape(batch, kv_heads, rows, -1), None
    scores = (query * scaling) @ key.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal and queries > 1:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=scores.device).tril()[None, None]
    if mask is not None:
        by_head = scores.view(batch, kv_heads, group, queries, tokens)
        lowest = torch.finfo(scores.dtype).min
        masked = by_head.masked_fill(~mask[:, :, None], lowest) if mask.dtype == torch.bool else by_head + mask[:, :, None]
        scores = masked.view(scores.shape)
    shares = scores.softmax(-1, dtype=compute_dtype(scores.dtype)).to(query.dtype)
    if dropout:
        shares = F.dropout(shares, dropout)
    return shares @ value, shares.view(batch, -1, queries, tokens) if weights else None
