"""The retrieval form of the Starbucks loss, on plain tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lowdim.errors import check_float
from lowdim.linalg import wide
from lowdim.represent.core.nested import check_dims

__all__ = ["starbucks_retrieval_loss"]


def starbucks_retrieval_loss(
    query: Tensor,  # (m, B_q, H)
    passage: Tensor,  # (m, B_p, H)
    dims: Sequence[int],
    *,
    temperature: float = 1.0,
    kl_div_weight: float = 1.0,
) -> Tensor:
    """Contrastive loss of queries and passages at each of m sizes, and the distance of each size's scores to the whole model's.

    Formula: `S_i = q_i[:, :d_i] p_i[:, :d_i]ᵀ / τ`; the passage of query b is `b (B_p / B_q)`.
    `L = CE(S_m) + Σ_{i<m} [CE(S_i) + w_kl KL(softmax(S_m) ‖ softmax(S_i))]`, `S_m` without gradient in the KL, whose mean is
    over queries.

    Args:
        query, passage: embeddings from the chosen layers, the whole model last. Not normalised here.
        dims: one dimension for each of the m layers, growing.
        temperature: τ.
        kl_div_weight: `w_kl`.

    Returns:
        A scalar, in float32 or better.

    Raises:
        ValueError: shapes that do not fit, `B_p` that is no multiple of `B_q`, dimensions beyond H, `temperature <= 0`.
        TypeError: dimensions that are not integers.

    Example:
        >>> import torch
        >>> from lowdim.represent import starbucks_retrieval_loss
        >>> q = torch.eye(4).expand(2, 4, 4)  # two layers that give the same embeddings
        >>> f"{starbucks_retrieval_loss(q, 100 * q, dims=[3, 4]).item():.4f}"
        '0.6931'

    Source: Zhuang et al., arXiv 2410.13230, section 3.
    """
    check_float("temperature", temperature, 0.0, low_open=True)
    check_float("kl_div_weight", kl_div_weight, 0.0)
    if query.ndim != 3 or passage.ndim != 3 or query.shape[::2] != passage.shape[::2]:
        raise ValueError(
            "query (m, B_q, H) and passage (m, B_p, H) must have the same layers and width; "
            f"got {tuple(query.shape)} and {tuple(passage.shape)}"
        )
    layers, queries, width = query.shape
    sizes = check_dims(dims, width, "the width of the embeddings")
    if len(sizes) != layers:
        raise ValueError(f"dims must hold one dimension for each of the {layers} layers; got {len(sizes)}: {list(sizes)}")
    if queries == 0 or passage.shape[1] == 0 or passage.shape[1] % queries:
        raise ValueError(f"the number of passages must be a multiple of that of queries ({queries}); got {passage.shape[1]}")
    target = torch.arange(queries, device=query.device) * (passage.shape[1] // queries)
    scores = [wide(q[:, :d]) @ wide(p[:, :d]).T / temperature for q, p, d in zip(query, passage, sizes)]
    teacher = scores[-1].detach().log_softmax(-1)
    total = F.cross_entropy(scores[-1], target)
    for student in scores[:-1]:
        divergence = F.kl_div(student.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
        total = total + F.cross_entropy(student, target) + kl_div_weight * divergence
    return total
