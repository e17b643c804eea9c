"""The input and the output of a reproduction."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowdim.catalogue import find
from lowdim.errors import DataError

__all__ = ["Check", "Context", "Outcome"]


@dataclass(frozen=True)
class Check:
    """One inequality that must hold: `value relation bound`, e.g. 0.91 >= 0.89."""

    name: str
    value: float
    relation: str  # ">=" or "<="
    bound: float

    @property
    def passed(self) -> bool:
        """Whether it holds; a NaN never does."""
        return self.value >= self.bound if self.relation == ">=" else self.value <= self.bound


@dataclass
class Outcome:
    """Numbers of a reproduction; the paper's claim is that of the system's row in the catalogue."""

    slug: str
    setting: str
    rows: list[dict[str, Any]] = field(default_factory=list)  # the table that is printed: one dict a line
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # honest limits

    @property
    def claim(self) -> str:
        """The paper's main claim."""
        return find(self.slug).claim

    @property
    def verdict(self) -> str:
        """`holds`, `partly` or `does not hold`, from the checks alone."""
        passed = sum(check.passed for check in self.checks)
        if not self.checks:
            return "nothing was checked"
        return "holds" if passed == len(self.checks) else "partly" if passed else "does not hold"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able record."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return {"slug": self.slug, "claim": self.claim, **asdict(self), "checks": checks, "verdict": self.verdict}


@dataclass
class Context:
    """The context of a reproduction: its data, and progress messages."""

    data: Path | None = None
    quick: bool = False  # fewer seeds and steps: shows that it runs, proves nothing
    say: Callable[[str], None] = lambda line: None

    def file(self, relative: str, source: str) -> Path:
        """The path of a data file under `--data` (or `$LOWDIM_DATA`).

        Raises:
            DataError: the file does not exist; `source` says where to get it.
        """
        root = self.data or (Path(os.environ["LOWDIM_DATA"]) if os.environ.get("LOWDIM_DATA") else None)
        if root is None:
            raise DataError(f"--data DIR (or LOWDIM_DATA) must name a folder that holds {relative} ({source})")
        path = root / relative
        if not path.is_file():
            raise DataError(f"{path} does not exist; get it from {source} and keep this relative path")
        return path
