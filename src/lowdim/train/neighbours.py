"""Whether a text's output depends on the other texts of its batch, which are padded to one length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lowdim.surgery import model_device

if TYPE_CHECKING:
    from torch import nn

    from lowdim.train.tasks.base import Task

__all__ = ["padding_note"]

_LOOKED_AT = 64  # training texts, among which the shortest and the longest are taken
_ROUNDING = 1e-3  # what rounding may change, relative to the largest logit


@torch.no_grad()
def padding_note(model: nn.Module, task: Task) -> str | None:
    """A note where a classifier's answer for a short text changes next to a long one; None where it does not.

    With the padding token that the model ignores, it changes for architectures that mix padding in by themselves (Fourier
    transforms, convolutions over tokens, landmarks), whatever the attention mask says.
    """
    if task.kind not in ("classify", "regress") or len(task.train) < 2:
        return None
    rows: list[Any] = sorted(
        (task.train[i] for i in range(min(_LOOKED_AT, len(task.train)))), key=lambda r: len(r["input_ids"])
    )
    device, was_training = model_device(model), model.training
    model.eval()
    try:
        alone, beside = (
            model(**{key: value.to(device) for key, value in task.collate(batch).items()}).logits[0].float()
            for batch in (rows[:1], [rows[0], rows[-1]])
        )
    finally:
        model.train(was_training)
    share = float((alone - beside).abs().max() / alone.abs().max().clamp_min(1e-12))
    if share <= max(_ROUNDING, 8 * torch.finfo(next(model.parameters()).dtype).eps):
        return None
    return (
        f"{type(model).__name__} does not ignore padding: a short text's output changes by {share:.1%} next to a long one, "
        "so scores depend on how texts are batched"
    )
