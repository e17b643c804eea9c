"""The MiniLM sentence encoder for reproductions: loading it, and its sentence embeddings."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.models import load_model, load_tokenizer
from lowdim.models.sentence_classifier import SentenceClassifier, mean_pool
from lowdim.reproduce.settings.outcome import Context
from lowdim.train.metrics import science

__all__ = [
    "ENCODER_LINEARS",
    "StsPairs",
    "load_minilm",
    "sentence_embeddings",
    "sts_benchmark",
    "sts_spearman",
    "subjectivity",
    "tokenized",
]

StsPairs = tuple[list[str], list[str], Tensor]

#: Pattern of the 36 linear layers of its encoder.
ENCODER_LINEARS = r"encoder\..*"


def load_minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 in float32 and evaluation mode, and its tokenizer.

    Raises:
        MissingExtraError: transformers or the package that holds the weights is not installed.
    """
    model = load_model("minilm", "classify")
    assert isinstance(model, SentenceClassifier)
    return model.encoder.eval(), load_tokenizer("minilm")


def tokenized(tokenizer: Any, sentences: Sequence[str], *, batch_size: int = 32, length: int = 128) -> list[dict[str, Tensor]]:
    """Batches of token ids and masks, each padded to its own longest sentence."""
    batches = []
    for start in range(0, len(sentences), batch_size):
        part = list(sentences[start : start + batch_size])
        batches.append(dict(tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt")))
    return batches


@torch.no_grad()
def sentence_embeddings(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Mean of the token states under the mask, at length 1: `(sentences, width)`."""
    rows = []
    for batch in batches:
        pooled = mean_pool(model(**batch).last_hidden_state, batch["attention_mask"])
        rows.append(F.normalize(pooled, dim=-1))
    return torch.cat(rows)


def subjectivity(context: Context) -> tuple[list[str], list[str]]:
    """The 5,000 objective and 5,000 subjective sentences of the subjectivity corpus (Pang and Lee, 2004)."""
    path = context.file("classification/nltk/subjectivity.zip", "nltk/nltk_data, packages/corpora")
    with zipfile.ZipFile(path) as archive:
        texts = [archive.read(f"subjectivity/{kind}.tok.gt9.5000").decode("latin-1") for kind in ("plot", "quote")]
    objective, subjective = ([line.strip() for line in text.splitlines() if line.strip()] for text in texts)
    return objective, subjective


def sts_benchmark(context: Context, part: str, count: int | None = None) -> StsPairs:
    """Sentences, sentences, and scores from 0 to 5 of a part (`"train"`, `"dev"`, `"test"`) of the STS benchmark."""
    path = context.file(f"similarity/stsbenchmark/sts-{part}.csv", "STS benchmark, ixa2.si.ehu.eus/stswiki")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:count]
    return [row[5] for row in rows], [row[6] for row in rows], torch.tensor([float(row[4]) for row in rows])


def sts_spearman(model: nn.Module, sides: Sequence[Sequence[dict[str, Tensor]]], scores: Tensor) -> float:
    """Spearman correlation (x 100) of the cosines of two sides with the scores."""
    one, two = (sentence_embeddings(model, side) for side in sides)
    return 100 * float(science("scipy.stats", "a rank correlation").spearmanr((one * two).sum(-1).numpy(), scores.numpy())[0])
