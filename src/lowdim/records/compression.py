"""The record of a compression: `compression.json`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from lowdim.records.base import Record

__all__ = ["CompressionRecord"]


@dataclass(frozen=True, kw_only=True)
class CompressionRecord(Record):
    """A compression. The file has no key `settings`: each of the settings is a key itself, after `method`.

    Attributes:
        settings: the method's options, and the details of its report.
        ranks: layer -> rank of what replaced it (None: it is not a product).
        tune_steps, stage_steps, lr, trained, losses: of the tuning afterwards, or of the stage in which the dense model
            teaches: steps, rate, how many numbers were trained, the losses.
        parameters: of the model before and after.
        perplexity: on held-out blocks: before, after, and after tuning where there was one.
        data: the data it was measured on.
    """

    file: ClassVar[str] = "compression.json"
    what: ClassVar[str] = "the record of a compression"

    method: str
    settings: dict[str, Any]
    ranks: dict[str, int | None] | None = None
    tune_steps: int | None = None
    stage_steps: int | None = None
    lr: float | None = None
    trained: int | None = None
    losses: list[float | None] | None = None
    parameters: list[int]
    perplexity: list[float | None]
    data: list[str]

    def left_out(self) -> set[str]:
        """Fields that are None, such as those of the tuning without one."""
        return {name for name, value in vars(self).items() if value is None}

    def to_dict(self) -> dict[str, Any]:
        """The record as written to the file."""
        values = super().to_dict()
        return {"method": values.pop("method"), **values.pop("settings"), **values}

    @classmethod
    def from_dict(cls, values: Any, source: str | Path) -> Self:
        """The record with the values of such a file; see `Record.from_dict`."""
        if isinstance(values, dict):
            own = {field.name for field in fields(cls)}
            known = {name: value for name, value in values.items() if name in own}
            values = {**known, "settings": {name: value for name, value in values.items() if name not in own}}
        return super().from_dict(values, source)
