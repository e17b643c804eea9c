"""Where the start of an adapter follows from the weight: its leading singular triplets."""

import torch
from torch import Tensor


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`U_r (out, r)`, `σ_r (r,)`, `V_rᵀ (r, in)`; the largest entry of each left vector is positive."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return (u * sign)[:, :rank], s[:rank], (vh * sign.mT)[:rank]
