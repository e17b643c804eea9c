"""A new classification head starts as a logistic regression on the frozen model's features.

All methods then start from the same useful point, and a short run measures the method instead of how fast a random head
converges (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
ICLR 2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowdim.surgery import model_device
from lowdim.train.metrics import science
from lowdim.train.tasks import Task

__all__ = ["fit_head"]

_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)  # inverse L2 penalties, chosen on the validation part


@torch.no_grad()
def fit_head(model: nn.Module, head: tuple[str, ...], task: Task) -> float | None:
    """Fit the head in place, in one pass over the training and validation parts.

    Only a single linear layer over one feature vector per text is fitted; other heads keep their random start.

    Returns:
        The validation accuracy of the frozen model with this head; None if nothing was fitted.
    """
    layer = model.get_submodule(head[0]) if len(head) == 1 else None
    if task.kind != "classify" or not isinstance(layer, nn.Linear):
        return None
    seen = {}
    for name in ("train", "validation"):
        seen[name] = _features(model, layer, task, getattr(task, name))
        if seen[name] is None:
            return None
    regression = science("sklearn.linear_model", "fitting the head").LogisticRegression
    (x, y), (x_val, y_val) = seen["train"], seen["validation"]
    centre, scale = x.mean(0), x.std(0).mean().clamp_min(1e-12)
    best: tuple[float, Any] = (-1.0, None)
    for strength in _STRENGTHS:
        fitted = regression(C=strength, max_iter=2000).fit(((x - centre) / scale).numpy(), y.numpy())
        score = float(fitted.score(((x_val - centre) / scale).numpy(), y_val.numpy()))
        if score > best[0]:
            best = (score, fitted)
    weight, bias = torch.tensor(best[1].coef_), torch.tensor(best[1].intercept_)
    if len(weight) == 1:  # two classes: scikit-learn keeps one row, the logit of the second
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight / scale
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias - weight @ centre.to(weight.dtype))
    return best[0]


def _features(model: nn.Module, layer: nn.Module, task: Task, part: Any) -> tuple[Tensor, Tensor] | None:
    rows: list[Tensor] = []
    labels: list[int] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].detach().float().cpu()))
    device, training = model_device(model), model.training
    model.eval()
    order = sorted(range(len(part)), key=lambda i: len(part[i]["input_ids"]))
    try:
        for start in range(0, len(order), task.evaluation_batch):
            batch = task.collate([part[i] for i in order[start : start + task.evaluation_batch]])
            labels += batch["labels"].tolist()
            model(**{key: value.to(device) for key, value in batch.items()})
    finally:
        handle.remove()
        model.train(training)
    features = torch.cat(rows) if rows and all(r.ndim == 2 for r in rows) else None
    if features is None or len(features) != len(labels):
        return None
    return features, torch.tensor(labels)
