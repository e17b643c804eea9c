"""The labels of a file's rows as they stand there: one class, several classes, or a number in each row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lowdim.errors import DataError, listed, shown
from lowdim.train.labels import label_filter
from lowdim.train.profiles import blank
from lowdim.train.scores import measure, number

__all__ = ["Marks", "check_numbers", "marks_of", "to_numbers"]

_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_MOST_WORDS = 0.05  # of the rows of a column of numbers


@dataclass(frozen=True)
class Marks:
    """How the labels of a column are read.

    Attributes:
        several: whether a row has any number of classes.
        separator: between the classes of a row that is written as one string.
        fits: whether a value that is there is a label; others are left out and counted.
    """

    several: bool
    separator: str | None
    fits: Callable[[Any], bool]

    def missing(self, value: Any) -> bool:
        """Whether there is no label: an empty list is one, and says that no class fits."""
        return blank(value) and not (self.several and isinstance(value, list))

    def names(self, value: Any) -> list[Any]:
        """The classes of a row with several."""
        return value if self.separator is None else [part.strip() for part in str(value).split(self.separator) if part.strip()]


def marks_of(values: Sequence[Any], column: str, source: object, *, numbers: bool, separator: str | None) -> Marks:
    """How the labels of a column are read.

    Args:
        numbers: whether each is a number (task regress).
        separator: what the user named as standing between several classes of a row.

    Raises:
        DataError: lists among single labels, lists of something else than labels, one 0 or 1 for each class, a separator that
            nowhere stands.
    """
    lists = [value for value in values if isinstance(value, list)]
    if numbers:
        known = to_numbers(values)
        return Marks(
            False, None, lambda value: isinstance(value, (str, int, float)) and not isinstance(value, bool) and value in known
        )
    if separator is not None:
        _check_separator(values, separator, column, source)
        return Marks(True, separator, lambda value: not isinstance(value, (list, dict)))
    if not lists:
        return Marks(False, None, label_filter(values))
    single = next((value for value in values if not isinstance(value, list) and not blank(value)), None)
    if single is not None:
        raise DataError(
            f"{source}: column {shown(column)} holds lists of labels and single ones, such as {shown(lists[0])} and "
            f"{shown(single)}; write a list in each row ([{shown(single)}])"
        )
    for found in lists:
        if any(blank(part) or isinstance(part, (list, dict)) for part in found):
            raise DataError(f"{source}: column {shown(column)}: {shown(found)} is no list of labels (texts or numbers)")
    _check_indicators(lists, column, source)
    return Marks(True, None, lambda value: True)


def check_numbers(kept: int, odd: Sequence[Any], column: str, source: object) -> None:
    """Raise if many of the labels are words.

    Raises:
        DataError: more than one in twenty; the error names the task for classes.
    """
    if len(odd) > _MOST_WORDS * (kept + len(odd)):
        raise DataError(
            f"{source}: {len(odd)} of {kept + len(odd)} values of column {shown(column)} are not numbers, such as "
            f"{listed(map(shown, dict.fromkeys(map(str, odd[:20]))), 60)}: write numbers, all in one unit; or train on classes "
            "with --task classify, or name another column with --label"
        )


def to_numbers(values: Iterable[Any]) -> dict[Any, float]:
    """The number that each value is written as; values that are none are not in it.

    A comma is a decimal point, unless every one of them separates thousands. A unit may stand beside the numbers if it is the
    same one everywhere.

    Example:
        >>> from lowdim.train.marks import to_numbers
        >>> to_numbers(["2.5", "3,5", 4, "n/a"]), to_numbers(["1,500", "900"]), to_numbers(["7/10", "8.5/10"])
        ({'2.5': 2.5, '3,5': 3.5, 4: 4.0}, {'1,500': 1500.0, '900': 900.0}, {'7/10': 7.0, '8.5/10': 8.5})
    """
    different = sorted({value for value in values if _plain(value)}, key=str)
    commas = [value.strip() for value in different if isinstance(value, str) and "," in value]
    mark = "" if commas and all(_THOUSANDS.fullmatch(value) for value in commas) else "."
    found: dict[Any, float] = {}
    for value in different:
        amount = number(value.strip().replace(",", mark)) if isinstance(value, str) else value
        if amount is not None and math.isfinite(amount):
            found[value] = float(amount)
    measured = {value: found_in for value in different if isinstance(value, str) and (found_in := measure(value.strip()))}
    if not found and len({unit for _, unit in measured.values()}) == 1:
        return {value: amount for value, (amount, _) in measured.items()}
    return found


def _plain(value: Any) -> bool:
    """Whether it is a string or a number."""
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _check_separator(values: Sequence[Any], separator: str, column: str, source: object) -> None:
    if any(isinstance(value, list) for value in values):
        raise DataError(f"{source}: column {shown(column)} holds lists; leave --label-separator {shown(separator)} out")
    if not separator.strip() and separator != "\t" and separator != " ":
        raise DataError(f"--label-separator must be what stands between labels, such as ';'; got {shown(separator)}")
    if not any(isinstance(value, str) and separator in value for value in values):
        raise DataError(f"{source}: no label in column {shown(column)} holds --label-separator {shown(separator)}")


def _check_indicators(lists: Sequence[list[Any]], column: str, source: object) -> None:
    """Refuse lists of one length of zeros and ones: they may be class 0 and class 1, or yes and no for each class."""
    lengths = {len(found) for found in lists}
    width = max(lengths)
    if len(lengths) == 1 and width > 1 and {part for found in lists for part in found} <= {0, 1}:
        raise DataError(
            f"{source}: column {shown(column)} holds {width} zeros and ones in each row, such as {shown(lists[0])}: this "
            'may be yes or no for each class; write the names of the classes that a row has (["a", "c"])'
        )
