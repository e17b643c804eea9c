"""Output folders of jobs."""

from __future__ import annotations

from pathlib import Path

__all__ = ["check_free"]


def check_free(out: Path) -> None:
    """Raise FileExistsError unless `out` is an empty folder, or does not exist."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name another folder")
