"""Training, validation and test parts that share no text."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowdim.errors import DataError, shown
from lowdim.train.repeats import first_of_each, same_text
from lowdim.train.scores import score_hint

if TYPE_CHECKING:
    from lowdim.train.data import Examples

__all__ = ["Places", "Splits", "first_rows", "places", "split", "stratified"]

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
    """Which examples are in which part.

    Attributes:
        validation: places in the validation file, where there is one.
        test: empty where there is a test file.
    """

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
    chosen: Examples | None = None,
    chosen_tokens: Sequence[bytes] = (),
    seed: int = 0,
    validation: float = 0.2,
    held_out: float = 0.3,
) -> Places:
    """The examples of each part; see `split`.

    Args:
        tokens, test_tokens, chosen_tokens: for each example a key of its token ids, by which it is compared, too; empty for
            those that are compared by their texts only.
        chosen: a separate validation set. What is in a later set is left out of the earlier ones: test before validation
            before training.
    """
    folded = [same_text(*texts) for texts in examples.each()]
    keys = _keys(folded, tokens)
    firsts = first_of_each(keys)
    unique = [i for i, first in enumerate(firsts) if i == first]
    notes = _repeated(examples, firsts, len(set(folded)), len(unique))
    files = [
        _File("test", "--eval", test, _keys(map(_folded, test.each()), test_tokens)) if test else None,
        _File("validation", "--validation", chosen, _keys(map(_folded, chosen.each()), chosen_tokens)) if chosen else None,
    ]
    kept: list[int] = list(range(len(chosen))) if chosen else []
    if files[0] and files[1]:
        kept, remarks = _without(files[1].examples, files[1].keys, kept, files[0], "validation")
        notes += [note for note in remarks if "of the test file" not in note]
    for file in files:
        if file is not None:
            unique, remarks = _without(examples, keys, unique, file, "training")
            notes += remarks
    _check_enough(examples, unique, need=1 + (test is None) + (chosen is None))
    rest, held = (unique, []) if test is not None else stratified(examples, unique, held_out, seed, "test")
    train, own = (rest, kept) if chosen is not None else stratified(examples, rest, validation, seed, "validation")
    return Places(train, own, held, tuple(notes))


def _check_enough(examples: Examples, unique: Sequence[int], need: int) -> None:
    """Raise unless each part can hold every class."""
    left = " (duplicates are left out)" if len(unique) < len(examples) else ""
    if not examples.classes and len(unique) < max(2, need):
        raise DataError(f"there are {len(unique)} examples; at least {max(2, need)} are needed to split the data{left}")
    counts = Counter(one for i in unique for one in (examples.labels[i] if examples.several else (examples.labels[i],)))
    for index, name in enumerate(examples.classes):
        if counts[index] < need:
            raise DataError(
                f"class {shown(name)} has {counts[index]} examples; at least {need} are needed to split the data{left}"
                + score_hint(examples.classes)
            )


@dataclass(frozen=True)
class _File:
    """A file of its own for one part."""

    part: str
    option: str
    examples: Examples
    keys: Keys


def _folded(texts: tuple[str, ...]) -> bytes:
    return same_text(*texts)


def _keys(folded: Iterable[bytes], tokens: Sequence[bytes]) -> Keys:
    return [(key, own) if own else (key,) for key, own in zip(folded, tokens or itertools.repeat(b""))]


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
        names = [examples.label(i) for i in (first, again)]
        notes.append(
            f"{len(other)} duplicate {kind} have different labels, and the first was kept: "
            f"{shown(examples.texts[first], 60)} is {names[0]} and {names[1]}"
        )
    return notes


def _without(examples: Examples, keys: Keys, unique: list[int], file: _File, part: str) -> tuple[list[int], list[str]]:
    """The examples of a part that are not in a file, and notes on those that are."""
    known = {key: label for own, label in zip(file.keys, file.examples.labels) for key in own}
    shared = [i for i in unique if any(key in known for key in keys[i])]
    notes = []
    if shared:
        notes.append(f"{len(shared)} {part} texts are also in the {file.part} file and were left out of {part}")
    wrong = sum(
        all(known.get(key, examples.labels[i]) != examples.labels[i] for key in keys[i] if key in known) for i in shared
    )
    if wrong:
        notes.append(f"{wrong} of them have another label in the {file.part} file")
    again = len(file.examples) - len(set(first_of_each(file.keys)))
    if again:
        notes.append(f"{again} texts of the {file.part} file are duplicates, and each counts in the score")
    if len(shared) == len(unique):
        left = "nothing is left to train on" if part == "training" else "nothing is left to choose on"
        raise DataError(f"every {part} text is also in the {file.part} file ({file.option}), so {left}")
    out = set(shared)
    return [i for i in unique if i not in out], notes


def first_rows(train: Sequence[int], labels: Sequence[Any], limit: int) -> list[int]:
    """The first `limit` training examples, with one of each class before others.

    Args:
        labels: of all examples: a class, a tuple of classes, or a number, which is none.
    """
    firsts: set[int] = set()
    seen: set[int] = set()
    for at, i in enumerate(train):
        own = {labels[i]} if isinstance(labels[i], int) else set(labels[i]) if isinstance(labels[i], tuple) else set()
        if not own <= seen:
            firsts.add(at)
            seen |= own
    if limit < len(firsts):
        raise DataError(f"limit must be at least {len(firsts)}, one example of each class; got {limit}")
    others = [at for at in range(len(train)) if at not in firsts]
    return [train[at] for at in sorted([*firsts, *others[: limit - len(firsts)]])]


def stratified(examples: Examples, indices: list[int], share: float, seed: int, purpose: str) -> tuple[list[int], list[int]]:
    """Examples that are kept and examples that are taken, each class in the same proportion; both in random order.

    Args:
        share: that is taken; of each class at least one, and at least one is kept.
    """
    order = random.Random(f"{seed}/{purpose}")
    if examples.several:
        keep, taken = _several(examples, indices, share, order)
    elif examples.classes:
        keep, taken = _by_class(examples, indices, share, order)
    else:
        shuffled = order.sample(indices, len(indices))
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        keep, taken = shuffled[count:], shuffled[:count]
    order.shuffle(keep)
    order.shuffle(taken)
    return keep, taken


def _by_class(examples: Examples, indices: list[int], share: float, order: random.Random) -> tuple[list[int], list[int]]:
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
    return keep, taken


def _several(examples: Examples, indices: list[int], share: float, order: random.Random) -> tuple[list[int], list[int]]:
    """Class by class, the rarest first, so that its few examples are on both sides.

    Source: K. Sechidis, G. Tsoumakas, I. Vlahavas, ECML PKDD 2011, 145-158.

    Raises:
        DataError: a class would be on one side only.
    """
    labels = examples.labels
    counts = Counter(one for i in indices for one in labels[i])
    sides: tuple[list[int], list[int]] = ([], [])  # kept, taken
    have: tuple[Counter[int], Counter[int]] = (Counter(), Counter())

    def put(side: int, rows: Sequence[int]) -> None:
        sides[side].extend(rows)
        have[side].update(one for i in rows for one in labels[i])

    waiting = order.sample(indices, len(indices))
    for one in sorted(counts, key=lambda one: (counts[one], one)):
        own = [i for i in waiting if one in labels[i]]
        want = min(max(1, round(share * counts[one])), counts[one] - 1) - have[1][one]
        most = len(own) - (have[0][one] == 0)  # one is kept
        count = max(0, min(want, most))
        put(1, own[:count])
        put(0, own[count:])
        waiting = [i for i in waiting if one not in labels[i]]
    put(1, waiting[: round(share * len(waiting))])
    put(0, waiting[round(share * len(waiting)) :])
    for side in (0, 1):
        for one in set(counts) - set(have[side]):
            spare = [i for i in sides[1 - side] if one in labels[i] and all(have[1 - side][other] > 1 for other in labels[i])]
            if not spare:
                name = shown(examples.classes[one])
                raise DataError(
                    f"class {name} is in {counts[one]} examples, beside other rare classes, and cannot be in every part: "
                    "leave it out, or name files of their own with --eval and --validation"
                )
            sides[1 - side].remove(spare[0])
            have[1 - side].subtract(labels[spare[0]])
            put(side, spare[:1])
    return sides
