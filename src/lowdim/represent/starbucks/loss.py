"""The Starbucks loss: a base loss at each of a fixed list of (layers, dimensions), and the distance to the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_float
from lowdim.linalg import wide
from lowdim.represent.starbucks.encoder import encoder_of, layer_list, recorded_states, sentence_model, width_of
from lowdim.represent.starbucks.pairs import PAIRS, check_pairs, default_pairs
from lowdim.surgery import with_forward

__all__ = ["StarbucksLoss"]


class StarbucksLoss(nn.Module):
    """A loss of sentence-transformers, summed over a fixed list of sub-models `(layers, dimensions)` in each step.

    Formula: `e_i` are the embeddings from the states after layer `n_i`, `ê_i = normalize(e_i[:, :d_i])`, f the base loss, m the
    last pair: `L = w_last f(ê_m) + Σ_{i<m} [f(ê_i) + κ w_kl KL(softmax(e_m[:, :d_i]) ‖ softmax(e_i[:, :d_i]))]`. The KL is the
    mean over rows (all columns together) of the sum over coordinates. κ only multiplies. One pass serves all pairs.

    Args:
        model: a `SentenceTransformer` whose first module is a Transformer.
        loss: the base loss, made with the same model: `MultipleNegativesRankingLoss(model)`, `CoSENTLoss(model)`, …
        pairs: `(layers, dimensions)`, both growing; the last one is the whole model. None scales the list to the model.
        last_layer_weight: `w_last`.
        kl_div_weight: `w_kl`.
        kl_temperature: κ; 0 leaves the KL out.
        detach_teacher: no gradient through `e_m` in the KL.

    Shapes: as the base loss: one dict of features `(B, T)` for each column of texts, labels `(B,)` or None.

    Raises:
        ValueError: pairs that do not grow or do not end with the whole model, weights below 0.
        TypeError: another model; a base loss with a gradient cache, whose backward pass runs after this one has ended.
        MissingExtraError: sentence-transformers is not installed.

    Example:
        >>> from lowdim.represent import StarbucksLoss
        >>> from lowdim.testing.small_encoder import small_encoder
        >>> from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        >>> model = small_encoder(layers=2, width=8)  # any SentenceTransformer
        >>> loss = StarbucksLoss(model, MultipleNegativesRankingLoss(model), pairs=[(1, 4), (2, 8)])
        >>> loss([model.preprocess(["the cat sat"]), model.preprocess(["a cat"])]).ndim
        0

    Use it where an encoder will be served at several sizes. For one size train that size alone; where only dimensions are cut,
    sentence-transformers' MatryoshkaLoss is enough.

    Source: Zhuang et al., "Starbucks: Improved Training for 2D Matryoshka Embeddings", arXiv 2410.13230.
    """

    def __init__(
        self,
        model: Any,
        loss: nn.Module,
        pairs: Iterable[tuple[int, int]] | None = PAIRS,
        *,
        last_layer_weight: float = 1.0,
        kl_div_weight: float = 1.0,
        kl_temperature: float = 0.3,
        detach_teacher: bool = False,
    ):
        super().__init__()
        plain = sentence_model(model, "StarbucksLoss")
        from sentence_transformers.base.losses.gradcache import uses_gradient_cache

        if uses_gradient_cache(loss):
            raise TypeError(
                f"loss must not cache gradients: {type(loss).__name__} runs the model again in the backward pass, where the "
                "layers can no longer be chosen; use the loss of the same name without Cached"
            )
        for name, value in (
            ("last_layer_weight", last_layer_weight),
            ("kl_div_weight", kl_div_weight),
            ("kl_temperature", kl_temperature),
        ):
            check_float(name, value, 0.0)
        layers, width = len(layer_list(encoder_of(plain))[2]), width_of(plain)
        self.model, self.loss = model, loss
        self.pairs = check_pairs(default_pairs(layers, width) if pairs is None else pairs, layers, width)
        self.last_layer_weight, self.kl_div_weight = last_layer_weight, kl_div_weight
        self.kl_temperature, self.detach_teacher = kl_temperature, detach_teacher

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The sum over the pairs."""
        from sentence_transformers.base.losses import column_merging_disabled

        columns = [dict(features) for features in sentence_features]  # the states of all layers are kept in them
        plain = sentence_model(self.model, "StarbucksLoss")
        with column_merging_disabled(), recorded_states(plain) as recorder, _cutting(plain) as cutter:
            cutter.dim = self.pairs[-1][1]
            total = self.last_layer_weight * self.loss(columns, labels)
            teacher = cutter.taken()
            if self.detach_teacher:
                teacher = teacher.detach()
            for layer, dim in self.pairs[:-1]:
                recorder.layer, cutter.dim = layer, dim
                total = total + self.loss(columns, labels)
                student = cutter.taken()
                if self.kl_temperature:
                    log_p, log_q = (wide(e[:, :dim]).log_softmax(-1) for e in (teacher, student))
                    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
                    total = total + self.kl_temperature * self.kl_div_weight * divergence
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of the loss."""
        return {
            "loss": type(self.loss).__name__,
            "pairs": [list(pair) for pair in self.pairs],
            "last_layer_weight": self.last_layer_weight,
            "kl_div_weight": self.kl_div_weight,
            "kl_temperature": self.kl_temperature,
            "detach_teacher": self.detach_teacher,
        }

    @property
    def citation(self) -> str:
        """The paper, for the model card."""
        return """
@misc{zhuang2024starbucks,
    title={Starbucks: Improved Training for 2D Matryoshka Embeddings},
    author={Shengyao Zhuang and Shuai Wang and Fabio Zheng and Bevan Koopman and Guido Zuccon},
    year={2024},
    eprint={2410.13230},
    archivePrefix={arXiv},
    primaryClass={cs.IR}
}
"""


class _Cutter:
    """Stands for the model's forward method: its embeddings are kept whole, and given out cut and at length 1."""

    dim = 0

    def __init__(self, forward: Any):
        self._forward, self._whole = forward, []

    def __call__(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        out = self._forward(features, **kwargs)
        self._whole.append(out["sentence_embedding"])
        return {**out, "sentence_embedding": F.normalize(out["sentence_embedding"][..., : self.dim], dim=-1)}

    def taken(self) -> Tensor:
        """The whole embeddings since the last call, all columns in order."""
        whole, self._whole = torch.cat(self._whole), []
        return whole


@contextmanager
def _cutting(model: Any):
    cutter = _Cutter(model.forward)
    with with_forward(model, cutter):
        yield cutter
