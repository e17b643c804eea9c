"""What an encoder is worth at each (layers, dimensions): quality with its interval, bytes, and time."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import check_choice, check_float, check_int
from lowdim.represent.core.bootstrap import draws, interval, midranks, weighted_spearman
from lowdim.represent.core.nested import check_dims
from lowdim.represent.starbucks.encoder import encoder_of, layer_list, recorded_states, sentence_model, width_of
from lowdim.represent.starbucks.shrink import shrink_encoder
from lowdim.results import Result, save_result
from lowdim.surgery import with_forward

__all__ = ["SizeRow", "SizeTable", "size_table"]

_NUMBER = 4  # bytes of a number
_BELOW = 0.01  # quality below that of PCA from which on a model counts as not trained to be cut
_TIMED = 4  # batches that are timed
_SMALLEST = 32  # of the default dimensions


@dataclass(frozen=True)
class SizeRow:
    """An encoder with `layers` layers and `dim` dimensions.

    Attributes:
        quality, low, high: the metric, and its 95 % interval over pairs.
        pca: the metric of the layer's embeddings projected to `dim` by PCA of these very texts.
        model_bytes: of its parameters in float32.
        vector_bytes: of one embedding in float32.
        ms: milliseconds for one text, on the cut model; the same for all dimensions of a layer.
    """

    layers: int
    dim: int
    quality: float
    low: float
    high: float
    pca: float
    model_bytes: int
    vector_bytes: int
    ms: float


@dataclass(frozen=True)
class SizeTable(Result):
    """Rows by layers, then dimensions; the last one is the whole model where it was measured."""

    sizes: tuple[SizeRow, ...]
    model: str
    pairs: int  # of texts
    metric: str  # "spearman" or "accuracy@1"
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each (layers, dim)."""
        return [asdict(row) for row in self.sizes]

    def to_dict(self) -> dict[str, Any]:
        """`{"rows", "model", "pairs", "metric", "notes"}`."""
        record = super().to_dict()
        return {"rows": record.pop("sizes"), **record}

    @property
    def full(self) -> SizeRow:
        """The row of most layers and dimensions."""
        return max(self.sizes, key=lambda row: (row.layers, row.dim))

    def smallest(self, within: float = 0.01) -> SizeRow:
        """The cheapest row whose interval reaches the full row's quality less `within`.

        Its cost is the sum of two shares: of the full model's bytes, and of the full vector's.
        """
        check_float("within", within, 0.0)
        full = self.full
        good = [row for row in self.sizes if row.high >= full.quality - within]
        return min(good, key=lambda row: row.model_bytes / full.model_bytes + row.vector_bytes / full.vector_bytes)

    def plot(self, *, ax: Any = None) -> Any:
        """Quality against dimensions, a line for each number of layers."""
        axes = self._axes(ax)
        for layers in sorted({row.layers for row in self.sizes}):
            rows = [row for row in self.sizes if row.layers == layers]
            dims, quality = [row.dim for row in rows], [row.quality for row in rows]
            (line,) = axes.plot(dims, quality, marker="o", label=f"{layers} layers")
            axes.fill_between(dims, [row.low for row in rows], [row.high for row in rows], alpha=0.12, color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_xlabel("dimensions")
        axes.set_ylabel(self.metric)
        axes.legend()
        return axes

    def save(self, path: str | Path) -> Path:
        """Write the table as a page (.html) or as its record (.json); `lowdim sizes` writes a page with figures.

        Raises:
            ValueError: another ending.
        """
        return save_result(self, path, ("Sizes", self.rows()), ("Notes", [{"note": note} for note in self.notes]))


def size_table(
    model: Any,
    pairs: Sequence[Any],
    *,
    layers: Iterable[int] | None = None,
    dims: Iterable[int] | None = None,
    metric: str | None = None,
    batch_size: int = 32,
    repeats: int = 5,
    resamples: int = 1000,
    seed: int = 0,
) -> SizeTable:
    """Measure an encoder cut to each (layers, dimensions); one pass over the texts serves all of them.

    Formula: with scores, Spearman's correlation of `cos(a_i[:d], b_i[:d])` and the scores; without, accuracy@1: the share of
    texts `a_i` whose nearest among all second texts is `b_i`, or a text equal to it. Intervals are the bootstrap's, over pairs.

    Args:
        model: a `SentenceTransformer` whose first module is a Transformer; trained to be cut or not.
        pairs: `(texts, texts, scores)` or `(texts, texts)`.
        layers: to measure; None means all.
        dims: to measure; None means halves of the whole, down to 32.
        metric: `"spearman"` or `"accuracy@1"`; None means by what `pairs` has.
        batch_size: texts at once.
        repeats: of the timing, whose median counts.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        SizeTable; its `notes` name sizes at which PCA, which needs no training, is better by more than 0.01.

    Raises:
        ValueError: texts of unlike number, fewer than two pairs, scores that are not finite or all equal; layers or dimensions
            out of range.
        TypeError: another model. MissingExtraError: sentence-transformers is not installed.

    Example:
        >>> from lowdim.represent import size_table
        >>> from lowdim.testing.small_encoder import small_encoder
        >>> first, second = ["the cat sat", "a dog ran", "a tree"], ["a cat", "the old dog", "the red bird"]
        >>> table = size_table(small_encoder(layers=2, width=8), (first, second, [0.9, 0.7, 0.1]), dims=[4, 8], repeats=1)
        >>> [(row.layers, row.dim) for row in table.sizes]
        [(1, 4), (1, 8), (2, 4), (2, 8)]

    Source: Zhuang et al., arXiv 2410.13230.
    """
    plain = sentence_model(model, "size_table")
    first, second, scores = _read(pairs)
    check_choice("metric", metric or "spearman", ("spearman", "accuracy@1"))
    if metric == "spearman" and scores is None:
        raise ValueError("metric 'spearman' needs scores: pairs must be (texts, texts, scores)")
    metric = metric or ("accuracy@1" if scores is None else "spearman")
    for name, value in (("batch_size", batch_size), ("repeats", repeats), ("resamples", resamples)):
        check_int(name, value, 1)
    count, width = len(layer_list(encoder_of(plain))[2]), width_of(plain)
    chosen = check_dims(range(1, count + 1) if layers is None else layers, count, "the number of layers")
    sizes = check_dims(_halves(width) if dims is None else dims, width, "the model's dimensions")

    texts = list(dict.fromkeys([*first, *second]))
    place = {text: i for i, text in enumerate(texts)}
    where = [np.array([place[text] for text in side]) for side in (first, second)]
    states = _embeddings(plain, texts, chosen, batch_size)
    judge = _spearman(scores) if metric == "spearman" and scores is not None else _accuracy(where[1])

    cells: dict[tuple[int, int], Any] = {}
    pca: dict[tuple[int, int], float] = {}
    for layer, embeddings in states.items():
        projected = _principal(embeddings)
        for dim in sizes:
            cells[layer, dim] = judge(embeddings[where[0], :dim], embeddings[where[1], :dim])
            pca[layer, dim] = _once(judge(projected[where[0], :dim], projected[where[1], :dim]), len(first))
    resampled: dict[tuple[int, int], list[np.ndarray]] = {cell: [] for cell in cells}
    for weights in draws(len(first), resamples, seed):
        for cell, value in cells.items():
            resampled[cell].append(value(weights))

    rows = []
    for layer in chosen:
        small = shrink_encoder(plain, layer, sizes[-1])
        bytes_, ms = _NUMBER * sum(p.numel() for p in small.parameters()), _time(small, texts, batch_size, repeats)
        for dim in sizes:
            low, high = interval(resampled[layer, dim])
            quality = _once(cells[layer, dim], len(first))
            rows.append(SizeRow(layer, dim, quality, low, high, pca[layer, dim], bytes_, _NUMBER * dim, ms))
    name = getattr(getattr(plain, "model_card_data", None), "base_model", None) or type(encoder_of(plain)).__name__
    return SizeTable(tuple(rows), str(name), len(first), metric, tuple(_notes(rows, width)))


def _read(pairs: Sequence[Any]) -> tuple[list[str], list[str], np.ndarray | None]:
    if isinstance(pairs, (str, bytes)) or len(pairs) not in (2, 3):
        raise ValueError(f"pairs must be (texts, texts) or (texts, texts, scores); got {len(pairs)} parts")
    first, second = list(pairs[0]), list(pairs[1])
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"pairs must hold two lists of equally many texts, at least 2; got {len(first)} and {len(second)}")
    if len(pairs) == 2 or pairs[2] is None:
        return first, second, None
    scores = np.asarray([float(score) for score in pairs[2]])
    if len(scores) != len(first):
        raise ValueError(f"pairs must hold a score for each of the {len(first)} pairs; got {len(scores)}")
    if not np.isfinite(scores).all() or np.ptp(scores) == 0:
        raise ValueError("the scores of pairs must be finite and not all equal")
    return first, second, scores


def _halves(width: int) -> list[int]:
    """The whole width and its halves, down to 32; ascending."""
    sizes = [width]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= _SMALLEST:
        sizes.append(sizes[-1] // 2)
    return sizes[::-1]


@torch.no_grad()
def _embeddings(model: Any, texts: list[str], layers: Sequence[int], batch_size: int) -> dict[int, np.ndarray]:
    """The texts' embeddings from each layer, `(texts, width)` float64, as a model cut there gives them."""
    with recorded_states(model) as recorder, _all_layers(model, recorder, layers), model.truncate_embeddings(None):
        joined = model.encode(texts, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
    return {layer: part.astype(np.float64) for layer, part in zip(layers, np.split(joined, len(layers), axis=1), strict=True)}


@contextmanager
def _all_layers(model: Any, recorder: Any, layers: Sequence[int]):
    """Inside, a pass gives the embeddings of all these layers, one beside the other."""
    forward = model.forward

    def joined(features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        recorder.layer = None
        whole = forward(features, **kwargs)
        parts = []
        for layer in layers:
            recorder.layer = layer
            parts.append(forward(copy.copy(whole), **kwargs)["sentence_embedding"])
        return {**whole, "sentence_embedding": torch.cat(parts, dim=-1)}

    with with_forward(model, joined):
        yield


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


Judge = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


def _spearman(scores: np.ndarray) -> Judge:
    """Embeddings of both sides -> (weights of pairs -> the correlation)."""
    rank_scores = midranks(scores)
    remembered: list[tuple[np.ndarray, np.ndarray]] = []  # the scores' ranks in the block of draws at hand

    def scores_ranked(weights: np.ndarray) -> np.ndarray:
        if not remembered or remembered[0][0] is not weights:
            remembered[:] = [(weights, rank_scores(weights))]
        return remembered[0][1]

    def judge(a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        rank = midranks((_unit(a) * _unit(b)).sum(1))
        return lambda weights: weighted_spearman(weights, rank(weights), scores_ranked(weights))

    return judge


def _accuracy(answers: np.ndarray) -> Judge:
    """Embeddings of both sides -> (weights of pairs -> the share of first texts that find theirs)."""

    def judge(a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        a, b = _unit(a), _unit(b)
        found = np.concatenate([(part @ b.T).argmax(1) for part in np.array_split(a, -(-len(a) // 512))])
        hits = (answers[found] == answers).astype(np.float64)
        return lambda weights: weights @ hits / weights.sum(1)

    return judge


def _once(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> float:
    """The statistic of the pairs as they are."""
    return float(statistic(np.ones((1, count)))[0])


def _principal(x: np.ndarray) -> np.ndarray:
    """The centred rows in the axes of their variance, largest first."""
    centred = x - x.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    return centred @ axes[:, ::-1]


def _time(model: Any, texts: list[str], batch_size: int, repeats: int) -> float:
    """Milliseconds for one text: the median of `repeats` passes over a few batches, after one that is not counted."""
    sample = texts[: _TIMED * batch_size]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model.encode(sample, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:]) / len(sample)


def _notes(rows: Sequence[SizeRow], width: int) -> list[str]:
    """Sizes where an untrained projection is better than the cut."""
    worse = [row for row in rows if row.dim < width and row.quality < row.pca - _BELOW]
    if not worse:
        return []
    most = max(worse, key=lambda row: row.pca - row.quality)
    places = ", ".join(f"({row.layers}, {row.dim})" for row in worse)
    return [
        f"the model was not trained to be cut at {places}: PCA of the same embeddings is better there; most at "
        f"({most.layers}, {most.dim}), {most.pca:.3f} against {most.quality:.3f}"
    ]
