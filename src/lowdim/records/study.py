"""What the records of a study of one model have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowdim.records.base import Record

__all__ = ["StudyRecord"]


@dataclass(frozen=True, kw_only=True)
class StudyRecord(Record):
    """One model that is changed in several ways and scored on the same rows.

    Attributes:
        title, created: of the page; when, as ISO 8601.
        command, environment: command line, versions and hardware.
        metric, higher_is_better: of the scores.
        model, data: name and sizes.
    """

    title: str
    created: str
    command: str
    metric: str
    higher_is_better: bool
    model: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
