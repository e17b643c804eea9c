"""Learning rates that a comparison has measured: `rates.json`, and what became of them in `comparison.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lowdim.records.base import Record

__all__ = ["MeasuredRate", "MeasuredRates", "RatesRecord"]


@dataclass(frozen=True, kw_only=True)
class MeasuredRate(Record):
    """The rate of one method that was measured from the curvature of its loss, and what the search says of it.

    Attributes:
        method, label: its name, and its name in tables.
        size: rank, or what takes its place; None for methods without one.
        lr: the rate that is tried; None: it could not be measured.
        limit: the stable limit of Adam's steps, of which `lr` is a stated part.
        eigenvalue, error: the largest of the preconditioned Hessian, and Lanczos' bound.
        idle: trained parameters without a gradient, which are left out.
        clipped: the measured rate was beyond the range that is tried, and `lr` is the end of it.
        reason: why there is no rate, or no comparison with the usual rates.
        survived: whether it was left at the end of the search; None: it was not tried.
        steps: the last rung at which it and a usual rate of the same size were scored.
        usual: the best usual rate there.
        difference, half_width: its score there less that of the best usual rate, higher is better, with the half-width of the
            95 % interval over the validation rows (None: no score for each row).
    """

    method: str
    label: str
    size: int | None = None
    lr: float | None = None
    limit: float | None = None
    eigenvalue: float | None = None
    error: float | None = None
    idle: int = 0
    clipped: bool = False
    reason: str = ""
    survived: bool | None = None
    steps: int | None = None
    usual: float | None = None
    difference: float | None = None
    half_width: float | None = None

    @property
    def curvature(self) -> str:
        """The largest eigenvalue with its error as a share, of 0.01 % at least; empty where there is none.

        Example:
            >>> from lowdim.records import MeasuredRate
            >>> MeasuredRate(method="lora", label="LoRA", eigenvalue=924.1, error=0.7).curvature
            '924.1 ± 0.08 %'
        """
        if not self.eigenvalue or self.error is None:
            return ""
        return f"{self.eigenvalue:.4g} ± {max(0.01, 100 * self.error / abs(self.eigenvalue)):.1g} %"

    def left_out(self) -> set[str]:
        """What is not known."""
        return {name for name, value in vars(self).items() if value is None or value == ""}


@dataclass(frozen=True, kw_only=True)
class MeasuredRates(Record):
    """The measurements, as they are kept beside the runs, so that `--resume` tries the same rates.

    Attributes:
        fingerprint: of the settings and the data that decide the numbers.
    """

    file: ClassVar[str] = "rates.json"
    what: ClassVar[str] = "the measured rates of a comparison"

    fingerprint: str
    rates: list[MeasuredRate] = field(default_factory=list)


@dataclass(frozen=True)
class RatesRecord(Record):
    """Whether the measured rates helped.

    Attributes:
        origin: how they were measured.
        judged: the unit of differences, as in `JudgementRecord`.
        how: what was measured, in sentences.
        sentence: what came of it over all methods.
    """

    origin: str
    judged: str
    rates: list[MeasuredRate]
    how: str = ""
    sentence: str = ""
