"""A budget as people write it, and what was found for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

from lowdim.errors import BudgetError, check_float
from lowdim.units import format_bytes, parse_bytes

__all__ = ["Budget", "Fitted", "check_reachable"]

_SHARE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*x\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A share of what the dense model takes, or a number of bytes.

    Attributes:
        text: as it was written.
        share: in (0, 1); None for a number of bytes.
        size: bytes; None for a share.

    Example:
        >>> from lowdim.jobs.budgets import Budget
        >>> Budget.parse("0.5x").of(1000), Budget.parse("60MiB").of(10**9)
        (500, 62914560)
    """

    text: str
    share: float | None = None
    size: int | None = None

    @classmethod
    def parse(cls, text: str, argument: str = "--budget") -> Self:
        """A budget from `0.5x` (of the dense model) or `60MiB`.

        Raises:
            ValueError: neither; a share outside (0, 1).
        """
        match = _SHARE.fullmatch(text) if isinstance(text, str) else None
        if match:
            share = float(match[1])
            check_float(f"{argument} (a share of the dense model)", share, 0.0, 1.0, low_open=True, high_open=True)
            return cls(text.strip(), share=share)
        try:
            return cls(text.strip(), size=parse_bytes(text))
        except (ValueError, AttributeError):
            raise ValueError(f"{argument} must be a share such as 0.5x, or a size such as 60MiB; got {text!r}") from None

    def of(self, dense: int) -> int:
        """The bytes that are allowed, where the dense model takes `dense`."""
        return self.size if self.size is not None else int((self.share or 0.0) * dense)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Fitted:
    """The settings that were found.

    Attributes:
        config: of the system.
        counted: what the budget counts.
        dense: this much of it for the dense model.
        allowed: by the budget.
        least: the smallest that the system reaches with the options given.
    """

    config: Any
    counted: str
    dense: int
    allowed: int
    least: int

    def to_dict(self) -> dict[str, Any]:
        """For records."""
        return {"counted": self.counted, "dense": self.dense, "allowed": self.allowed, "least": self.least}


def check_reachable(method: str, budget: Budget, counted: str, dense: int, least: int, why: str = "") -> int:
    """The bytes that are allowed.

    Raises:
        BudgetError: less than the system reaches; the smallest that it does reach is named.
        ValueError: not below what the dense model takes.
    """
    allowed = budget.of(dense)
    if allowed >= dense:
        raise ValueError(f"budget {budget} is not below what the dense model takes: {format_bytes(dense)} {counted}")
    if allowed < least:
        raise BudgetError(
            f"budget {budget} is {format_bytes(allowed)} of {format_bytes(dense)} {counted}, which no layer can meet: {method} "
            f"reaches {format_bytes(least)} ({least / dense:.3f}x) at the smallest{f'; {why}' if why else ''}"
        )
    return allowed
