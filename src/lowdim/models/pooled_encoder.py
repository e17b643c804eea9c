"""An encoder that averages its token states, with the loss of pairs: what a forecast of task embed computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.models.sentence_classifier import mean_pool

__all__ = ["PooledEncoder"]

_SCALE = 20.0  # of cosines, as in sentence-transformers


class PooledEncoder(nn.Module):
    """`embeddings = normalize(mean_pool(encoder(tokens)))`; the first half of the rows belongs to the second, in order."""

    export_root = "encoder"

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.encoder.config

    def forward(
        self,
        input_ids: Tensor,  # (2 rows, tokens)
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,  # (rows,)
        **inputs: Any,
    ) -> Any:
        """`logits`, the embeddings `(2 rows, width)`, and `loss`, that of pairs, where there are labels."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        embeddings = F.normalize(mean_pool(states, attention_mask), dim=-1)
        if labels is None:
            return SequenceClassifierOutput(logits=embeddings)  # pyright: ignore[reportArgumentType]
        return SequenceClassifierOutput(loss=_of_pairs(embeddings), logits=embeddings)  # pyright: ignore[reportArgumentType]

    def nested_loss(
        self,
        batch: Mapping[str, Tensor],
        sizes: Sequence[tuple[int, int]],  # (layers, dimensions)
    ) -> Tensor:
        """The sum of the losses at each size; where layers grow also the distance of each to the whole, as in Starbucks."""
        mask, grows = batch["attention_mask"], len({layers for layers, _ in sizes}) > 1
        states = self.encoder(input_ids=batch["input_ids"], attention_mask=mask, output_hidden_states=grows)
        layers = states.hidden_states if grows else (states.last_hidden_state,)
        whole = mean_pool(layers[-1], mask)
        total = _of_pairs(F.normalize(whole, dim=-1))
        for layer, dim in sizes[:-1]:
            own = mean_pool(layers[layer], mask) if grows else whole
            total = total + _of_pairs(F.normalize(own[:, :dim], dim=-1))
            if grows:
                teacher, student = (each[:, :dim].log_softmax(-1) for each in (whole, own))
                total = total + F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return total


def _of_pairs(embeddings: Tensor) -> Tensor:
    """The loss of pairs: each first text finds its second one."""
    first, second = embeddings.chunk(2)
    scores = _SCALE * first @ second.T
    return F.cross_entropy(scores, torch.arange(len(first), device=scores.device))
