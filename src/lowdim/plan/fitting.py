"""The smallest change of a training with which a method fits a memory budget, found from few forecasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from lowdim.catalogue import Variant, variant
from lowdim.errors import check_int
from lowdim.plan.forecasting import Forecast, forecast
from lowdim.results import Result
from lowdim.units import format_bytes, parse_bytes

__all__ = ["Fit", "fit"]

#: Changes of the base's bits, the smallest first, and the bits of a weight.
BITS: dict[str | None, int] = {None: 0, "int8": 8, "nf4": 4}
_HALF, _FULL = "bfloat16", "float32"
_FLAGS = {"batch_size": "--batch-size", "accumulate": "--accumulate", "dtype": "--dtype", "quantize": "--quantize"}

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Fit(Result):
    """How a method fits a budget, or how far it is from it.

    Attributes:
        method, label, kind: of the method, as in its forecast.
        budget_bytes: the budget.
        changes: what differs from the settings that were given, in the names of `forecast`; empty if they fit as they are. If
            nothing fits: the changes with the smallest need that was found.
        forecast: with these changes.
        missing_bytes: by how much the need is above the budget; 0 if it fits.
        tried: the number of forecasts that it took.
    """

    method: str
    label: str
    kind: str
    budget_bytes: int
    changes: dict[str, Any]
    forecast: Forecast
    missing_bytes: int
    tried: int

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.missing_bytes == 0

    @property
    def flags(self) -> str:
        """The changes as options of `lowdim plan`."""
        words = (
            f"{_FLAGS[name]} {value}" if name in _FLAGS else f"--{name.replace('_', '-')}"
            for name, value in self.changes.items()
        )
        return " ".join(words)

    @property
    def summary(self) -> str:
        """One line: the need, and what to change."""
        change = f"with {self.flags}" if self.changes else "as it is"
        if self.fits:
            return f"{self.label}: {format_bytes(self.forecast.total)} {change}"
        return f"{self.label}: {format_bytes(self.missing_bytes)} are missing {change}"

    def __str__(self) -> str:
        return self.summary

    def to_dict(self) -> dict[str, Any]:
        """The fields, and whether it fits, as strict JSON."""
        return {**super().to_dict(), "fits": self.fits}

    def rows(self) -> list[dict[str, Any]]:
        """One row: the method, its need, and the change."""
        need = {"bytes": self.forecast.total, "missing_bytes": self.missing_bytes}
        return [{"method": self.method, "fits": self.fits, **need, "change": self.flags}]


def fit(
    model: Any,
    method: str | Variant,
    budget: int | str,
    *,
    batch_size: int = 16,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    layerwise: bool = False,
    **more: Any,
) -> Fit:
    """The smallest change of the given settings with which training `model` by `method` stays within the budget.

    Changes that leave the results as they are come first: smaller forward passes with accumulation, so that an optimizer step
    sees as many texts as before; gradient checkpointing; layer-wise updates (`lowdim.optim` methods). Among them the fewest, in
    this order. Then bfloat16 weights, with the fewest of these; then, for adapters, a base of 8 bits, and of 4.

    A change is not tried where the parts of an earlier forecast show that it cannot be enough. Between two sizes of a forward
    pass the need lies on or below the straight line, since it is the largest of many amounts that grow linearly.

    Args:
        model, method: as for `forecast`.
        budget: bytes, or a text such as `"24GiB"`.
        batch_size, accumulate, dtype, gradient_checkpointing, layerwise: the settings to change as little as possible.
        more: other arguments of `forecast`, which stay; but `bf16` falls away where the weights become bfloat16.

    Raises:
        UnknownNameError, ValueError, TypeError: from `forecast`, for the settings as they were given.

    Example:
        >>> from lowdim.plan import fit
        >>> how = {"task": "causal-lm", "batch_size": 8, "sequence_length": 512}
        >>> fit("stories260k", "full", "30MiB", **how).flags
        '--batch-size 1 --accumulate 8'
    """
    check_int("batch_size", batch_size, 1)
    check_int("accumulate", accumulate, 1)
    chosen = method if isinstance(method, Variant) else variant(method)
    limit = parse_bytes(budget) if isinstance(budget, str) else budget
    given = {
        "batch_size": batch_size,
        "accumulate": accumulate,
        "dtype": str(dtype).removeprefix("torch."),
        "gradient_checkpointing": gradient_checkpointing,
        "layerwise": layerwise,
        "quantize": more.pop("quantize", None),
    }

    autocast = more.pop("bf16", False)

    def predict(settings: dict[str, Any]) -> Forecast:
        weights = getattr(torch, settings["dtype"])
        casts = autocast and settings["dtype"] == _FULL  # weights in bfloat16 need no cast
        return forecast(model, chosen, budget_bytes=limit, **{**settings, "dtype": weights}, bf16=casts, **more)

    search = _Search(predict, given, limit, chosen.kind)
    changes, found = search.run()
    return Fit(chosen.name, chosen.label, chosen.kind, limit, dict(changes), found, max(0, found.total - limit), search.tried)


class _Search:
    """Looks for the smallest change, given how to forecast a setting.

    Args:
        predict: `settings -> Forecast`.
        given: the settings to change.
        budget: bytes.
        kind: of the method.
    """

    def __init__(self, predict: Callable[[dict[str, Any]], Forecast], given: dict[str, Any], budget: int, kind: str):
        self.predict, self.given, self.budget = predict, given, budget
        batch = given["batch_size"]
        self.passes = [size for size in range(1, batch) if batch % size == 0]
        self.exact: list[Changes] = [self._of_size(1)] if self.passes else []
        if not given["gradient_checkpointing"]:
            self.exact.append({"gradient_checkpointing": True})
        if kind == "optimizer" and not given["layerwise"]:
            self.exact.append({"layerwise": True})
        quantizes = kind == "adapter" and given["quantize"] is None
        self.bits = [name for name in BITS if name is None or quantizes]
        self.dtypes = [None, _HALF] if given["dtype"] == _FULL else [None]
        self.known: dict[tuple[Any, ...], tuple[Changes, Forecast]] = {}
        self.unusable: set[tuple[str, Any]] = set()
        self.tried = 0

    def run(self) -> tuple[Changes, Forecast]:
        """The changes and their forecast; those with the smallest need if nothing fits."""
        start = self._at({})
        assert start is not None
        if start.total <= self.budget:
            return {}, start
        for rounding in self._roundings():
            if (found := self._with(rounding)) is not None:
                return found
        for everything in self._thriftiest(list(self._roundings())[-1]):
            self._at(everything)
        return min(self.known.values(), key=lambda pair: pair[1].total)

    def _with(self, rounding: Changes) -> tuple[Changes, Forecast] | None:
        """The fewest exact changes that are enough besides these, or None."""
        tried = 0
        for subset in self._subsets():
            changes = _merged(rounding, *subset)
            if self._bound(changes) > self.budget:
                continue
            if tried == 1 and not any(self._fits(everything) for everything in self._thriftiest(rounding)):
                return None
            tried += 1
            if self._fits(changes):
                return self._largest_pass(changes)
        return None

    def _roundings(self) -> Iterator[Changes]:
        for bits in self.bits:
            for dtype in self.dtypes:
                changes = {"quantize": bits, "dtype": dtype}
                wanted = {name: value for name, value in changes.items() if value is not None}
                if not self.unusable & set(wanted.items()):
                    yield wanted

    def _subsets(self) -> Iterator[tuple[Changes, ...]]:
        for count in range(len(self.exact) + 1):
            for subset in combinations(self.exact, count):
                if not self.unusable & set(_merged(*subset).items()):
                    yield subset

    def _thriftiest(self, rounding: Changes) -> list[Changes]:
        """All exact changes, with and without smaller passes: accumulated gradients are held, which may cost more."""
        usable = [change for change in self.exact if not self.unusable & set(change.items())]
        whole = [change for change in usable if "batch_size" not in change]
        everything = [_merged(rounding, *usable), _merged(rounding, *whole)]
        return [
            changes for changes in everything[: 1 + bool(self.passes)] if self._bound(changes) <= self.budget
        ] or everything[:1]

    def _of_size(self, size: int) -> Changes:
        """Smaller forward passes, and as many more of them."""
        return {"batch_size": size, "accumulate": self.given["accumulate"] * self.given["batch_size"] // size}

    def _largest_pass(self, changes: Changes) -> tuple[Changes, Forecast]:
        """The same with the largest forward pass that fits."""
        low = self.passes[0] if self.passes else 0
        if "batch_size" not in changes or len(self.passes) == 1:
            return changes, self._known(changes)
        sizes, high = self.passes[1:], None
        while sizes:
            size = self._guess(changes, low, high, sizes)
            if self._fits(_merged(changes, self._of_size(size))):
                low, sizes = size, [s for s in sizes if s > size]
            else:
                high, sizes = size, [s for s in sizes if s < size]
        best = _merged(changes, self._of_size(low))
        return best, self._known(best)

    def _guess(self, changes: Changes, low: int, high: int | None, sizes: list[int]) -> int:
        """The next size to try: the largest; once that is known not to fit, the largest on the line that does."""
        if high is None:
            return sizes[-1]
        needs = [self._known(_merged(changes, self._of_size(size))).total for size in (low, high)]
        slope = (needs[1] - needs[0]) / (high - low)
        below = [size for size in sizes if needs[0] + slope * (size - low) <= self.budget]
        return below[-1] if below else sizes[0]

    def _fits(self, changes: Changes) -> bool:
        found = self._at(changes)
        return found is not None and found.total <= self.budget

    def _known(self, changes: Changes) -> Forecast:
        return self.known[_key(changes)][1]

    def _at(self, changes: Changes) -> Forecast | None:
        """The forecast with these changes; None if one of them cannot be made to this model."""
        if _key(changes) in self.known:
            return self._known(changes)
        if self.unusable & set(changes.items()):
            return None
        try:
            found = self.predict({**self.given, **changes})
        except (ValueError, TypeError):
            blamed = next(
                (name for name in ("quantize", "gradient_checkpointing", "layerwise", "dtype") if name in changes), None
            )
            if blamed is None:
                raise
            self.unusable.add((blamed, changes[blamed]))
            return None
        self.tried += 1
        self.known[_key(changes)] = changes, found
        return found

    def _bound(self, changes: Changes) -> float:
        """Bytes that are needed at least, by what is known of settings that differ by other changes only."""
        settings = {**self.given, **changes}
        return max(
            (
                self._least(earlier, found, settings)
                for earlier, found in self.known.values()
                if earlier.items() <= changes.items()
            ),
            default=0,
        )

    def _least(self, earlier: Changes, found: Forecast, settings: dict[str, Any]) -> float:
        """The least that is left of a forecast's parts when more is changed."""
        before = {**self.given, **earlier}
        new = {name for name in settings if settings[name] != before[name]}
        scale = 0.5 if "dtype" in new else 1.0
        weights = _width(settings) / _width(before)
        gradients = 0.0 if "layerwise" in new else scale
        rest = 0.0 if new & {"batch_size", "gradient_checkpointing"} else scale
        return max(
            part["weights"] * weights
            + part["gradients"] * gradients
            + part["optimizer_state"] * scale
            + (part["activations"] + part["workspace"]) * rest
            for part in found.parts
        )


def _width(settings: Changes) -> int:
    """Bits of a weight of the base."""
    return BITS.get(settings["quantize"], 4) or (32 if settings["dtype"] == _FULL else 16)


def _merged(*changes: Changes) -> Changes:
    return {name: value for change in changes for name, value in change.items()}


def _key(changes: Changes) -> tuple[Any, ...]:
    return tuple(sorted(changes.items()))
