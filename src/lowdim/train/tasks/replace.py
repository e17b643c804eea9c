"""Task embed where a model is replaced: labelled texts, whose new vectors are drawn to the old model's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from lowdim.checksums import checksum
from lowdim.errors import DataError, shown
from lowdim.files import whole_folder, write_tensors, write_text
from lowdim.train.embedding_files import read_vectors
from lowdim.train.metrics import METRICS, Metric
from lowdim.train.replacing import Replaces
from lowdim.train.tasks.base import Score, Task, check_finite, data_name
from lowdim.train.tasks.embed import embedded
from lowdim.train.tasks.labelled import Pad, Reading, labelled_parts

if TYPE_CHECKING:
    from lowdim.represent import ReplacementReport

__all__ = ["Replacement", "Replacing", "replacing"]


@dataclass(frozen=True)
class Replacement:
    """What a trained model's vectors find in the old index: training texts are the gallery, those of the test part ask.

    Attributes:
        report: of `lowdim.represent.replacement_report`.
        old, new: vectors `(N, n)` of both models; the texts of the gallery come first.
        labels: the class of each, by its name.
        asks: which of them ask.
        replaced: the name of the old model, or of the file of its vectors.
    """

    report: ReplacementReport
    old: Tensor
    new: Tensor
    labels: tuple[str, ...]
    asks: np.ndarray
    replaced: str

    def to_dict(self) -> dict[str, Any]:
        """For records: the report, and what is replaced."""
        return {**self.report.to_dict(), "old": self.replaced}

    def write(self, folder: Path) -> None:
        """Write what `lowdim index-check` reads: `vectors.safetensors` (old, new) and `items.jsonl` (label, asks)."""
        rows = [{"label": label, "asks": bool(asks)} for label, asks in zip(self.labels, self.asks)]
        with whole_folder(folder) as draft:
            write_tensors(draft / "vectors.safetensors", {"old": self.old, "new": self.new})
            write_text(draft / "items.jsonl", "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


@dataclass(kw_only=True)
class Replacing(Task):
    """Texts with a class each; an outcome is `(class, new vector)`.

    Formula: `L = ce_weight CE(f V^T, y) + (1 - ce_weight) L_HOC(f, g)`, f and g a text's new and old vector, V the vertices of
    a simplex (`lowdim.represent.StationaryLoss`). The score is the share of texts whose new vector is nearest to the template
    of their class, the mean of the old vectors of its training texts.

    Attributes:
        replaces: the key of the recipe.
        old: `(N, n)`, the old vectors by the rows' `place`.

    Source: Biondi et al., CVPR 2024, arXiv 2405.02581.
    """

    kind: ClassVar[str] = "embed"

    replaces: Replaces
    old: Tensor
    _classifier: Any = field(default=None, repr=False)

    def metrics(self) -> list[Metric]:
        """Accuracy in the old index."""
        return [METRICS["index-accuracy"]]

    @property
    def subject(self) -> str:
        """What the rows are."""
        return "embed with replaces"

    def loss_fn(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The stationary loss of a batch."""
        from lowdim.represent import DSimplexClassifier, StationaryLoss

        new, old = self._sides(model, batch)
        if self._classifier is None:
            self._classifier = DSimplexClassifier(self.old.shape[1] + 1, device=new.device)
        loss = StationaryLoss(self.replaces.mu, self.replaces.ce_weight)
        return loss(self._classifier(new), batch["labels"], new, old)

    def outcomes(self, model: nn.Module, batch: dict[str, Tensor], metric: Metric) -> Sequence[Any]:
        """Class and new vector of each row."""
        new, _ = self._sides(model, batch)
        check_finite(new)
        return list(zip(batch["labels"].tolist(), new.float().cpu()))

    def score_of(self, outcomes: Sequence[Any], metric: Metric) -> Score:
        """The share of texts that are found in the old index, and whether each is."""
        from lowdim.represent.d_simplex.compatibility import identified

        labels, new = _stacked(outcomes)
        found = identified(self._old_of(self.train), np.array(list(self.train["labels"])), new, labels)
        return Score(float(found.double().mean()), tuple(found.double().tolist()))

    def replacement(self, model: nn.Module) -> Replacement:
        """Both models' vectors of the training and test parts, and what they say."""
        from lowdim.represent import replacement_report

        metric = self.metrics()[0]
        sides = [_stacked(self.all_outcomes(model, part, metric)) for part in (self.train, self.test)]
        old = torch.cat([self._old_of(part) for part in (self.train, self.test)])
        new = torch.cat([vectors for _, vectors in sides])
        names = tuple(self.classes[i] for labels, _ in sides for i in labels)
        asks = np.arange(len(new)) >= len(sides[0][1])
        known = np.isin(names, [names[i] for i in np.flatnonzero(asks)])  # a class that nobody asks for is left out
        places = np.flatnonzero(known)
        kept = tuple(names[i] for i in places)
        report = replacement_report(old[places], new[places], kept, query=asks[places])
        return Replacement(report, old[places], new[places], kept, asks[places], self.replaces.name)

    def data_checksum(self, name: str) -> str | None:
        """Of the old vectors: their numbers, whoever computed them."""
        return checksum([self.old.contiguous().numpy().data]) if name == self.replaces.name else None

    def _old_of(self, part: Any) -> Tensor:
        return self.old[list(part["place"])]

    def _sides(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """New and old vectors of a batch."""
        new, old = embedded(model, batch), batch["old"]
        if new.shape != old.shape:
            raise ValueError(
                f"replaces: the vectors of {self.replaces.name} have {old.shape[1]} dimensions, and the model's {new.shape[1]}"
                "; an index keeps its size: train a model with vectors of the old size"
            )
        return new, old


def replacing(
    tokenizer: Any,
    files: Sequence[str | Path],
    replaces: Replaces,
    *,
    separator: str | None = None,
    **reading: Unpack[Reading],
) -> Replacing:
    """The task of labelled files and an old model.

    Args:
        separator: refused; a text has one class.
        reading: keywords of `lowdim.train.tasks.labelled.Reading`.

    Raises:
        DataError: pairs of texts, several labels of a text, vectors that do not fit the texts; see `lowdim.train.data`.
        UnknownNameError: no such model. ValueError: more classes than vectors of this size have room for.
    """
    if separator is not None:
        raise ValueError(
            f"label_separator is for several labels of a text; replaces needs one class for each (got {separator!r})"
        )
    parts = labelled_parts(tokenizer, files, placed=True, **reading)
    if parts.joint is not None or parts.several:
        what = "pairs of texts" if parts.joint is not None else "several labels for a text"
        raise DataError(f"replaces needs single texts with one class each; {data_name(files)} has {what}")
    used = sorted(place for part in (parts.train, parts.validation, parts.test) for place in part["place"])
    old = _vectors(replaces, parts.texts, used, parts.notes)
    if len(parts.classes) > old.shape[1] + 1:
        raise ValueError(
            f"replaces: vectors of {old.shape[1]} dimensions have room for {old.shape[1] + 1} classes; "
            f"{data_name(files)} has {len(parts.classes)}"
        )
    return Replacing(
        train=parts.train,
        validation=parts.validation,
        test=parts.test,
        collate=_Collate(Pad.of(tokenizer), old),
        max_length=parts.max_length,
        classes=parts.classes,
        notes=parts.notes,
        name=data_name(files),
        columns=parts.columns,
        example=parts.example,
        processor=tokenizer,
        replaces=replaces,
        old=old,
    )


def _vectors(replaces: Replaces, texts: Sequence[str], used: Sequence[int], notes: Sequence[str]) -> Tensor:
    """The old vectors `(texts, n)` in float32; of texts that are in no part a model computes none."""
    if replaces.model is not None:
        from lowdim.models import load_sentence_encoder

        encoder = load_sentence_encoder(replaces.model, pooler=False)
        with torch.no_grad():
            found = encoder.encode([texts[i] for i in used], convert_to_tensor=True, show_progress_bar=False).cpu().float()
        vectors = torch.zeros(len(texts), found.shape[1])
        vectors[torch.tensor(used)] = found
    else:
        vectors = read_vectors(str(replaces.vectors)).float()
        if len(vectors) != len(texts):
            left = [note for note in notes if "left out" in note and "rows of" in note]
            raise DataError(
                f"replaces: {replaces.vectors} has {len(vectors):,} rows, and the data {len(texts):,} texts; it must hold one "
                f"row for each text of data, validation and eval, in this order{''.join(f' ({note})' for note in left)}"
            )
    bad = (~torch.isfinite(vectors).all(1)).nonzero()
    if len(bad):
        raise DataError(
            f"replaces: {replaces.name} gives row {int(bad[0])} NaN or infinite entries ({shown(texts[int(bad[0])], 60)})"
        )
    return vectors


class _Collate:
    """Padded rows, and the old vector of each."""

    def __init__(self, pad: Pad, old: Tensor):
        self.pad, self.old = pad, old

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {**self.pad(rows), "old": self.old[[row["place"] for row in rows]]}


def _stacked(outcomes: Sequence[Any]) -> tuple[np.ndarray, Tensor]:
    labels, vectors = zip(*outcomes)
    return np.array(labels), torch.stack(vectors)
