"""Training, validation and test parts that share no text."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowdim.errors import DataError, shown
from lowdim.train.repeats import first_of_each, same_text
from lowdim.train.scores import score_hint

if TYPE_CHECKING:
    from lowdim.train.data import Examples

__all__ = ["Places", "Splits", "places", "split"]

#: Keys of each text: texts that share one are the same.
Keys = Sequence[tuple[bytes, ...]]


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of the data: train on the first, choose on the second, report on the third, once."""

    train: Any
    validation: Any
    test: Any
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Places:
    """Which examples are in which part; `test` is empty where there is a test file."""

    train: list[int]
    validation: list[int]
    test: list[int]
    notes: tuple[str, ...] = ()


def split(
    examples: Examples, *, test: Examples | None = None, seed: int = 0, validation: float = 0.2, held_out: float = 0.3
) -> Splits:
    """Train, validation and test parts, each class in the same proportion; no text is in two parts.

    Texts that differ only in case, spaces or Unicode form are the same text; pairs are the same if both texts are.

    Args:
        test: a separate test set; otherwise `held_out` of the examples.
        validation: share of the rest, used to choose hyperparameters.

    Raises:
        DataError: too few examples of a class to split.
    """
    found = places(examples, test=test, seed=seed, validation=validation, held_out=held_out)
    reported = test if test is not None else examples.take(found.test)
    return Splits(examples.take(found.train), examples.take(found.validation), reported, found.notes)


def places(
    examples: Examples,
    *,
    tokens: Sequence[bytes] = (),
    test: Examples | None = None,
    test_tokens: Sequence[bytes] = (),
    seed: int = 0,
    validation: float = 0.2,
    held_out: float = 0.3,
) -> Places:
    """The examples of each part; see `split`.

    Args:
        tokens, test_tokens: for each example a key of its token ids, by which it is compared, too; empty for those that are
            compared by their texts only.
    """
    folded = [same_text(*texts) for texts in examples.each()]
    keys = _keys(folded, tokens)
    firsts = first_of_each(keys)
    unique = [i for i, first in enumerate(firsts) if i == first]
    notes = _repeated(examples, firsts, len(set(folded)), len(unique))
    if test is not None:
        test_keys = _keys([same_text(*texts) for texts in test.each()], test_tokens)
        unique, remarks = _without(examples, keys, unique, test, test_keys)
        notes += remarks
    counts = Counter(examples.labels[i] for i in unique)
    need = 2 if test is not None else 3
    for index, name in enumerate(examples.classes):
        if counts[index] < need:
            left = " (duplicates are left out)" if len(unique) < len(examples) else ""
            raise DataError(
                f"class {shown(name)} has {counts[index]} examples; at least {need} are needed to split the data{left}"
                + score_hint(examples.classes)
            )
    rest, held = (unique, []) if test is not None else _stratified(examples, unique, held_out, seed, "test")
    train, chosen = _stratified(examples, rest, validation, seed, "validation")
    return Places(train, chosen, held, tuple(notes))


def _keys(folded: Sequence[bytes], tokens: Sequence[bytes]) -> Keys:
    return [(key, own) if own else (key,) for key, own in zip(folded, tokens or [b""] * len(folded))]


def _repeated(examples: Examples, firsts: Sequence[int], different: int, kept: int) -> list[str]:
    """Notes on texts that are left out because they stand there more than once."""
    notes = []
    kind = "pairs of texts" if examples.others else "texts"
    if different < len(examples):
        exact = len({tuple(text.strip() for text in texts) for texts in examples.each()})
        close = exact - different
        how = f" ({close} of them differ in case, spaces or Unicode form)" if close > 0 else ""
        count = len(examples) - different
        notes.append(
            f"{count} duplicate {kind} were left out, so that no {'pair' if examples.others else 'text'} is in two parts{how}"
        )
    if kept < different:
        notes.append(f"{different - kept} {kind} that give the same tokens as another, after cutting, were left out, too")
    other = {first: i for i, first in enumerate(firsts) if examples.labels[first] != examples.labels[i]}
    if other:
        first, again = next(iter(other.items()))
        names = [shown(examples.classes[examples.labels[i]]) for i in (first, again)]
        notes.append(
            f"{len(other)} duplicate {kind} have different labels, and the first was kept: "
            f"{shown(examples.texts[first], 60)} is {names[0]} and {names[1]}"
        )
    return notes


def _without(examples: Examples, keys: Keys, unique: list[int], test: Examples, test_keys: Keys) -> tuple[list[int], list[str]]:
    """The examples that are not in the test file, and notes on those that are."""
    known = {key: label for own, label in zip(test_keys, test.labels) for key in own}
    shared = [i for i in unique if any(key in known for key in keys[i])]
    notes = []
    if shared:
        notes.append(f"{len(shared)} training texts are also in the test file and were left out of training")
    wrong = sum(
        all(known.get(key, examples.labels[i]) != examples.labels[i] for key in keys[i] if key in known) for i in shared
    )
    if wrong:
        notes.append(f"{wrong} of them have another label in the test file")
    again = len(test) - len(set(first_of_each(test_keys)))
    if again:
        notes.append(f"{again} texts of the test file are duplicates, and each counts in the score")
    if len(shared) == len(unique):
        raise DataError("every training text is also in the test file (--eval), so nothing is left to train on")
    out = set(shared)
    return [i for i in unique if i not in out], notes


def _stratified(examples: Examples, indices: list[int], share: float, seed: int, purpose: str) -> tuple[list[int], list[int]]:
    order = random.Random(f"{seed}/{purpose}")
    by_class: list[list[int]] = [[] for _ in examples.classes]
    for i in indices:
        by_class[examples.labels[i]].append(i)
    keep: list[int] = []
    taken: list[int] = []
    for members in by_class:
        order.shuffle(members)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        taken += members[:count]
        keep += members[count:]
    order.shuffle(keep)
    order.shuffle(taken)
    return keep, taken
