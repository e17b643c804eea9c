"""Task embed: pairs of texts, with or without scores, and triplets; the model is one of sentence-transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import DataError, cut
from lowdim.methods.nesting import nested_sizes
from lowdim.train.metrics import METRICS, Metric
from lowdim.train.number_scores import number_score
from lowdim.train.parts import Rows, divide
from lowdim.train.repeats import same_text
from lowdim.train.tasks.base import Score, Task, check_finite, data_name
from lowdim.train.tasks.labelled import Pad
from lowdim.train.text_pairs import TextPairs, read_pairs

if TYPE_CHECKING:
    from lowdim.calibrate import LossFn
    from lowdim.catalogue import Variant

__all__ = ["Embedding", "embedded", "embedding"]

_DEPTH = 10  # of ndcg
_BLOCK = 1 << 22  # scores at once

#: A row's token ids, one list for each text, and its score.
Row = dict[str, Any]


@dataclass(kw_only=True)
class Embedding(Task):
    """Rows of two or three texts; an outcome is `(score, key of the second text, embeddings of the first two)`.

    Attributes:
        scored: whether rows have scores: CoSENT is trained and Spearman's correlation measured; else each text's partner is
            found among those of the batch (MultipleNegativesRanking), and ndcg@10 among those of the part.
        pairs: `(layers, dimensions)` that are trained besides the whole: with all layers Matryoshka, else Starbucks.
    """

    kind: ClassVar[str] = "embed"

    scored: bool
    pairs: tuple[tuple[int, int], ...] = field(default=())

    def metrics(self) -> list[Metric]:
        """Spearman's correlation of scored pairs, ndcg@10 of others."""
        return [METRICS["spearman" if self.scored else "ndcg@10"]]

    @property
    def subject(self) -> str:
        """What the rows are."""
        return "embed with scored pairs" if self.scored else "embed with pairs that have no score"

    def loss_fn(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """sentence-transformers' loss, at each of `pairs` where there are some."""
        return self._loss(model, self.pairs)(_columns(batch), batch["labels"])

    def loss_for(self, variant: Variant) -> LossFn:
        """The loss at each of the method's sizes; those of the recipe where it has some."""
        if not variant.nested:
            return self.loss_fn

        def nested(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return self._loss(model, self._sizes(model, variant))(_columns(batch), batch["labels"])

        return nested

    def smaller(self, model: nn.Module, variants: Iterable[Variant]) -> tuple[tuple[int, int], ...]:
        """All sizes of the methods but the whole, the smallest first."""
        return tuple(sorted({size for each in variants if each.nested for size in self._sizes(model, each)[:-1]}))

    def at_sizes(self, model: nn.Module, sizes: Sequence[tuple[int, int]], metric: Metric) -> list[dict[str, Any]]:
        """The model's score at each of the sizes."""
        from lowdim.represent import shrink_encoder

        return [
            {
                "layers": layers,
                "dimensions": dim,
                "score": self.evaluate(shrink_encoder(model, layers, dim), self.test, metric),
            }
            for layers, dim in sizes
        ]

    def _sizes(self, model: nn.Module, variant: Variant) -> tuple[tuple[int, int], ...]:
        from lowdim.represent.starbucks.encoder import encoder_of, layer_list, sentence_model, width_of

        plain = sentence_model(model, variant.label)
        return nested_sizes(variant.nested, len(layer_list(encoder_of(plain))[2]), width_of(plain), self.pairs)

    def count_items(self, batch: dict[str, Tensor]) -> int:
        """Rows."""
        return len(batch["labels"])

    def row_length(self, row: Row) -> int:
        """Tokens of the longest text."""
        return max(map(len, row["texts"]))

    def outcomes(self, model: nn.Module, batch: dict[str, Tensor], metric: Metric) -> list[Any]:
        """Score, key and embeddings of each row."""
        columns = _columns(batch)[:2]
        one, two = (self._embedded(model, features) for features in columns)
        keys = [row[mask > 0].tobytes() for row, mask in zip(*(columns[1][key].cpu().numpy() for key in _INPUTS))]
        return list(zip(batch["labels"].tolist(), keys, one, two, strict=True))

    def score_of(self, outcomes: Sequence[Any], metric: Metric) -> Score:
        """The metric, from the cosines of embeddings."""
        labels, keys, *sides = zip(*outcomes)
        a, b = (F.normalize(torch.from_numpy(np.stack(side)).double(), dim=1) for side in sides)
        if metric.name == "spearman":
            value, values = number_score("spearman", np.array(labels), (a * b).sum(1).numpy())
        else:
            gains = _gains(a, b, keys)
            value, values = float(gains.mean()), gains
        return Score(value, tuple(values.tolist()))

    def finish(self, model: nn.Module, head: tuple[str, ...]) -> str | None:
        """The scores of the test part by (layers, dimensions), in one line; the model stays as it is."""
        if not self.pairs:
            return None
        metric = self.metrics()[0]
        rows = self.at_sizes(model, self.pairs, metric)
        found = [f"({row['layers']}, {row['dimensions']}) {row['score']:.4f}" for row in rows]
        return f"test {metric.title} by (layers, dimensions): {', '.join(found)}"

    def _loss(self, model: nn.Module, pairs: Sequence[tuple[int, int]]) -> nn.Module:
        from sentence_transformers.sentence_transformer import losses

        from lowdim.represent import StarbucksLoss

        base: Any = (losses.CoSENTLoss if self.scored else losses.MultipleNegativesRankingLoss)(model)  # type: ignore[arg-type]
        if not pairs:
            return base
        if len({layers for layers, _ in pairs}) == 1:
            return losses.MatryoshkaLoss(model, base, [dim for _, dim in pairs])  # type: ignore[arg-type]
        return StarbucksLoss(model, base, pairs)

    def _embedded(self, model: Any, features: dict[str, Tensor]) -> np.ndarray:
        found = embedded(model, features).float()
        check_finite(found)
        return found.cpu().numpy()


_INPUTS = ("input_ids", "attention_mask")


def embedded(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The embeddings `(B, n)` that a model of sentence-transformers gives the texts of a batch, at its `truncate_dim`."""
    found = model({name: batch[name] for name in _INPUTS})["sentence_embedding"]
    return found[:, : getattr(model, "truncate_dim", None)]


def load(recipe: Any, processor: Any, **keywords: Any) -> Task:
    """The task of a recipe; where it replaces a model, that of `lowdim.train.tasks.replace`."""
    if recipe.replaces is not None:
        from lowdim.train.tasks.replace import replacing

        return replacing(
            processor, recipe.data, recipe.replaces, label=recipe.label, separator=recipe.label_separator, **keywords
        )
    pairs = None if recipe.sizes is None else tuple(map(tuple, recipe.sizes))
    return embedding(processor, recipe.data, label=recipe.label, pairs=pairs, model=recipe.model, **keywords)


def embedding(
    tokenizer: Any,
    files: Sequence[str | Path],
    *,
    evaluation: str | Path | None = None,
    validation: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    max_length: int = 128,
    most: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    pairs: Sequence[tuple[int, int]] | None = None,
    model: str | None = None,
) -> Embedding:
    """An embedding task from files of pairs, scored pairs or triplets.

    Args:
        evaluation, validation: separate files; otherwise parts of the data are held out.
        text, label: columns, as in `lowdim.train.text_pairs.read_pairs`.
        max_length, most: tokens kept of each text, and that the model can read.
        seed: of the split.
        limit: training rows at most.
        pairs: `(layers, dimensions)` to train besides the whole.
        model: whose layers and dimensions the last of `pairs` is.

    Raises:
        DataError, UnknownNameError: see `read_pairs`; too few rows. ValueError: pairs that the model does not have.
    """
    length = max_length if most is None else min(max_length, most)
    own = [None if file is None else read_pairs([file], text=text, score=label) for file in (validation, evaluation)]
    read = [part for part in (read_pairs(files, text=text, score=label), *own) if part is not None]
    if len({part.kind for part in read}) > 1:
        raise DataError(f"the files hold {' and '.join(sorted({part.kind for part in read}))}; name files of one kind")
    starts = np.cumsum([0, *map(len, read)]).tolist()
    places = iter(range(1, len(read)))
    apart = [None if part is None else range(starts[i := next(places)], starts[i + 1]) for part in own]
    rows, keys, cut_count = _rows(tokenizer, read, length)
    divided = divide(Rows(keys, [0] * len(rows), noun="pairs"), validation=apart[0], test=apart[1], seed=seed)
    train = divided.train[:limit]
    notes = [note for part in read for note in part.notes] + list(divided.notes)
    if cut_count:
        notes.append(f"{cut_count} texts are longer than {length} tokens and were cut")
    example = " | ".join(tokenizer.decode(ids) for ids in rows[train[0]]["texts"])
    return Embedding(
        train=[rows[i] for i in train],
        validation=[rows[i] for i in divided.validation],
        test=[rows[i] for i in divided.test],
        collate=_Collate(Pad.of(tokenizer)),
        max_length=length,
        notes=tuple(notes),
        name=data_name(files),
        columns=tuple(used for part in read for used in part.used),
        example=cut(example, 160),
        processor=tokenizer,
        scored=read[0].scores is not None,
        pairs=() if pairs is None else _whole_last(pairs, model),
    )


def _whole_last(pairs: Sequence[tuple[int, int]], model: str | None) -> tuple[tuple[int, int], ...]:
    """The pairs, and the whole model as the last one."""
    from lowdim.models import load_config

    given = tuple((layers, dim) for layers, dim in pairs)
    if model is None:
        return given
    config = load_config(model)
    whole = (config.num_hidden_layers, config.hidden_size)
    return given if given and given[-1] == whole else (*given, whole)


def _rows(tokenizer: Any, read: Sequence[TextPairs], length: int) -> tuple[list[Row], list[bytes], int]:
    """Rows of token ids, a key of each row's texts, and how many texts were cut."""
    rows: list[Row] = []
    keys: list[bytes] = []
    longer = 0
    for part in read:
        ids = []
        for column in part.columns:
            whole = tokenizer(column, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
            longer += sum(len(each) > length for each in whole)
            ids.append(tokenizer(column, truncation=True, max_length=length)["input_ids"])
        scores = part.scores if part.scores is not None else [0.0] * len(part)
        rows += [{"texts": list(texts), "label": score} for texts, score in zip(zip(*ids), scores, strict=True)]
        keys += [same_text(*texts) for texts in zip(*part.columns)]
    return rows, keys, longer


class _Collate:
    """All texts of a batch as one block, column after column, padded to the longest."""

    def __init__(self, pad: Pad):
        self.pad = pad

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        texts = [row["texts"][column] for column in range(len(rows[0]["texts"])) for row in rows]
        block = self.pad([{"input_ids": text, "labels": 0} for text in texts])
        return {**block, "labels": torch.tensor([row["label"] for row in rows])}


def _columns(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The features of each column."""
    count = len(batch["labels"])
    parts = zip(*(batch[name].split(count) for name in _INPUTS))
    return [dict(zip(_INPUTS, part)) for part in parts]


def _gains(a: Tensor, b: Tensor, keys: Sequence[bytes]) -> np.ndarray:
    """`1 / log2(1 + rank)` of each row's partner among the different second texts, 0 below rank 10."""
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    held = torch.tensor(sorted(first.values()))
    place = {int(i): p for p, i in enumerate(held)}
    own = torch.tensor([place[first[key]] for key in keys])
    ranks = []
    for part, answers in zip(a.split(max(1, _BLOCK // len(held))), own.split(max(1, _BLOCK // len(held)))):
        scores = part @ b[held].T
        ranks.append((scores >= scores.gather(1, answers[:, None])).sum(1))  # of equals the last
    rank = torch.cat(ranks).double()
    return torch.where(rank <= _DEPTH, math.log(2) / torch.log1p(rank), 0.0).numpy()
