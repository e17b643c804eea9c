"""Labels of any spelling as class indices: `1`, `1.0` and `"1"` are one class, `true` and `True` another; scores are none."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lowdim.errors import DataError, listed, nearest, shown
from lowdim.train.scores import check_no_scores, number

__all__ = ["Labels", "encode_labels", "encode_several", "label_filter"]

_NAN = re.compile(r"[+-]?nan|<na>|nat", re.IGNORECASE)
_INFINITE = re.compile(r"[+-]?inf(?:inity)?", re.IGNORECASE)
_MISSING = re.compile(r"#?n/?a|null|nil|\\n|\?+|-+", re.IGNORECASE)
_TRUTH = {"1": "true", "0": "false"}


@dataclass(frozen=True)
class Labels:
    """Class indices, the names of the classes in order, and what the user should know of them."""

    indices: tuple[Any, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def label_filter(values: Iterable[Any]) -> Callable[[Any], bool]:
    """Whether a value of this column is a label: not empty, not NaN, and not infinite where labels are numbers.

    Example:
        >>> from lowdim.train.labels import label_filter
        >>> is_label = label_filter(["1", "0", "inf", "", None])
        >>> [is_label(value) for value in ("1", "inf", "nan", "", None, float("inf"))]
        [True, False, False, False, False, False]
    """
    different = {value for value in values if isinstance(value, (str, int, float)) and not isinstance(value, bool)}
    numbers = any(not isinstance(value, str) or number(value) is not None for value in different)

    def is_label(value: Any) -> bool:
        if isinstance(value, float):
            return math.isfinite(value)
        text = "" if value is None else str(value).strip()
        return not (not text or _NAN.fullmatch(text) or (numbers and _INFINITE.fullmatch(text)))

    return is_label


def encode_labels(values: Iterable[Any], source: str, classes: Sequence[str] = (), column: str = "") -> Labels:
    """The classes of labels.

    Args:
        values: strings, numbers or booleans, as the files have them.
        source: names of the files, for messages.
        classes: the classes in order, if an earlier file has fixed them; other labels are an error.
        column: name of the column, which may say that numbers are scores.

    Raises:
        DataError: only one class, scores, labels that are no classes, an unknown label.

    Example:
        >>> from lowdim.train.labels import encode_labels
        >>> encode_labels([1, "1.0", "0", 0.0], "a file")
        Labels(indices=(1, 1, 0, 0), classes=('0', '1'), notes=())
    """
    spelt: dict[tuple[type, Any], str] = {}  # each spelling is looked at once, and kept once
    names: list[str] = []
    for value in values:
        key = type(value), value
        if key not in spelt:
            spelt[key] = _spelling(value)
        names.append(spelt[key])
    notes = _one_truth(names, classes)
    counts = Counter(names)
    known = list(classes) if classes else _ordered(counts)
    if len(known) < 2:
        raise DataError(f"{source}: there is only one class ({shown(known[0])}); classification needs at least two")
    if not classes:
        notes += check_no_scores(counts, source, column)
        if len(known) > max(50, len(names) // 2):
            raise DataError(
                f"{source}: the labels have {len(known)} different values in {len(names)} rows, such as {shown(known[0])}; "
                "are they classes? name another column with --label"
            )
        notes += [*_variants(counts, source), *_missing(counts, source), *_joined(counts, source)]
    strange = sorted(set(counts) - set(known))
    if strange:
        raise DataError(_unknown(strange[0], known, source))
    index = {name: i for i, name in enumerate(known)}
    return Labels(tuple(index[name] for name in names), tuple(known), tuple(notes))


def encode_several(rows: Sequence[Sequence[Any]], source: str, classes: Sequence[str] = (), column: str = "") -> Labels:
    """The classes of rows that have any number of them: in `indices` a tuple for each row, in rising order.

    Args, Raises: see `encode_labels`.

    Example:
        >>> from lowdim.train.labels import encode_several
        >>> encode_several([["b", "a"], [], ["a"]], "a file").indices
        ((0, 1), (), (0,))
    """
    flat = [value for row in rows for value in row]
    if not flat and not classes:
        raise DataError(f"{source}: no row has a label")
    found = encode_labels(flat, source, classes, column)
    each = iter(found.indices)
    indices = tuple(tuple(sorted({next(each) for _ in row})) for row in rows)
    return Labels(indices, found.classes, found.notes)


def _spelling(value: Any) -> str:
    """The one name for all spellings of a label."""
    text = unicodedata.normalize("NFC", " ".join(str(value).split())).removeprefix("__label__")
    if text.lower() in ("true", "false"):
        return text.lower()
    amount = number(text)
    if amount is None or re.match(r"[+-]?0\d", text):  # 007 is a code
        return text
    return str(int(amount)) if amount == int(amount) else repr(amount)


def _one_truth(names: list[str], classes: Sequence[str]) -> list[str]:
    """Where labels are written as `true` and `false` and as 1 and 0, they get one name, in place."""
    found = set(names) | set(classes)
    numbers, words = found & set(_TRUTH), found & set(_TRUTH.values())
    if not (numbers and words):
        return []
    if not found <= {*_TRUTH, *_TRUTH.values()}:
        both = listed(map(repr, sorted(numbers | words)))
        return [f"labels {both} are different classes; give them one spelling if they are not"]
    to_words = bool(words & set(classes)) or not classes
    alias = _TRUTH if to_words else {word: digit for digit, word in _TRUTH.items()}
    names[:] = [alias.get(name, name) for name in names]
    return ["labels 1 and true are one class, and 0 and false"]


def _variants(counts: Counter[str], source: str) -> list[str]:
    """Labels that differ in little more than case or spaces."""
    groups: dict[str, list[str]] = {}
    for name in sorted(counts):
        groups.setdefault(_loose(name), []).append(name)
    return [
        f"{source}: labels {listed(f'{shown(name)} ({counts[name]} rows)' for name in group)} differ only in case, spaces or "
        "signs and are different classes; give them one spelling if they are not"
        for group in groups.values()
        if len(group) > 1
    ][:5]


def _missing(counts: Counter[str], source: str) -> list[str]:
    """Labels by which programs mark that there is none."""
    marks = [name for name in counts if _MISSING.fullmatch(name)]
    return [
        f"{source}: label {shown(name)} ({counts[name]} rows) is trained as a class; leave these rows out if it means that "
        "they have no label"
        for name in marks
    ]


def _joined(counts: Counter[str], source: str) -> list[str]:
    """Labels that look like several in one string."""
    for mark in (";", "|", ","):
        joined = [name for name in counts if mark in name]
        parts = {part.strip() for name in joined for part in name.split(mark)}
        if len(joined) > len(parts) or (len(joined) > 1 and parts <= {*counts} - {*joined}):
            return [
                f"{source}: {len(joined)} labels hold {mark!r}, such as {shown(joined[0])}, and each is trained as one class; "
                f"if they are several labels of a text, name what separates them with --label-separator {mark!r}"
            ]
    return []


def _loose(name: str) -> str:
    """A name without case, spaces, punctuation between words, marks that cannot be seen, and zeros before a number."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    plain = "".join(c for c in plain if unicodedata.category(c) not in ("Cf", "Zs", "Pd", "Pc"))
    return re.sub(r"^0+(?=\d)", "", plain.strip("\"'.,;:!")) or name


def _unknown(name: str, known: Sequence[str], source: str) -> str:
    wanted = _loose(name)
    close = [other for other in known if _loose(other) == wanted] or nearest(name, known, 1)
    return (
        f"{source}: label {shown(name)} does not occur in the training data (classes: {listed(known)}); "
        f"nearest: {shown(close[0])}"
    )


def _ordered(labels: Iterable[str]) -> list[str]:
    return sorted(labels, key=lambda c: (0, int(c), c) if re.fullmatch("-?[0-9]{1,18}", c) else (1, 0, c))
