"""The task of sentence encoders: the cosine of two embeddings against the score of a pair (STS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import DataError
from lowdim.models.sentence_classifier import mean_pool
from lowdim.train.data import Examples, read_examples, split
from lowdim.train.metrics import METRICS, Metric
from lowdim.train.number_scores import number_score
from lowdim.train.tasks.base import Score, Task, check_finite, data_name

__all__ = ["Similarity", "similarity"]


@dataclass(kw_only=True)
class Similarity(Task):
    """Pairs of texts with a score; a text's embedding is the mean of its token states. An outcome is `(score, cosine)`.

    Attributes:
        low, high: the least and the largest score of the training part, which stand for the cosines 0 and 1 when training.
    """

    kind: ClassVar[str] = "similarity"

    low: float
    high: float

    def metrics(self) -> list[Metric]:
        """Rank correlation, which is the usual one, and correlation."""
        return [METRICS["spearman"], METRICS["pearson"]]

    def loss_fn(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean squared difference of the cosine to the score, moved to [0, 1]."""
        wanted = (batch["labels"] - self.low) / (self.high - self.low)
        return F.mse_loss(_cosines(model, batch), wanted.to(torch.float32))

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """The pairs."""
        return len(batch["labels"])

    def outcomes(self, model: nn.Module, batch: dict[str, Tensor], metric: Metric) -> Sequence[Any]:
        """Score and cosine of each pair."""
        found = _cosines(model, batch)
        check_finite(found)
        return list(zip(batch["labels"].tolist(), found.tolist()))

    def score_of(self, outcomes: Sequence[Any], metric: Metric) -> Score:
        """The correlation, and its jackknife value for each pair."""
        truth, answers = (np.array(column) for column in zip(*outcomes))
        value, values = number_score(metric.name, truth, answers)
        return Score(value, tuple(values.tolist()))

    def row_length(self, row: Any) -> int:
        """Tokens of the longer text."""
        return max(len(row["first"]), len(row["second"]))


def similarity(
    tokenizer: Any,
    files: Sequence[str | Path],
    *,
    evaluation: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    max_length: int = 128,
    seed: int = 0,
) -> Similarity:
    """The task from files of pairs with a score.

    Raises:
        DataError, UnknownNameError: see `lowdim.train.data`; single texts, or scores that are all equal.
    """
    how: dict[str, Any] = {"text": text, "label": label, "numbers": True}
    whole = read_examples(files, **how)
    test = None if evaluation is None else read_examples([evaluation], **how)
    if not whole.others or (test is not None and not test.others):
        raise DataError(f"{data_name(files)} has single texts; task similarity needs pairs: name two columns with text")
    parts = split(whole, test=test, seed=seed)
    low, high = min(parts.train.labels), max(parts.train.labels)
    if not high > low:
        raise DataError(f"{data_name(files)}: all scores are {low:g}; nothing can be ranked by them")
    train, chosen, held = (_rows(tokenizer, part, max_length) for part in (parts.train, parts.validation, parts.test))
    return Similarity(
        train=train,
        validation=chosen,
        test=held,
        collate=_Pairs(tokenizer.pad_token_id or 0),
        max_length=max_length,
        notes=(*whole.notes, *parts.notes),
        name=data_name(files),
        columns=whole.columns,
        example=f"{parts.train.texts[0]} | {parts.train.others[0]} -> {parts.train.labels[0]:g}",
        processor=tokenizer,
        low=low,
        high=high,
    )


class _Pairs:
    """All first texts, then all second ones, padded to the longest."""

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [row["first"] for row in rows] + [row["second"] for row in rows]
        ids = torch.full((len(texts), max(map(len, texts))), self.pad)
        mask = torch.zeros_like(ids)
        for i, text in enumerate(texts):
            ids[i, : len(text)] = torch.tensor(text)
            mask[i, : len(text)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([float(row["labels"]) for row in rows])}


def _rows(tokenizer: Any, examples: Examples, max_length: int) -> list[dict[str, Any]]:
    sides = [
        tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        for texts in (examples.texts, examples.others)
    ]
    return [{"first": a, "second": b, "labels": score} for a, b, score in zip(*sides, examples.labels)]


def _cosines(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"]
    states = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    first, second = mean_pool(states, mask).float().chunk(2)
    return F.cosine_similarity(first, second)
