"""An encoder that averages its token states, with the loss of pairs: what a forecast of task embed computes."""

from __future__ import annotations

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
        first, second = embeddings.chunk(2)
        scores = _SCALE * first @ second.T
        loss = F.cross_entropy(scores, torch.arange(len(first), device=scores.device))
        return SequenceClassifierOutput(loss=loss, logits=embeddings)  # pyright: ignore[reportArgumentType]
