"""How the shared cases compare an answer with its formula, and how they check that wrong input is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["Refusal", "agrees", "disagreements", "refuses"]

#: exception type, a word of its message, what raises it
Refusal = tuple[type[Exception], str, Callable[[], Any]]


def refuses(refusals: Iterable[Refusal]) -> None:
    """Check that each call raises that error, with that word in its message."""
    for kind, word, call in refusals:
        try:
            call()
            message = None
        except kind as error:
            message = str(error)
        assert message is not None, f"no {kind.__name__} about {word!r}"
        assert word in message, f"message lacks {word!r}: {message}"


def agrees(got: Any, want: Any, tolerance: float, unchecked: Mapping[str, str] | None = None) -> None:
    """Check that an answer equals its formula; the message lists every place where it does not. See `disagreements`."""
    found = disagreements(got, want, tolerance, unchecked or {})
    assert not found, "\n".join(found)


def disagreements(got: Any, want: Any, tolerance: float, unchecked: Mapping[str, str], where: str = "answer") -> list[str]:
    """Where an answer differs from what a formula says.

    Args:
        got: numbers, texts, arrays, tensors, sequences or mappings of them, dataclasses.
        want: the same; for a dataclass a mapping from names of fields or properties. Every field must be among them or in
            `unchecked`, so that no field goes without a formula by oversight.
        tolerance: largest error relative to the largest entry of `want`. Integers, texts and booleans must be equal.
        unchecked: field -> why it has no formula.
    """
    if isinstance(want, Mapping) and dataclasses.is_dataclass(got):
        fields = {field.name for field in dataclasses.fields(got)}
        forgotten = sorted(fields - set(want) - set(unchecked))
        found = [f"{where}.{name} has no formula: give one in expected(), or a reason in `unchecked`" for name in forgotten]
        for name, value in want.items():
            found += disagreements(getattr(got, name), value, tolerance, unchecked, f"{where}.{name}")
        return found
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping) or list(got) != list(want):
            return [f"{where} has the keys {list(got)}; want {list(want)}"]
        return [x for key in want for x in disagreements(got[key], want[key], tolerance, unchecked, f"{where}[{key!r}]")]
    if want is None or isinstance(want, (str, bool)):
        return [] if type(got) is type(want) and got == want else [f"{where} is {got!r}; want {want!r}"]
    if isinstance(want, (list, tuple)) and any(not _is_number(value) for value in want):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            return [f"{where} is {got!r}; want {len(want)} entries"]
        pairs = enumerate(zip(got, want))
        return [x for i, (a, b) in pairs for x in disagreements(a, b, tolerance, unchecked, f"{where}[{i}]")]
    return _numbers_differ(_array(got), _array(want), tolerance, where)


def _numbers_differ(got: np.ndarray, want: np.ndarray, tolerance: float, where: str) -> list[str]:
    if got.dtype.kind not in "iufcb":
        return [f"{where} is {got.tolist()!r}; want numbers"]
    if got.shape != want.shape:
        return [f"{where} has shape {got.shape}; want {want.shape}"]
    if want.dtype.kind in "iub":
        return [] if np.array_equal(got, want) else [f"{where} is {got.tolist()}; want {want.tolist()}"]
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return [f"{where} differs where the formula is not finite"]
    scale = float(np.abs(want[finite]).max(initial=0.0)) or 1.0
    error = float(np.abs(got[finite] - want[finite]).max(initial=0.0)) / scale
    return [] if error <= tolerance else [f"{where} is off by {error:.3g} of its largest entry; allowed {tolerance:g}"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    return np.asarray(value)
