"""How small can an embedding be? Quality, bytes and time of an encoder at each (layers, dimensions), and a page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowdim.errors import check_float, check_int, shown
from lowdim.jobs.page_or_record import page_or_record

if TYPE_CHECKING:
    from lowdim.represent import SizeTable

__all__ = ["SizesOutcome", "SizesSettings", "parse_numbers", "sizes"]


@dataclass(frozen=True, kw_only=True)
class SizesSettings:
    """One encoder, or two, and pairs of texts.

    Attributes:
        model: a folder, a hub id, or `minilm`.
        data: files of pairs, with or without scores; of triplets the first two texts are read.
        beside: another model, such as the untouched one, measured in the same way.
        text, label: columns of the texts (with a comma) and of the score; None finds them.
        layers, dims: to measure; None means all layers, and halves of the dimensions.
        limit: pairs that are read at most.
        within: how much quality the smallest size may lose.
        vectors: for which the index is counted.
        batch_size, repeats, seed: as in `lowdim.represent.size_table`.
        out: the page (.html) or the record (.json); None writes nothing.
    """

    model: str
    data: tuple[str, ...]
    beside: str | None = None
    text: str | None = None
    label: str | None = None
    layers: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None
    limit: int | None = 2000
    within: float = 0.01
    vectors: int = 1_000_000
    batch_size: int = 32
    repeats: int = 5
    seed: int = 0
    out: str | Path | None = None


@dataclass(frozen=True)
class SizesOutcome:
    """The table of the model, and of the one beside it.

    Attributes:
        notes: columns that are used, and rows that were left out.
    """

    table: SizeTable
    beside: SizeTable | None
    notes: tuple[str, ...]


def sizes(settings: SizesSettings) -> SizesOutcome:
    """Measure, and write the page.

    Raises:
        DataError: pairs that cannot be read. UnknownNameError: no such model or column.
        ValueError: layers or dimensions that the model does not have.
        FileExistsError: the page is a file that lowdim did not write.
    """
    from lowdim.report import write_sizes

    check_float("--within", settings.within, 0.0)
    for name, value in (("--vectors", settings.vectors), ("--limit", settings.limit)):
        if value is not None:
            check_int(name, value, 1)
    return page_or_record(settings.out, lambda: _measured(settings), lambda outcome: _record(outcome, settings), write_sizes)


def parse_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Whole numbers with commas.

    Raises:
        ValueError: anything else.

    Example:
        >>> from lowdim.jobs import parse_numbers
        >>> parse_numbers("--dims", "32, 64"), parse_numbers("--dims", None)
        ((32, 64), None)
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be whole numbers with commas, such as 32,64; got {shown(text)}") from None


def _measured(settings: SizesSettings) -> SizesOutcome:
    from lowdim.train.text_pairs import read_pairs

    read = read_pairs(settings.data, text=settings.text, score=settings.label)
    pairs: tuple[Any, ...] = tuple(column[: settings.limit] for column in read.columns[:2])
    notes = [used.sentence for used in read.used] + list(read.notes)
    if settings.limit is not None and len(read) > settings.limit:
        notes.append(f"the first {settings.limit:,} of {len(read):,} pairs are measured (--limit)")
    if read.scores is not None:
        pairs = (*pairs, read.scores[: settings.limit])
    beside = None if settings.beside is None else _table(settings.beside, pairs, settings)
    return SizesOutcome(_table(settings.model, pairs, settings), beside, tuple(notes))


def _table(model: str, pairs: tuple[Any, ...], settings: SizesSettings) -> SizeTable:
    from lowdim.models import load_sentence_encoder
    from lowdim.represent import size_table

    return size_table(
        load_sentence_encoder(model),
        pairs,
        layers=settings.layers,
        dims=settings.dims,
        batch_size=settings.batch_size,
        repeats=settings.repeats,
        seed=settings.seed,
    )


def _record(outcome: SizesOutcome, settings: SizesSettings) -> dict[str, Any]:
    return {
        **outcome.table.to_dict(),
        "name": settings.model,
        "data": ", ".join(settings.data),
        "within": settings.within,
        "vectors": settings.vectors,
        "smallest": asdict(outcome.table.smallest(settings.within)),
        "beside": None if outcome.beside is None else {**outcome.beside.to_dict(), "name": settings.beside},
    }
