"""Training, validation and test parts of rows that are the same where their keys are: images, sentences with tags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowdim.errors import DataError, shown
from lowdim.train.repeats import first_of_each
from lowdim.train.splits import Places, stratified

__all__ = ["Rows", "divide"]


@dataclass(frozen=True)
class Rows:
    """Rows as their keys and labels.

    Attributes:
        keys: rows with an equal key are the same.
        labels: class of each row; where rows have no class, all are 0.
        classes: names of the classes.
        noun: what the rows are, for messages.
        several: whether a row may have any number of classes.
    """

    keys: Sequence[bytes]
    labels: Sequence[int]
    classes: Sequence[str] = ("",)
    noun: str = "rows"
    several: bool = False


def divide(rows: Rows, *, validation: Sequence[int] | None = None, test: Sequence[int] | None = None, seed: int = 0) -> Places:
    """Places of the rows in three parts, each class in the same proportion; no row of training is in another part.

    Args:
        validation, test: places of rows with a part of their own; None holds rows of the others out.

    Raises:
        DataError: too few rows of a class, or none is left to train on.
    """
    classed: Any = rows
    own_test, own_validation = list(test or ()), list(validation or ())
    apart = {*own_test, *own_validation}
    given = [i for i in range(len(rows.keys)) if i not in apart]
    notes: list[str] = []
    unique = _once(rows, given, notes)
    if test is not None:
        own_validation = _without(rows, own_validation, own_test, "validation", notes)
        _count_again(rows, own_test, notes)
    left = _without(rows, unique, [*own_test, *own_validation], "training", notes)
    if unique and not left:
        raise DataError(f"all training {rows.noun} are also in the validation or test part, so nothing is left to train on")
    need = 1 + (test is None) + (validation is None)
    counts = Counter(rows.labels[i] for i in left)
    for index, name in enumerate(rows.classes):
        if counts[index] < need:
            of = f"class {shown(name)} has" if len(rows.classes) > 1 else "there are"
            raise DataError(
                f"{of} {counts[index]} {rows.noun}; at least {need} are needed to split the data"
                + (" (duplicates are left out)" if len(left) < len(given) else "")
            )
    held = own_test
    if test is None:
        left, held = stratified(classed, left, 0.3, seed, "test")
    chosen = own_validation
    if validation is None:
        left, chosen = stratified(classed, left, 0.2, seed, "validation")
    for name, part in (("validation", chosen), ("test", held)):
        if not part:
            raise DataError(f"the {name} part has no {rows.noun}")
    return Places(left, chosen, held, tuple(notes))


def _once(rows: Rows, given: Sequence[int], notes: list[str]) -> list[int]:
    """The first row of each key."""
    firsts = first_of_each([(rows.keys[i],) for i in given])
    kept = [given[i] for i, first in enumerate(firsts) if i == first]
    if len(kept) < len(given):
        notes.append(
            f"{len(given) - len(kept)} duplicate {rows.noun} were left out, so that none is in two parts (only equal ones are "
            "found, not similar ones)"
        )
    wrong = sum(rows.labels[given[i]] != rows.labels[given[first]] for i, first in enumerate(firsts))
    if wrong:
        notes.append(f"{wrong} of them have another label than the first, which was kept")
    return kept


def _without(rows: Rows, places: Sequence[int], others: Sequence[int], part: str, notes: list[str]) -> list[int]:
    known = {rows.keys[i] for i in others}
    kept = [i for i in places if rows.keys[i] not in known]
    if len(kept) < len(places):
        count = len(places) - len(kept)
        notes.append(f"{count} {part} {rows.noun} are also in a later part (validation, test) and were left out of {part}")
    return kept


def _count_again(rows: Rows, test: Sequence[int], notes: list[str]) -> None:
    again = len(test) - len({rows.keys[i] for i in test})
    if again:
        notes.append(f"{again} {rows.noun} of the test part are duplicates, and each counts in the score")
