"""Masked auto-encoding at every (layers, dimensions) of the list: pre-training for an encoder that will be cut."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import MissingExtraError, check_int
from lowdim.linalg import wide
from lowdim.represent.starbucks.pairs import PAIRS, check_pairs, default_pairs

__all__ = ["StarbucksPretraining"]


class StarbucksPretraining(nn.Module):
    """SMAE: at every pair, masked tokens are found from the first d coordinates, by the encoder and by a weak decoder.

    Formula: `t(h) = LN(act(h W[:, :d]ᵀ + b))` is the head's transform at width d, scores are the head's decoder of t.
    `MLM_i = CE(scores(t(h_i)), labels)` with `h_i = h_{n_i}[..., :d_i]`. The decoder reads the embeddings of its own masked
    tokens, the first replaced by `t(h_i)[:, 0]`: `MAE_i = CE(scores(t(output)), decoder_labels)`.
    `L = (1/m) Σ_i (MLM_i + MAE_i) / 2`.

    Args:
        model: a `BertForMaskedLM`; embeddings and head are shared by encoder and decoder.
        pairs: `(layers, dimensions)`, both growing, the last one the whole model; None scales the list to the model.
        decoder_layers: how many; they begin as copies of the encoder's first layers.

    Attributes: `model`, and `decoder`, an nn.ModuleList of layers, which is thrown away after pre-training.

    Raises:
        TypeError: another model. ValueError: pairs as in StarbucksLoss; more decoder layers than the encoder has.
        MissingExtraError: transformers is not installed.

    Example:
        >>> from lowdim.represent import StarbucksPretraining
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> sizes = dict(hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=20)
        >>> bert = BertForMaskedLM(BertConfig(num_hidden_layers=2, **sizes))
        >>> StarbucksPretraining(bert, [(1, 4), (2, 8)]).pairs
        ((1, 4), (2, 8))

    Batches come from `StarbucksCollator`. Pre-training pays at the smallest sizes; without a corpus, begin with StarbucksLoss.

    Source: Zhuang et al., arXiv 2410.13230, section 3.2.
    """

    def __init__(self, model: Any, pairs: Iterable[tuple[int, int]] | None = PAIRS, *, decoder_layers: int = 1):
        super().__init__()
        try:
            from transformers import BertForMaskedLM
        except ImportError as error:
            raise MissingExtraError("transformers", "train", "StarbucksPretraining") from error
        if not isinstance(model, BertForMaskedLM):
            raise TypeError(f"model must be a BertForMaskedLM; got {type(model).__name__}")
        layers, width = model.config.num_hidden_layers, model.config.hidden_size
        check_int("decoder_layers", decoder_layers, 1, layers)
        self.pairs = check_pairs(default_pairs(layers, width) if pairs is None else pairs, layers, width)
        self.model = model
        self.decoder = nn.ModuleList(copy.deepcopy(layer) for layer in model.bert.encoder.layer[:decoder_layers])
        self.register_state_dict_post_hook(_without_tied)
        self.register_load_state_dict_pre_hook(_with_tied)

    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T)
        labels: Tensor,  # (B, T), -100 where a token counts not
        decoder_input_ids: Tensor,  # (B, T)
        decoder_labels: Tensor,  # (B, T)
        token_type_ids: Tensor | None = None,  # (B, T)
    ) -> Any:
        """Transformers' `MaskedLMOutput` with `loss`."""
        from transformers.masking_utils import create_bidirectional_mask
        from transformers.modeling_outputs import MaskedLMOutput

        bert = self.model.bert
        states = bert(input_ids, attention_mask, token_type_ids, output_hidden_states=True).hidden_states
        embedded = bert.embeddings(input_ids=decoder_input_ids, token_type_ids=token_type_ids)
        mask = create_bidirectional_mask(self.model.config, inputs_embeds=embedded, attention_mask=attention_mask)
        total = input_ids.new_zeros((), dtype=torch.float32)
        for layer, dim in self.pairs:
            hidden = self._transform(states[layer][..., :dim])
            state = torch.cat([hidden[:, :1], embedded[:, 1:]], dim=1)
            for block in self.decoder:
                state = block(state, mask)
            loss = self._cross_entropy(hidden, labels) + self._cross_entropy(self._transform(state), decoder_labels)
            total = total + loss / (2 * len(self.pairs))
        return MaskedLMOutput(loss=total)  # pyright: ignore[reportArgumentType]

    def _transform(self, hidden: Tensor) -> Tensor:
        """The head's transform with the first columns of its weight."""
        head = self.model.cls.predictions.transform
        inner = F.linear(hidden, head.dense.weight[:, : hidden.shape[-1]], head.dense.bias)
        return head.LayerNorm(head.transform_act_fn(inner))

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The mean over the tokens that count; scores of the others are never computed."""
        counted = labels.ne(-100)
        scores = wide(self.model.cls.predictions.decoder(hidden[counted]))
        return F.cross_entropy(scores, labels[counted], reduction="sum") / counted.sum().clamp_min(1)


#: Tied to what stands beside it; a file of safetensors holds every tensor once.
_TIED = {
    "model.cls.predictions.decoder.weight": "model.bert.embeddings.word_embeddings.weight",
    "model.cls.predictions.decoder.bias": "model.cls.predictions.bias",
}


def _without_tied(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for copied, own in _TIED.items():
        if module.get_parameter(copied) is module.get_parameter(own):
            del state[prefix + copied]


def _with_tied(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for copied, own in _TIED.items():
        if prefix + own in state and module.get_parameter(copied) is module.get_parameter(own):
            state.setdefault(prefix + copied, state[prefix + own])
