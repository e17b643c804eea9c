"""Draw the page of a comparison or run again from its record."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from lowdim.errors import CheckpointError, DataError
from lowdim.locking import exclusive
from lowdim.outputs import output_file

__all__ = ["report"]


def report(source: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a comparison or of a run.

    Args:
        source: `comparison.json`, `run.json`, or a folder that holds one.
        out: the page; None writes it to the record's folder.

    Returns:
        The path of the page.

    Raises:
        DataError: there is no record.
        CheckpointError: it is damaged, or another type of file.
        FileExistsError: the page is a file that lowdim did not write.
        InUseError: another command works on the page, or on the folder in which it lies.
    """
    source = Path(source)
    candidates = [source / "comparison.json", source / "run.json"] if source.is_dir() else [source]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise DataError(f"{source} holds neither comparison.json nor run.json")
    page = Path(out) if out is not None else found.parent / "report.html"
    at_home = page.absolute().parent == found.absolute().parent
    with exclusive(found.parent) if at_home else nullcontext(), output_file(page):
        return _draw(found, page)


def _draw(found: Path, page: Path) -> Path:
    from lowdim.files import read_json
    from lowdim.report import write, write_run

    record = read_json(found)
    if not isinstance(record, dict) or not {"methods", "losses", "failure"} & set(record):
        raise CheckpointError(f"{found} is not a record of `lowdim compare` or `lowdim run`")
    (write if "methods" in record else write_run)(record, page)
    return page
