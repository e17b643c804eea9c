"""A new head starts as a regression on the frozen model's features: logistic for classes, ridge for numbers.

All methods then start from the same useful point, and a short run measures the method instead of how fast a random head
converges (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
ICLR 2022).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.surgery import model_device
from lowdim.train.metrics import science
from lowdim.train.number_scores import number_score
from lowdim.train.tasks.base import Task

__all__ = ["fit_head", "head_sentence"]

_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)  # inverse L2 penalties, chosen on the validation part
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # L2 penalties of a ridge regression, times the rows

#: Weight, bias, how good they are on the validation part (to choose by), and the score to report.
_Fit = tuple[Tensor, Tensor, float, float]


@torch.no_grad()
def fit_head(model: nn.Module, head: tuple[str, ...], task: Task) -> float | None:
    """Fit the head in place, in one pass over the training and validation parts.

    Only a single linear layer over one feature vector per row is fitted; other heads keep their random start.

    Returns:
        The frozen model's score with this head on the validation part: accuracy, of several classes that of whole rows, of
        numbers the rank correlation; None if nothing was fitted.
    """
    layer = _only_layer(model.get_submodule(head[0])) if len(head) == 1 else None
    kind = _KINDS.get(task.problem) if task.kind in ("classify", "image", "regress") else None
    if kind is None or not isinstance(layer, nn.Linear):
        return None
    seen = {}
    for name in ("train", "validation"):
        seen[name] = _features(model, layer, task, getattr(task, name))
        if seen[name] is None:
            return None
    (x, y), (x_val, y_val) = seen["train"], seen["validation"]
    centre, scale = x.mean(0), x.std(0).mean().clamp_min(1e-12)
    weight, bias, _, score = kind((x - centre) / scale, y, (x_val - centre) / scale, y_val)
    weight = weight / scale
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias - weight @ centre.to(weight.dtype))
    return score


def _only_layer(head: nn.Module) -> nn.Module | None:
    """The one module of a head that has parameters: some heads are a sequence of pooling, flattening and a linear layer."""
    found = [module for module in head.modules() if next(module.parameters(recurse=False), None) is not None]
    return found[0] if len(found) == 1 else None


def head_sentence(task: Task, score: float) -> str:
    """How the head starts, after `fit_head`."""
    what = "ridge" if task.problem == "regression" else "logistic"
    metric = "rank correlation" if task.problem == "regression" else "accuracy"
    return f"starts as a {what} regression on the frozen model's features: validation {metric} {score:.3f}"


def _classes(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor) -> _Fit:
    """A logistic regression."""
    regression = science("sklearn.linear_model", "fitting the head").LogisticRegression
    best: tuple[float, Any] = (-1.0, None)
    for strength in _STRENGTHS:
        fitted = regression(C=strength, max_iter=2000).fit(x.numpy(), y.numpy())
        score = float(fitted.score(x_val.numpy(), y_val.numpy()))
        if score > best[0]:
            best = (score, fitted)
    weight, bias = torch.tensor(best[1].coef_), torch.tensor(best[1].intercept_)
    if len(weight) == 1:  # two classes: scikit-learn keeps one row, the logit of the second
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias, best[0], best[0]


def _several(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor) -> _Fit:
    """A logistic regression for each class; a class that all rows have, or none, is answered by its odds."""
    regression = science("sklearn.linear_model", "fitting the head").LogisticRegression

    def fit(strength: float) -> _Fit:
        weight = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64)
        count = y.double().sum(0)
        bias = torch.log((count + 0.5) / (len(y) - count + 0.5))
        for k in range(y.shape[1]):
            if 0 < count[k] < len(y):
                fitted = regression(C=strength, max_iter=2000).fit(x.numpy(), y[:, k].numpy())
                weight[k], bias[k] = torch.tensor(fitted.coef_[0]), float(fitted.intercept_[0])
        logits = x_val.double() @ weight.T + bias
        loss = F.binary_cross_entropy_with_logits(logits, y_val.double())
        return weight, bias, -float(loss), float(((logits > 0) == (y_val > 0)).all(1).double().mean())

    return max(map(fit, _STRENGTHS), key=lambda found: found[2])


def _number(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor) -> _Fit:
    """A ridge regression: `w = V s (Uᵀ y) / (s² + n penalty)` by the singular values of the centred features."""
    x, y, x_val, y_val = (part.double() for part in (x, y, x_val, y_val))
    mean = y.mean()
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    projected = u.T @ (y - mean)

    def fit(penalty: float) -> _Fit:
        weight = vt.T @ (s * projected / (s * s + len(x) * penalty))
        answers = x_val @ weight + mean
        rank, _ = number_score("spearman", y_val.numpy(), answers.numpy())
        return weight[None], mean[None], -float(F.mse_loss(answers, y_val)), rank

    found = max(map(fit, _RIDGES), key=lambda found: found[2])
    return found if math.isfinite(found[2]) else (torch.zeros_like(found[0]), mean[None], 0.0, 0.0)


_KINDS = {None: _classes, "multi_label_classification": _several, "regression": _number}


def _features(model: nn.Module, layer: nn.Module, task: Task, part: Any) -> tuple[Tensor, Tensor] | None:
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].detach().float().cpu()))
    device, training = model_device(model), model.training
    model.eval()
    order = sorted(range(len(part)), key=lambda i: task.row_length(part[i]))
    try:
        for start in range(0, len(order), task.evaluation_batch):
            batch = task.collate([part[i] for i in order[start : start + task.evaluation_batch]])
            labels.append(batch["labels"])
            model(**{key: value.to(device) for key, value in batch.items()})
    finally:
        handle.remove()
        model.train(training)
    features = torch.cat(rows) if rows and all(r.ndim == 2 for r in rows) else None
    found = torch.cat(labels)
    return None if features is None or len(features) != len(found) else (features, found)
