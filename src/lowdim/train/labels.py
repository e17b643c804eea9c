"""Labels of any spelling as class indices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lowdim.errors import DataError, listed, shown

__all__ = ["Labels", "encode_labels"]


@dataclass(frozen=True)
class Labels:
    """Class indices, the names of the classes in order, and what the user should know of them."""

    indices: tuple[int, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def encode_labels(values: Sequence[Any], source: str, classes: Sequence[str] = ()) -> Labels:
    """The classes of labels.

    Args:
        values: strings, numbers or booleans, as the files have them.
        source: names of the files, for messages.
        classes: the classes in order, if an earlier file has fixed them; other labels are an error.

    Raises:
        DataError: only one class, labels that are no classes, an unknown label.
    """
    names = [_spelling(value) for value in values]
    known = list(classes) if classes else _ordered(set(names))
    if len(known) < 2:
        raise DataError(f"{source}: there is only one class ({shown(known[0])}); classification needs at least two")
    if not classes and len(known) > max(50, len(names) // 2):
        raise DataError(
            f"{source}: the labels have {len(known)} different values in {len(names)} rows, such as {shown(known[0])}; "
            "are they classes? name another column with --label"
        )
    strange = sorted(set(names) - set(known))
    if strange:
        raise DataError(f"{source}: label {shown(strange[0])} does not occur in the training data (classes: {listed(known)})")
    index = {name: i for i, name in enumerate(known)}
    return Labels(tuple(index[name] for name in names), tuple(known))


def _spelling(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _ordered(labels: Iterable[str]) -> list[str]:
    return sorted(labels, key=lambda c: (0, int(c), c) if re.fullmatch("-?[0-9]{1,18}", c) else (1, 0, c))
