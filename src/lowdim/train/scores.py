"""Labels that measure something, and so are no classes."""

from __future__ import annotations

import re
from collections import Counter

from lowdim.errors import DataError, listed, shown

__all__ = ["check_no_scores", "measure", "number", "score_hint"]

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:[eE][+-][0-9]+)?|[0-9]+\.[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?)")
#: A number with a decimal comma, thousands, a currency, a share of a whole, or a unit.
_MEASURE = re.compile(
    r"[€$£¥]?\s*(?P<sign>[+-]?)(?P<number>[0-9]{1,3}(?:[,' ][0-9]{3})+(?:\.[0-9]+)?|[0-9]*[.,]?[0-9]+(?:[eE][+-]?[0-9]+)?)"
    r"\s*(?P<unit>%|/\s*[0-9]+|[€$£¥]|°?[cf]|[km]?g|lbs?|oz|[kcm]?m|mi|ft|m?s|min|h|hrs?|days?|years?|yrs?|[kmg]b|usd|eur|gbp"
    r"|pts?|points?|stars?|percent|pct|k)?",
    re.IGNORECASE,
)
_CLASSES = 10  # so many different whole numbers may be classes whatever they are
_SCORE_NAME = re.compile(
    r"score|rating|percent|price|amount|similarity|relatedness|grade|points|probability|confidence|(?:^|[_\W])(?:age|year|value)s?$",
    re.IGNORECASE,
)
_ROUND = (100, 1000)  # the ends of scales


def number(text: str) -> float | None:
    """The number that a string is written as, None if it is another string.

    Example:
        >>> from lowdim.train.scores import number
        >>> number("1.50"), number("one"), number("1e3"), number("1.0e3")
        (1.5, None, None, 1000.0)
    """
    if not _NUMBER.fullmatch(text):
        return None
    if len(text) > 300:
        return None
    amount = int(text) if text[1:].isdigit() or text.isdigit() else float(text)
    return amount if abs(amount) < 1e300 else None


def check_no_scores(counts: Counter[str], source: str, column: str = "") -> list[str]:
    """What the user should know of labels that are numbers.

    Args:
        counts: rows of each label.
        column: name of the column that holds them.

    Raises:
        DataError: they look like measurements: fractions, or many whole numbers that do not count classes.
    """
    amounts = {name: amount for name in counts if (amount := _amount(name)) is not None}
    if 2 * sum(counts[name] for name in amounts) < counts.total() or len(amounts) < 3:
        return []
    values = sorted(set(amounts.values()))
    first, last, different = values[0], values[-1], len(values)
    about = f"{different} different numbers from {first:.6g} to {last:.6g}"
    fractions = any(value != int(value) for value in values) or any("%" in name or "/" in name for name in amounts)
    ids = not _SCORE_NAME.search(column) and _counts_classes(values, counts.total())
    if fractions or (different > _CLASSES and not ids):
        some = listed(list(map(shown, amounts))[:4])
        raise DataError(
            f"{source}: the labels look like scores or measurements, not like classes: {about}, such as {some}. "
            "Classes have no order: train on the numbers with --task regress, make a few classes of their ranges (low, high), "
            "or name another column with --label. If each number is a class, write it as a word (class 1.5)"
        )
    if different > _CLASSES or (different > 3 and last - first + 1 > different and last >= _CLASSES):
        return [
            f"{source}: the labels are {about} and are trained as classes, which have no order; if they are scores, train on "
            "them with --task regress"
        ]
    return []


def score_hint(classes: tuple[str, ...]) -> str:
    """What to add to a message on rare classes whose names are numbers."""
    numbers = [name for name in classes if _amount(name) is not None]
    if len(numbers) < 3 or 2 * len(numbers) < len(classes):
        return ""
    return f". The labels are numbers ({listed(numbers, 60)}): if they are scores, train on them with --task regress"


def _counts_classes(values: list[float], rows: int) -> bool:
    """Whether whole numbers look like class 0 to n (or 1 to n) of a data set with several rows of each."""
    first, last = values[0], values[-1]
    covered = len(values) / (last - first + 1)
    return first in (0, 1) and last not in _ROUND and covered >= 0.9 and rows >= 5 * len(values)


def measure(text: str) -> tuple[float, str] | None:
    """The number in a measurement, and the unit, currency or whole that stands beside it; None if it is another string.

    Example:
        >>> from lowdim.train.scores import measure
        >>> measure("$1,500.50"), measure("7 / 10"), measure("7 of 10")
        ((1500.5, '$'), (7.0, '/10'), None)
    """
    found = _MEASURE.fullmatch(text)
    if not found:
        return None
    digits = found["number"]
    if re.fullmatch(r"[0-9]{1,3}(?:[,' ][0-9]{3})+(?:\.[0-9]+)?", digits):
        digits = re.sub(r"[,' ]", "", digits)
    amount = float(digits.replace(",", "."))
    beside = text[: found.start("sign")] + text[found.end("number") :]
    return -amount if found["sign"] == "-" else amount, "".join(beside.split()).lower()


def _amount(name: str) -> float | None:
    plain = number(name)
    if plain is not None:
        return plain
    found = measure(name)
    return None if found is None else found[0]
