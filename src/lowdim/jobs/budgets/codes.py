"""Which layers LR²VQ codes, for a size on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowdim.jobs.budgets.budget import Budget, Fitted, check_reachable
from lowdim.jobs.budgets.low_rank import COUNTED
from lowdim.jobs.systems import Compressor
from lowdim.ranks import Choices, by_error_per_byte

__all__ = ["fit_codes"]


def fit_codes(method: Compressor, given: Mapping[str, Any], model: nn.Module, batches: Sequence[Any], budget: Budget) -> Fitted:
    """LR²VQ: a layer is coded or left dense; those are coded whose error is least for each byte saved.

    The errors are those of coding a copy of the model in one shot.
    """
    from lowdim.compress import last_report
    from lowdim.pretrained import stored_bytes

    config = method.build(given)
    trial = method.function(copy.deepcopy(model), method.build({**given, "pretrain_steps": 0, "train_steps": 0}))
    rows = last_report(trial).replaced
    whole, least = stored_bytes(model), stored_bytes(trial)
    del trial
    how = f"codebook_size={config.codebook_size}, subvector_size={config.subvector_size}; a larger subvector_size is smaller"
    allowed = check_reachable("lr2vq", budget, COUNTED, whole, least, how)
    kept = {row.name: row for row in rows if row.after < row.before}
    tables = {
        name: Choices(torch.tensor([row.before, row.after]), torch.tensor([0.0, row.relative_error**2]))
        for name, row in kept.items()
    }
    outside = whole - sum(row.before for row in kept.values())
    chosen = by_error_per_byte(tables, allowed - outside)
    coded = [name for name, choice in chosen.items() if choice]
    return Fitted(method.build({**given, "target_modules": coded}), COUNTED, whole, allowed, least)
