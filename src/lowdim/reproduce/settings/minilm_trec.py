"""The setting that several adapters' reproductions share: MiniLM's last two layers on TREC question classification.

The lower four layers are frozen in every run, so their output is computed once. The head is a logistic regression on the
features of the first 200 questions, frozen, so only the adapters learn. Rates are picked on 500 further training questions; the
test questions are used only for the picked rate.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowdim
from lowdim.adapters import Adapted, LaMDA, LoRA, Method
from lowdim.adapters.lamda import LaMDAUpdate
from lowdim.errors import MissingExtraError
from lowdim.reproduce.settings.data import trec
from lowdim.reproduce.settings.minilm import load_minilm
from lowdim.reproduce.settings.outcome import Context

__all__ = ["Score", "Setting", "best_rate", "load_setting"]

TRAIN, DEV, PROBE, TOKENS, LAYERS = 2000, 500, 200, 16, 2
BATCH, STEPS = 16, 80
TARGETS = ["query", "value"]


@dataclass(frozen=True)
class Split:
    """Hidden states below the adapted layers, masks and labels."""

    hidden: Tensor  # (questions, tokens, width)
    mask: Tensor  # (questions, tokens), bool
    labels: Tensor  # (questions,)


class Top(nn.Module):
    """The last layers, mean pooling and the frozen head: `(hidden, mask) -> logits`."""

    def __init__(self, layers: nn.ModuleList, head: nn.Linear):
        super().__init__()
        self.layer, self.classifier = layers, head

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Mean over the real tokens."""
        seen = mask[:, None, None, :]
        for layer in self.layer:
            out = layer(hidden, attention_mask=seen)
            hidden = out[0] if isinstance(out, tuple) else out
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.pooled(hidden, mask))


@dataclass(frozen=True)
class Score:
    """The result of one method: means over seeds at the rate chosen on the development questions."""

    method: str
    lr: float
    accuracy: float
    loss: float
    deviation: float  # of the accuracy over seeds
    trained: int
    updates_per_step: float

    def row(self) -> dict[str, Any]:
        """A line of the table."""
        return {
            "method": self.method,
            "rate": self.lr,
            "test accuracy": round(self.accuracy, 4),
            "deviation over seeds": round(self.deviation, 4),
            "test loss": round(self.loss, 4),
            "trained numbers": self.trained,
            "updates per step": round(self.updates_per_step),
        }


class Setting:
    """The cached data and the part of the model that is trained."""

    def __init__(self, top: Top, train: Split, dev: Split, test: Split):
        self.top, self.train, self.dev, self.test = top, train, dev, test

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `count` training questions."""
        return self.train.hidden[:count], self.train.mask[:count], self.train.labels[:count]

    def run(self, method: Method, lr: float, seed: int, steps: int = STEPS) -> tuple[Adapted, float]:
        """Train one adapter; returns it and the mean number of updated parameters per step."""
        model = copy.deepcopy(self.top).eval()
        with torch.enable_grad():
            adapted = lowdim.adapt(model, method, seed=seed, batches=[self.batch(64)], loss_fn=_loss)
            optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=lr, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            order = torch.randperm(len(self.train.labels), generator=torch.Generator().manual_seed(seed))
            updates = 0
            for step in range(steps):
                rows = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
                optimizer.zero_grad()
                _loss(model, (self.train.hidden[rows], self.train.mask[rows], self.train.labels[rows])).backward()
                updates += _updated(adapted)
                optimizer.step()
                schedule.step()
                adapted.step()
        return adapted, updates / steps


def load_setting(context: Context) -> Setting:
    """Read model and data, run the frozen lower layers once, fit the head.

    Raises:
        MissingExtraError: transformers, scikit-learn or the MiniLM package is missing.
        DataError: the TREC files do not exist.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "science", "the frozen head") from error
    train_texts, train_labels, test_texts, test_labels = trec(context)
    encoder, tokenizer = load_minilm()
    model: Any = encoder
    layers = model.encoder.layer
    lower, model.encoder.layer = layers, layers[: len(layers) - LAYERS]

    def split(texts: list[str], labels: list[int]) -> Split:
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        with torch.no_grad():
            parts = [
                model(input_ids=ids, attention_mask=mask).last_hidden_state
                for ids, mask in zip(found["input_ids"].split(100), found["attention_mask"].split(100))
            ]
        return Split(torch.cat(parts), found["attention_mask"].bool(), torch.tensor(labels))

    train_size, dev_size, test_size = (400, 100, 100) if context.quick else (TRAIN, DEV, len(test_texts))
    stop = train_size + dev_size
    train = split(train_texts[:train_size], train_labels[:train_size])
    dev = split(train_texts[train_size:stop], train_labels[train_size:stop])
    test = split(test_texts[:test_size], test_labels[:test_size])
    classes = max(train_labels) + 1
    top = Top(lower[len(lower) - LAYERS :], nn.Linear(train.hidden.shape[-1], classes)).eval()
    with torch.no_grad():
        features = top.pooled(train.hidden[:PROBE], train.mask[:PROBE])
        probe = LogisticRegression(C=0.05, max_iter=1000).fit(features.numpy(), train.labels[:PROBE].numpy())
        if list(probe.classes_) != list(range(classes)):
            raise ValueError(f"the first {PROBE} questions do not hold every class; got {list(probe.classes_)}")
        top.classifier.weight.copy_(torch.from_numpy(probe.coef_))
        top.classifier.bias.copy_(torch.from_numpy(probe.intercept_))
    return Setting(top, train, dev, test)


def best_rate(context: Context, setting: Setting, name: str, make: Callable[[float], Method], rates: Sequence[float]) -> Score:
    """Train at each rate and seed, pick the rate by the development loss, and test at that rate."""
    seeds, steps = (range(1), 8) if context.quick else (range(3), STEPS)
    tried: list[tuple[float, float, list[tuple[Adapted, float]]]] = []
    for lr in rates:
        runs = [setting.run(make(lr), lr, seed, steps) for seed in seeds]
        dev = [evaluate(adapted.model, setting.dev) for adapted, _ in runs]
        loss = statistics.mean(loss for _, loss in dev)
        context.say(f"{name} at {lr:g}: development accuracy {statistics.mean(a for a, _ in dev):.4f}, loss {loss:.4f}")
        tried.append((loss, lr, runs))
    _, lr, runs = min(tried, key=lambda entry: entry[0])
    results = [evaluate(adapted.model, setting.test) for adapted, _ in runs]
    accuracies = [accuracy for accuracy, _ in results]
    return Score(
        name,
        lr,
        statistics.mean(accuracies),
        statistics.mean(loss for _, loss in results),
        statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        sum(p.numel() for p in runs[0][0].trainable().values()),
        statistics.mean(updates for _, updates in runs),
    )


def lora_baseline(context: Context, setting: Setting) -> Score:
    """LoRA of rank 8, alpha 16."""
    return best_rate(
        context, setting, "LoRA rank 8", lambda lr: LoRA(rank=8, alpha=16, target_modules=TARGETS), (1e-3, 3e-3, 1e-2)
    )


def probe_accuracy(setting: Setting) -> float:
    """The frozen head on the untouched model."""
    return evaluate(setting.top, setting.test)[0]


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Accuracy and mean loss."""
    logits = torch.cat([model(h, m) for h, m in zip(split.hidden.split(100), split.mask.split(100))])
    return float((logits.argmax(1) == split.labels).float().mean()), float(F.cross_entropy(logits, split.labels))


def steps_of(context: Context) -> int:
    """Optimizer steps of one run."""
    return 8 if context.quick else STEPS


def _loss(model: nn.Module, batch: Iterable[Tensor]) -> Tensor:
    hidden, mask, labels = batch
    return F.cross_entropy(model(hidden, mask), labels)


def _updated(adapted: Adapted) -> int:
    held = 0
    if isinstance(adapted.method, LaMDA):
        for layer in adapted.layers.values():
            update = layer.update
            assert isinstance(update, LaMDAUpdate)
            held += update.frozen_columns() * update.out_features
    return sum(p.numel() for p in adapted.trainable().values()) - held
