"""May the old index stay when the model is replaced? Two sets of embeddings of the same items, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import check_int, listed
from lowdim.linalg import compute_dtype, derive_seed
from lowdim.represent.core.bootstrap import mean_interval
from lowdim.represent.core.neighbours import nearest
from lowdim.represent.d_simplex.compatibility import (
    average_accuracy,
    average_compatibility,
    classes_of,
    compatibility_inequalities,
    identified,
    read_embeddings,
    read_labels,
)
from lowdim.results import Result, save_result

__all__ = ["ClassRow", "ReplacementReport", "replacement_report"]

_LOST = 0.01  # accuracy that may be lost for the index to stay
_SAME, _OTHER = 0.95, 0.5  # overlap of neighbours from which on, and below which, there is a verdict without labels
_WEAK = "no labels: weaker evidence"


@dataclass(frozen=True)
class ClassRow:
    """One class: how many of its items ask, and the share that is found.

    Attributes:
        label: of the class.
        queries: its items that ask.
        old_old, new_old, new_new: accuracy of the old model in the old gallery, of the new one in the old, of the new one in
            its own.
        loss: `old_old - new_old`.
    """

    label: Any
    queries: int
    old_old: float
    new_old: float | None
    new_new: float
    loss: float | None


@dataclass(frozen=True)
class ReplacementReport(Result):
    """What a new model's queries find in the old model's index.

    Attributes:
        verdict: `"stay"`, `"rebuild"` or `"unclear"`; `reason` says why, in a sentence.
        matrix: `((M_11, M_12), (M_21, M_22))`, `M_ij` the accuracy of queries of model i in the gallery of model j, 1 the old
            one; None without labels, or where sizes differ.
        average_compatibility: 1 if `M_21 > M_11`, else 0. average_accuracy: the mean of `M_11, M_21, M_22`.
        gap: `M_21 - M_11`; low, high: its 95 % interval over queries.
        inequalities: shares of pairs that satisfy those of compatibility, of one class and of two.
        self_match: without labels, the share of items whose own old vector is the nearest to the new one.
        overlap_at_k: without labels, the share of the k neighbours in the new gallery that are found in the old one.
        per_class: a row for each class, the largest loss first.
    """

    verdict: str
    reason: str
    items: int
    old_size: int
    new_size: int
    matrix: tuple[tuple[float | None, float | None], tuple[float | None, float | None]] | None = None
    average_compatibility: float | None = None
    average_accuracy: float | None = None
    gap: float | None = None
    low: float | None = None
    high: float | None = None
    inequalities: tuple[float, float] | None = None
    self_match: float | None = None
    overlap_at_k: float | None = None
    k: int | None = None
    per_class: tuple[ClassRow, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """A row for each class; without labels, one row with the numbers."""
        if not self.per_class:
            return super().rows()
        return [{"class": row.pop("label"), **row} for row in map(asdict, self.per_class)]

    @property
    def summary(self) -> str:
        """The verdict, its reason, and the accuracies behind it."""
        if self.matrix is None:
            return f"{self.verdict}: {self.reason}"
        (old_old, _), (new_old, new_new) = self.matrix
        cells = (("old on old", old_old), ("new on old", new_old), ("new on new", new_new))
        return f"{self.verdict}: {self.reason}; " + ", ".join(
            f"{name} {value:.3f}" for name, value in cells if value is not None
        )

    def _table(self) -> list[dict[str, Any]]:
        return self.rows() if self.per_class else []

    def plot(self, *, ax: Any = None) -> Any:
        """The cross-test matrix; without one, self match and overlap as bars."""
        axes = self._axes(ax)
        if self.matrix is None:
            axes.bar(["self match", f"overlap at {self.k}"], [self.self_match or 0.0, self.overlap_at_k or 0.0])
            axes.set_ylim(0, 1)
            return axes
        values = np.array(self.matrix, dtype=np.float64)  # None becomes NaN
        axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
        for i, j in np.ndindex(2, 2):
            text = "–" if np.isnan(values[i, j]) else f"{values[i, j]:.3f}"
            axes.text(j, i, text, ha="center", va="center", color="white" if not values[i, j] > 0.6 else "black")
        for set_ticks, what in ((axes.set_xticks, "gallery"), (axes.set_yticks, "queries")):
            set_ticks([0, 1], [f"old {what}", f"new {what}"])
        return axes

    def save(self, path: str | Path) -> Path:
        """Write the report as a page (.html) or as its record (.json); `lowdim index-check` writes a page with figures.

        Raises:
            ValueError: another ending.
        """
        cells = [
            {"": f"{name} model asks", "old gallery": row[0], "new gallery": row[1]}
            for name, row in zip(("old", "new"), self.matrix or ())
        ]
        return save_result(self, path, ("Accuracy", cells), ("By class" if self.per_class else "Numbers", self.rows()))


def replacement_report(
    old: Any,  # (N, n)
    new: Any,  # (N, m)
    labels: Any = None,  # (N,)
    *,
    query: Any = None,  # (N,) bool
    k: int = 10,
    resamples: int = 1000,
    seed: int = 0,
) -> ReplacementReport:
    """Whether the index of an old model may stay when queries come from a new one.

    Formula: with labels, 1:N accuracies `M_ij` (`identification_accuracy`) and `gap = M_21 - M_11` with its bootstrap interval
    over queries: `"stay"` if its lower end is at least -0.01, `"rebuild"` if its upper end is below that, else `"unclear"`.
    Without, the overlap at k of the neighbours that new vectors find among old and among new ones, the item itself left out:
    `"stay"` from 0.95 on, `"rebuild"` below 0.5.

    Args:
        old, new: embeddings of the same items in the same order, by the old and by the new model.
        labels: integers or texts; None for an ordinary index of documents.
        query: which items ask; the others are the gallery. None: half of each class, drawn with `seed`.
        k: neighbours, where there are no labels.
        resamples: of the bootstrap.
        seed: of the split and of the bootstrap.

    Returns:
        ReplacementReport; where sizes differ, `"rebuild"`, since vectors of two sizes cannot be compared.

    Raises:
        ValueError: unlike numbers of rows, NaN or infinite entries, labels of another length, a class without an item that
            asks or without one in the gallery (named), k beyond the items.

    Example:
        >>> import torch
        >>> from lowdim.represent import replacement_report
        >>> labels = [0, 1, 2, 3] * 10
        >>> old = torch.eye(4).repeat(10, 1) + 0.1 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        >>> replacement_report(old, old, labels).verdict, replacement_report(old, old.roll(1, 1), labels).verdict
        ('stay', 'rebuild')

    Two files must hold the same items in the same order: a shuffled one looks like an unrelated model.

    Source: Biondi et al., CVPR 2024, arXiv 2405.02581.
    """
    check_int("k", k, 1)
    check_int("resamples", resamples, 1)
    stored, fresh = read_embeddings("old", old), read_embeddings("new", new)
    if len(stored) != len(fresh):
        raise ValueError(f"old and new must hold the same items in the same order; got {len(stored)} and {len(fresh)} rows")
    sizes: dict[str, Any] = {"items": len(stored), "old_size": stored.shape[1], "new_size": fresh.shape[1]}
    if labels is not None:
        return _labelled(stored, fresh, read_labels("labels", labels, len(stored)), query, resamples, seed, sizes)
    if query is not None:
        raise ValueError("query needs labels: without them every item asks")
    if stored.shape[1] != fresh.shape[1]:
        return ReplacementReport("rebuild", _unlike(sizes), **sizes)
    check_int("k", k, 1, len(stored) - 1)
    return _unlabelled(stored, fresh, k, sizes)


def _labelled(
    stored: Tensor, fresh: Tensor, labels: np.ndarray, query: Any, resamples: int, seed: int, sizes: dict[str, Any]
) -> ReplacementReport:
    names, classes = classes_of(labels)
    asks = _split(classes, seed) if query is None else _mask(query, len(classes))
    _check_classes(names, classes, asks)
    alike = stored.shape[1] == fresh.shape[1]
    sides = (stored, fresh)
    hits: list[list[np.ndarray | None]] = [[None, None], [None, None]]
    for i, j in np.ndindex(2, 2):
        if alike or i == j:
            found = identified(sides[j][~asks], classes[~asks], sides[i][asks], classes[asks])
            hits[i][j] = found.cpu().numpy().astype(np.float64)
    old_old, new_old, new_new = hits[0][0], hits[1][0], hits[1][1]
    assert old_old is not None
    assert new_new is not None
    matrix: Any = tuple(tuple(None if cell is None else float(cell.mean()) for cell in row) for row in hits)
    rows = tuple(_by_class(names, classes[asks], old_old, new_old, new_new))
    if new_old is None:
        return ReplacementReport("rebuild", _unlike(sizes), **sizes, matrix=matrix, per_class=rows)
    gap = float((new_old - old_old).mean())
    low, high = mean_interval(new_old - old_old, resamples, seed)
    verdict = "stay" if low >= -_LOST else "rebuild" if high < -_LOST else "unclear"
    return ReplacementReport(
        verdict,
        _reason(verdict, gap, low, high) + _shuffled(float(new_old.mean()), 1 / len(names), len(new_old)),
        **sizes,
        matrix=matrix,
        average_compatibility=average_compatibility(matrix),
        average_accuracy=average_accuracy(matrix),
        gap=gap,
        low=low,
        high=high,
        inequalities=compatibility_inequalities(fresh, stored, classes),
        per_class=rows,
    )


def _unlabelled(stored: Tensor, fresh: Tensor, k: int, sizes: dict[str, Any]) -> ReplacementReport:
    dtype = compute_dtype(torch.promote_types(stored.dtype, fresh.dtype))
    itself = torch.arange(len(stored), device=fresh.device)[:, None]
    among_old, among_new = (nearest(fresh, side, side.shape[1], k + 1, dtype) for side in (stored, fresh))
    self_match = float((among_old[:, :1] == itself).double().mean())
    # A place beyond all rows where the item itself stands, so that it meets nothing; each list keeps its k best others.
    lists = [_others(found, itself, k) for found in (among_old, among_new)]
    shared = (lists[0][:, :, None] == lists[1][:, None]).any(2).double().mean()
    overlap = float(shared)
    verdict = "stay" if overlap >= _SAME else "rebuild" if overlap < _OTHER else "unclear"
    reason = (
        f"of the {k} neighbours that a new vector has among new ones, {overlap:.1%} are found among the old ones "
        f"({_WEAK}{_shuffled(overlap, k / (len(stored) - 1), k * len(stored))})"
    )
    return ReplacementReport(verdict, reason, **sizes, self_match=self_match, overlap_at_k=overlap, k=k)


def _others(found: Tensor, itself: Tensor, k: int) -> Tensor:
    """The first k of `(N, k + 1)` rows that are not the item itself."""
    order = (found == itself).to(torch.int8).argsort(dim=1, stable=True)
    return found.gather(1, order)[:, :k]


def _split(classes: np.ndarray, seed: int) -> np.ndarray:
    """A half of each class asks, the smaller one where it is odd."""
    draw = np.random.default_rng(derive_seed(seed, "replacement", "queries"))
    order = draw.permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]
    counts = np.bincount(classes)
    place = np.arange(len(classes)) - np.repeat(counts.cumsum() - counts, counts)
    asks = np.zeros(len(classes), dtype=bool)
    asks[order] = place < np.repeat(counts // 2, counts)
    return asks


def _mask(query: Any, count: int) -> np.ndarray:
    mask = np.asarray(query.cpu() if isinstance(query, Tensor) else query)
    if mask.shape != (count,) or mask.dtype != bool:
        raise ValueError(f"query must be {count} truth values, one for each item; got {mask.dtype} of shape {mask.shape}")
    return mask


def _check_classes(names: Sequence[Any], classes: np.ndarray, asks: np.ndarray) -> None:
    for what, mask in (("that asks", asks), ("in the gallery", ~asks)):
        absent = np.flatnonzero(np.bincount(classes[mask], minlength=len(names)) == 0)
        if len(absent):
            raise ValueError(f"labels has classes without an item {what}: {listed(names[i] for i in absent.tolist())}")


def _by_class(
    names: Sequence[Any], classes: np.ndarray, old_old: np.ndarray, new_old: np.ndarray | None, new_new: np.ndarray
) -> list[ClassRow]:
    counts = np.bincount(classes, minlength=len(names))
    means = [None if hits is None else np.bincount(classes, hits, len(names)) / counts for hits in (old_old, new_old, new_new)]
    rows = []
    for i, name in enumerate(names):
        first, cross, last = (None if mean is None else float(mean[i]) for mean in means)
        assert first is not None
        assert last is not None
        rows.append(ClassRow(name, int(counts[i]), first, cross, last, None if cross is None else first - cross))
    return sorted(rows, key=lambda row: -(row.loss or 0.0))


def _unlike(sizes: dict[str, Any]) -> str:
    return f"the old vectors have {sizes['old_size']} dimensions and the new ones {sizes['new_size']}: they cannot be compared"


def _reason(verdict: str, gap: float, low: float, high: float) -> str:
    found = f"new queries in the old index score {gap:+.3f} against old ones (95 % interval {low:+.3f} to {high:+.3f})"
    says = {
        "stay": f"at most {_LOST} is lost",
        "rebuild": f"more than {_LOST} is lost",
        "unclear": f"the interval holds {-_LOST}: more queries would tell",
    }[verdict]
    return f"{found}: {says}"


def _shuffled(share: float, chance: float, draws: int) -> str:
    """What else a score at the level of chance may mean: within three standard errors of that of `draws` guesses."""
    if chance >= 0.5 or share > chance + 3 * math.sqrt(chance * (1 - chance) / draws):
        return ""
    return "; this is the level of chance, which rows in another order would give as well"
