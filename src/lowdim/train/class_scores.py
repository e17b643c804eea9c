"""Scores of answers that are classes, from counts: F1 by its averages, Matthews correlation, area under the ROC curve.

Each comes with one value for each row (`lowdim.train.jackknife`): rows with the same label and the same answer leave the same
counts behind, so a score is taken once for each kind of row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowdim.train.jackknife import pseudo_values

__all__ = ["Answers", "area_under_curve", "best_constant", "by_class", "class_score", "positive_class"]

Array = NDArray[np.float64]

#: Names of the classes that are answers with yes, each with those that say no.
_POSITIVE = {
    "1": ("0", "-1"), "true": ("false",), "yes": ("no",), "positive": ("negative",), "pos": ("neg",), "y": ("n",),
    "spam": ("ham",), "toxic": ("non-toxic", "nontoxic", "not toxic"), "entailment": ("not_entailment",),
}  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """What the rows are, and what was answered, as the different kinds of rows and their numbers.

    Attributes:
        truth, answer: `(kinds, classes)`, 1 where a kind of row has the class, and where it was answered.
        kind: of each row.
    """

    truth: Array
    answer: Array
    kind: NDArray[np.intp]

    @classmethod
    def single(cls, labels: ArrayLike, predictions: ArrayLike, classes: int) -> Answers:
        """One class in each row, and one answered."""
        pairs = np.stack([np.asarray(labels, np.int64), np.asarray(predictions, np.int64)], 1)
        kinds, kind = np.unique(pairs, axis=0, return_inverse=True)
        one = np.eye(classes)
        return cls(one[kinds[:, 0]], one[kinds[:, 1]], kind.reshape(-1))

    @classmethod
    def several(cls, truth: Array, answer: Array) -> Answers:
        """Any number of classes in each row: `(rows, classes)`, 1 where a row has the class, and where it was answered."""
        kinds, kind = np.unique(np.concatenate([truth, answer], 1), axis=0, return_inverse=True)
        width = truth.shape[1]
        return cls(kinds[:, :width], kinds[:, width:], kind.reshape(-1))

    @property
    def hits(self) -> Array:
        """1 for each row whose classes are those that were answered, all of them and no other."""
        return (self.truth == self.answer).all(1).astype(np.float64)[self.kind]

    def tally(self) -> tuple[_Tally, _Tally]:
        """The counts of all rows, and of all rows but one of each kind."""
        count = np.bincount(self.kind, minlength=len(self.truth)).astype(np.float64)
        right = self.truth * self.answer
        whole = _Tally(count @ right, count @ self.answer, count @ self.truth, np.float64(count.sum()))
        return whole, _Tally(whole.right - right, whole.answered - self.answer, whole.held - self.truth, whole.rows - 1.0)


@dataclass(frozen=True)
class _Tally:
    """How often each class was answered rightly, was answered, and is there: `(..., classes)`; and the number of rows."""

    right: Array
    answered: Array
    held: Array
    rows: Any

    def f1(self) -> Array:
        """`2 right / (answered + held)` of each class; 0 for a class that is neither."""
        return _share(2 * self.right, self.answered + self.held)


def class_score(metric: str, answers: Answers, positive: int = 1) -> tuple[float, Array]:
    """A score, and its value for each row.

    Args:
        metric: `accuracy`, `f1` (macro), `f1-micro`, `f1-weighted`, `f1-binary` or `mcc`.
        positive: the class whose F1 is `f1-binary`.

    Example:
        >>> from lowdim.train.class_scores import Answers, class_score
        >>> value, values = class_score("f1-binary", Answers.single([1, 1, 0, 0], [1, 0, 0, 0], 2))
        >>> round(value, 4), values.round(4).tolist()
        (0.6667, [2.6667, -0.3333, 0.6667, 0.6667])
    """
    if metric == "accuracy":
        hits = answers.hits
        return float(hits.mean()), hits
    score = _SCORES.get(metric)
    whole, without = answers.tally()
    if score is None:
        found, rest = whole.f1()[positive], without.f1()[:, positive]
    else:
        found, rest = score(whole), score(without)
    return float(found), pseudo_values(float(found), rest[answers.kind])


def best_constant(metric: str, truth: Array) -> Array:
    """The one answer to all rows that has the best score: some of the most frequent classes, or the most frequent set of them.

    Args:
        truth: `(rows, classes)`, 1 where a row has the class.

    Example:
        >>> import numpy as np
        >>> from lowdim.train.class_scores import best_constant
        >>> truth = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
        >>> best_constant("accuracy", truth).tolist(), best_constant("f1", truth).tolist()
        ([1.0, 0.0], [1.0, 1.0])
    """
    sets, counts = np.unique(truth, axis=0, return_counts=True)
    if metric not in _SCORES:
        return sets[counts.argmax()]
    held = truth.sum(0)
    order = np.argsort(-held, kind="stable")
    answers = np.zeros((len(held) + 1, len(held)))
    for count, answer in enumerate(answers):
        answer[order[:count]] = 1.0
    rows = np.float64(len(truth))
    return answers[_SCORES[metric](_Tally(held * answers, rows * answers, np.broadcast_to(held, answers.shape), rows)).argmax()]


def by_class(answers: Answers, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class, and the number of its rows."""
    whole, _ = answers.tally()
    precision, recall = _share(whole.right, whole.answered), _share(whole.right, whole.held)
    columns = zip(classes, precision.tolist(), recall.tolist(), whole.f1().tolist(), whole.held.tolist(), strict=True)
    return [{"class": name, "precision": p, "recall": r, "f1": f, "count": round(count)} for name, p, r, f, count in columns]


def area_under_curve(truth: Array, scores: Array) -> tuple[float, Array]:
    """The mean over the classes of the area under the ROC curve, each class against all others; and its value for each row.

    The area is the share of pairs of a row with the class and one without it whose scores are in that order; equal scores
    count one half. A class that all rows have, or none, is left out of the mean; where that holds for every class it is 1/2.

    Args:
        truth: `(rows, classes)`, 1 where a row has the class.
        scores: of the same shape, the higher the more likely.

    Example:
        >>> import numpy as np
        >>> from lowdim.train.class_scores import area_under_curve
        >>> area_under_curve(np.array([[0], [0], [1], [1]]), np.array([[0.1], [0.4], [0.35], [0.8]]))[0]
        0.75
    """
    rows = len(truth)
    total, defined = 0.0, 0
    rest, rest_defined = np.zeros(rows), np.zeros(rows)
    for has, score in zip(truth.T.astype(bool), scores.T, strict=True):
        ours, others = score[has], score[~has]
        pairs = len(ours) * len(others)
        lost = np.empty(rows)  # ordered pairs that a row is part of
        lost[has] = _below(ours, others)
        lost[~has] = len(ours) - _below(others, ours)
        ordered = lost[has].sum()
        left = pairs - np.where(has, len(others), len(ours))
        total, defined = total + (ordered / pairs if pairs else 0.0), defined + (pairs > 0)
        rest += _share(ordered - lost, left)
        rest_defined += left > 0
    whole = float(total / defined) if defined else 0.5
    return whole, pseudo_values(whole, np.where(rest_defined > 0, _share(rest, rest_defined), 0.5))


def positive_class(classes: Sequence[str], counts: Sequence[int]) -> int:
    """Which of two classes is the one that is looked for: the one whose name says so, else the rarer one, else the second.

    Args:
        counts: of each class in training.

    Example:
        >>> from lowdim.train.class_scores import positive_class
        >>> positive_class(("0", "1"), (10, 90)), positive_class(("fraud", "usual"), (10, 90))
        (1, 0)
    """
    first, second = (name.strip().lower() for name in classes[:2])
    if second in _POSITIVE.get(first, ()):
        return 0
    if first in _POSITIVE.get(second, ()) or counts[0] >= counts[1]:
        return 1
    return 0


def _below(scores: Array, others: Array) -> Array:
    """For each score, how many of the others are below it; equal ones count one half."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")) / 2


def _share(part: Any, whole: Any) -> Array:
    """`part / whole`, 0 where the whole is 0."""
    return np.divide(
        part, whole, out=np.zeros(np.broadcast_shapes(np.shape(part), np.shape(whole))), where=np.asarray(whole) > 0
    )


def _macro(counts: _Tally) -> Array:
    """The mean over the classes that are in the rows or were answered."""
    return _share(counts.f1().sum(-1), (counts.answered + counts.held > 0).sum(-1))


def _micro(counts: _Tally) -> Array:
    """The F1 of all classes counted together."""
    return _share(2 * counts.right.sum(-1), (counts.answered + counts.held).sum(-1))


def _weighted(counts: _Tally) -> Array:
    """The mean over the classes, weighted by their rows."""
    return _share((counts.f1() * counts.held).sum(-1), counts.held.sum(-1))


def _mcc(counts: _Tally) -> Array:
    """`(n Σ right − Σ answered held) / √((n² − Σ answered²)(n² − Σ held²))`; 0 where one class alone was answered or is there.

    Source: J. Gorodkin, Computational Biology and Chemistry 28 (2004), 367-374.
    """
    n = counts.rows
    above = n * counts.right.sum(-1) - (counts.answered * counts.held).sum(-1)
    below = (n**2 - (counts.answered**2).sum(-1)) * (n**2 - (counts.held**2).sum(-1))
    return _share(above, np.sqrt(np.maximum(below, 0.0)))


_SCORES = {"f1": _macro, "f1-micro": _micro, "f1-weighted": _weighted, "mcc": _mcc}
