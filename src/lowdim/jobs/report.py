"""Draw the page of a comparison, run or pipeline again from its record."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from lowdim.errors import CheckpointError, DataError
from lowdim.locking import exclusive
from lowdim.outputs import output_file

__all__ = ["report"]

_RECORDS = ("comparison.json", "run.json", "pipeline.json", "families.json")


def report(source: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a comparison, a run or a pipeline.

    Args:
        source: `comparison.json`, `run.json`, `pipeline.json`, `families.json`, or a folder that holds one.
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
    candidates = [source / name for name in _RECORDS] if source.is_dir() else [source]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise DataError(f"{source} holds none of {', '.join(_RECORDS)}")
    page = Path(out) if out is not None else found.parent / "report.html"
    at_home = page.absolute().parent == found.absolute().parent
    with exclusive(found.parent) if at_home else nullcontext(), output_file(page):
        return _draw(found, page)


def _draw(found: Path, page: Path) -> Path:
    from lowdim.files import read_json
    from lowdim.report import write, write_families, write_pipeline, write_run

    record = read_json(found)
    if not isinstance(record, dict) or not {"methods", "losses", "failure", "steps", "runs"} & set(record):
        raise CheckpointError(f"{found} is not a record of `lowdim compare`, `lowdim run` or `lowdim compress --steps`")
    ways = {"methods": write, "losses": write_run, "failure": write_run, "runs": write_families}
    next((way for key, way in ways.items() if key in record), write_pipeline)(record, page)
    return page
