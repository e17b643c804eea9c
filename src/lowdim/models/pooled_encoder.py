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
    """`embeddings = normalize(mean_pool(encoder(tokens)))`, of texts column after column: pairs or triplets, in order.

    Where there are labels, one for each row, the encoder runs on each column by itself, as sentence-transformers trains: each
    parameter then has a gradient from every column, and for a moment two of its size.
    """

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
        input_ids: Tensor,  # (columns · rows, tokens)
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,  # (rows,)
        **inputs: Any,
    ) -> Any:
        """`logits`, the embeddings `(columns · rows, width)`, and `loss`, that of pairs, where there are labels."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        parts = _columns(input_ids, attention_mask, len(input_ids) if labels is None else len(labels))
        pooled = [mean_pool(self.encoder(input_ids=i, attention_mask=m, **inputs).last_hidden_state, m) for i, m in parts]
        embeddings = F.normalize(torch.cat(pooled), dim=-1)
        if labels is None:
            return SequenceClassifierOutput(logits=embeddings)  # pyright: ignore[reportArgumentType]
        loss = _of_pairs(embeddings, len(labels))
        return SequenceClassifierOutput(loss=loss, logits=embeddings)  # pyright: ignore[reportArgumentType]

    def nested_loss(
        self,
        batch: Mapping[str, Tensor],
        sizes: Sequence[tuple[int, int]],  # (layers, dimensions)
    ) -> Tensor:
        """The sum of the losses at each size; where layers grow also the distance of each to the whole, as in Starbucks."""
        rows, grows = len(batch["labels"]), len({layers for layers, _ in sizes}) > 1
        parts = _columns(batch["input_ids"], batch["attention_mask"], rows)
        states = [self.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=grows) for ids, mask in parts]

        def pooled(layer: int) -> Tensor:
            each = [found.hidden_states[layer] if grows else found.last_hidden_state for found in states]
            return torch.cat([mean_pool(state, mask) for state, (_, mask) in zip(each, parts)])

        whole = pooled(-1)
        total = _of_pairs(F.normalize(whole, dim=-1), rows)
        for layer, dim in sizes[:-1]:
            own = pooled(layer) if grows else whole
            total = total + _of_pairs(F.normalize(own[:, :dim], dim=-1), rows)
            if grows:
                teacher, student = (each[:, :dim].log_softmax(-1) for each in (whole, own))
                total = total + F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return total


def _columns(ids: Tensor, mask: Tensor | None, rows: int) -> list[tuple[Tensor, Tensor | None]]:
    """Token ids and mask of each column."""
    parts = ids.split(rows)
    return list(zip(parts, [None] * len(parts) if mask is None else mask.split(rows)))


def _of_pairs(embeddings: Tensor, rows: int) -> Tensor:
    """The loss of pairs: each first text finds its second one among all that are no first ones."""
    scores = _SCALE * embeddings[:rows] @ embeddings[rows:].T
    return F.cross_entropy(scores, torch.arange(rows, device=scores.device))
