"""One file as the output of a job: a page for people, or a record for programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lowdim.errors import DataError
from lowdim.files import write_json
from lowdim.outputs import output_file

__all__ = ["page_or_record"]

T = TypeVar("T")


def page_or_record(
    out: str | Path | None,
    measure: Callable[[], T],
    record_of: Callable[[T], dict[str, Any]],
    write_page: Callable[[dict[str, Any], Path], Any],
) -> T:
    """Measure, and write the result to `out`; what would stand in the way is said before anything is measured.

    Args:
        out: the page (.html) or the record (.json); None writes nothing.
        record_of: of the result, what the page shows.

    Raises:
        DataError: another ending.
        FileExistsError: a folder, or a file that lowdim did not write.
        InUseError: another command writes it.
    """
    if out is None:
        return measure()
    out = Path(out)
    if out.suffix not in (".html", ".json"):
        raise DataError(f"--out must end in .html or .json; got {out}")
    with output_file(out):
        result = measure()
        record = record_of(result)
        if out.suffix == ".json":
            write_json(out, record, sealed=True)
        else:
            write_page(record, out)
    return result
