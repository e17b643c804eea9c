"""Losses that keep the features of a new model compatible with those of an old one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_float
from lowdim.linalg import wide, without_autocast

__all__ = ["HOCLoss", "StationaryLoss"]


class HOCLoss(nn.Module):
    """Contrastive loss of an old model's features against a new one's, of the same images.

    Formula: with `ĝ, f̂` old and new at length 1 and `s_nm = μ ĝ_n·f̂_m`,
    `L = mean_n [-s_nn + log Σ_m exp(s_nm 1[y_n ≠ y_m])]`. Entries of the same class, the diagonal too, count `exp(0) = 1`;
    with `exclude_same_class`, instead,
    `mean_n [-s_nn + log(e^{s_nn} + Σ_{m: y_m ≠ y_n} e^{s_nm})]`.

    Args:
        mu: μ, the inverse temperature.
        exclude_same_class: the textbook form.

    Shapes: new and old `(B, n)`, labels `(B,)`; a scalar, in float32 or better.

    Raises:
        ValueError: `mu <= 0`; new and old of unlike shape, labels of another length, an empty batch.

    Example:
        >>> import torch
        >>> from lowdim.represent import HOCLoss
        >>> x = torch.eye(2)
        >>> f"{HOCLoss(mu=10.0)(x, x, torch.tensor([0, 1])).item():.4f}"  # -10 + log(1 + 1)
        '-9.3069'

    Source: Biondi et al., CVPR 2024, arXiv 2405.02581, and the authors' program. Negatives are those of the batch at hand, with
    data parallelism those of one process.
    """

    def __init__(self, mu: float = 10.0, *, exclude_same_class: bool = False):
        super().__init__()
        check_float("mu", mu, 0.0, low_open=True)
        self.mu, self.exclude_same_class = mu, exclude_same_class

    def forward(
        self,
        new: Tensor,  # (B, n)
        old: Tensor,  # (B, n)
        labels: Tensor,  # (B,)
    ) -> Tensor:
        """The mean over old features; give `old` without gradient."""
        if new.ndim != 2 or new.shape != old.shape:
            raise ValueError(f"new and old must have the same shape (B, n); got {tuple(new.shape)} and {tuple(old.shape)}")
        if labels.shape != new.shape[:1]:
            raise ValueError(f"labels must have shape ({len(new)},), one for each row; got {tuple(labels.shape)}")
        if len(new) == 0:
            raise ValueError("new must hold at least one row; got none")
        with without_autocast(new.device.type):
            scores = self.mu * F.normalize(wide(old), dim=1) @ F.normalize(wide(new), dim=1).T
        same = labels[:, None] == labels[None]
        own = scores.diagonal()
        if self.exclude_same_class:
            others = scores.masked_fill(same & ~torch.eye(len(new), dtype=torch.bool, device=new.device), -torch.inf)
        else:
            others = scores.masked_fill(same, 0.0)
        return (others.logsumexp(1) - own).mean()

    def extra_repr(self) -> str:
        """Options, for `print(model)`."""
        return f"mu={self.mu}, exclude_same_class={self.exclude_same_class}"


class StationaryLoss(nn.Module):
    """Cross entropy against the fixed vertices, and the HOC loss where there is an old model.

    Formula: `L = λ CE(logits, y) + (1 - λ) L_HOC`; without an old model `L = CE`.

    Args:
        mu: of the HOC loss.
        ce_weight: λ, in [0, 1].

    Shapes: logits `(B, K)`, target `(B,)`, new and old `(B, K - 1)`; a scalar, in float32 or better.

    Raises:
        ValueError: `ce_weight` outside [0, 1]; only one of new and old; shapes as in HOCLoss.

    Example:
        >>> import torch
        >>> from lowdim.represent import DSimplexClassifier, StationaryLoss
        >>> classifier, loss_fn = DSimplexClassifier(4), StationaryLoss()
        >>> new, old, y = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 2, 2])
        >>> loss = loss_fn(classifier(new), classifier.targets(y), new, old)

    The recipe of the authors: SGD with momentum 0.9, rate 1e-3 falling to 1e-5 by a cosine, 70 epochs, batches of 128, weight
    decay 5e-4 (none on vectors), 20 images of each earlier class replayed.

    Source: Biondi et al., CVPR 2024, arXiv 2405.02581.
    """

    def __init__(self, mu: float = 10.0, ce_weight: float = 0.1):
        super().__init__()
        check_float("ce_weight", ce_weight, 0.0, 1.0)
        self.ce_weight, self.hoc = ce_weight, HOCLoss(mu)

    def forward(
        self,
        logits: Tensor,  # (B, K)
        target: Tensor,  # (B,)
        new: Tensor | None = None,  # (B, K - 1)
        old: Tensor | None = None,  # (B, K - 1)
    ) -> Tensor:
        """The weighted sum."""
        if (new is None) != (old is None):
            raise ValueError(f"new and old must be given together; got only {'old' if new is None else 'new'}")
        entropy = F.cross_entropy(wide(logits), target)
        if new is None or old is None:
            return entropy
        return self.ce_weight * entropy + (1 - self.ce_weight) * self.hoc(new, old, target)

    def extra_repr(self) -> str:
        """Options, for `print(model)`."""
        return f"ce_weight={self.ce_weight}"
