"""May the index of an old model stay? Two files of embeddings of the same items, and a page with the answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowdim.errors import DataError
from lowdim.jobs.page_or_record import page_or_record
from lowdim.train.embedding_files import read_labels, read_mask, read_vectors

if TYPE_CHECKING:
    from lowdim.represent import ReplacementReport

__all__ = ["IndexCheckSettings", "index_check"]


@dataclass(frozen=True, kw_only=True)
class IndexCheckSettings:
    """Two files, and who asks.

    Attributes:
        old, new: embeddings of the same items in the same order, `FILE` or `FILE:KEY`.
        labels: a file with a label for each item; None for an index without classes.
        query: a file that says which items ask; None draws half of each class.
        k: neighbours that are compared where there are no labels.
        seed: of the split and of the intervals.
        out: the page (.html) or the record (.json); None writes nothing.
    """

    old: str
    new: str
    labels: str | None = None
    query: str | None = None
    k: int = 10
    seed: int = 0
    out: str | Path | None = None


def index_check(settings: IndexCheckSettings) -> ReplacementReport:
    """Read the files, judge, and write the page.

    Raises:
        DataError: a file that cannot be read, or files of unlike length.
        ValueError: see `lowdim.represent.replacement_report`.
        FileExistsError: the page is a file that lowdim did not write.
    """
    from lowdim.report import write_replacement

    names = {"old": str(settings.old), "new": str(settings.new), "labels": settings.labels}
    return page_or_record(
        settings.out, lambda: _judged(settings), lambda report: {**report.to_dict(), **names}, write_replacement
    )


def _judged(settings: IndexCheckSettings) -> ReplacementReport:
    from lowdim.represent import replacement_report

    old, new = read_vectors(settings.old), read_vectors(settings.new)
    if len(old) != len(new):
        raise DataError(
            f"{settings.old} has {len(old):,} rows and {settings.new} {len(new):,}; both must hold the same items in the same "
            "order"
        )
    labels = None if settings.labels is None else read_labels(settings.labels, len(old))
    query = None if settings.query is None else read_mask(settings.query, len(old))
    return replacement_report(old, new, labels, query=query, k=min(settings.k, len(old) - 1), seed=settings.seed)
