"""A classifier over a sentence encoder: mean of the token states, then one linear layer.

sentence-transformers models are trained for the mean of their token states; the first token's state, which
`AutoModelForSequenceClassification` reads, means little in them (on the demo's data a linear probe reaches 0.74 on the
mean and 0.66 on the first token). Therefore a folder with a mean-pooling module gets this head instead.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SentenceClassifier", "mean_pool"]


def mean_pool(
    states: Tensor,  # (batch, tokens, width)
    mask: Tensor | None,  # (batch, tokens), 1 for real tokens
) -> Tensor:
    """The mean of the real tokens' states, `(batch, width)`."""
    if mask is None:
        return states.mean(1)
    weight = mask.to(states.dtype).unsqueeze(-1)
    return (states * weight).sum(1) / weight.sum(1).clamp_min(1.0)


class SentenceClassifier(nn.Module):
    """`logits = classifier(mean_pool(encoder(tokens)))`.

    Attributes:
        encoder: a transformers encoder.
        classifier: the new head, `nn.Linear(width, num_labels)`.
        problem: as transformers' `problem_type`: None is one class of several, `"regression"` and
            `"multi_label_classification"` are the others.
        classes: their names in order, where there are any.
        export_root: adapters are exported relative to the encoder, which other tools load by itself.
    """

    export_root = "encoder"

    def __init__(self, encoder: nn.Module, num_labels: int, problem: str | None = None):
        super().__init__()
        self.problem = problem
        self.classes: tuple[str, ...] = ()
        self.encoder = encoder
        config: Any = encoder.config
        self.classifier = nn.Linear(config.hidden_size, num_labels, dtype=getattr(encoder, "dtype", None))
        self.num_labels = num_labels

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.encoder.config

    def forward(
        self,
        input_ids: Tensor,  # (batch, tokens)
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,  # (batch,), or (batch, num_labels) for several labels
        token_type_ids: Tensor | None = None,  # (batch, tokens), which text of a pair a token is from
    ) -> Any:
        """Logits, and the mean loss where labels are given: cross entropy, squared error or binary cross entropy."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state
        logits = self.classifier(mean_pool(states, attention_mask))
        loss = None if labels is None else self._loss(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.problem == "regression":
            return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
        if self.problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the encoder's activations in the backward pass."""
        encoder: Any = self.encoder
        encoder.gradient_checkpointing_enable(*args, **kwargs)

    def extra_repr(self) -> str:
        """Number of classes, for `print(model)`."""
        return f"num_labels={self.num_labels}"
