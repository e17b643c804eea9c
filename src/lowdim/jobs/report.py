"""Draw the page of a comparison or run again from its record."""

from __future__ import annotations

from pathlib import Path

from lowdim.errors import CheckpointError, DataError

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
    """
    from lowdim.files import read_json
    from lowdim.report import write, write_run

    source = Path(source)
    candidates = [source / "comparison.json", source / "run.json"] if source.is_dir() else [source]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise DataError(f"{source} holds neither comparison.json nor run.json")
    record = read_json(found)
    if not isinstance(record, dict) or not {"methods", "losses", "failure"} & set(record):
        raise CheckpointError(f"{found} is not a record of `lowdim compare` or `lowdim run`")
    page = Path(out) if out is not None else found.parent / "report.html"
    (write if "methods" in record else write_run)(record, page)
    return page
