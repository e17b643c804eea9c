"""Output folders of jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lowdim.locking import exclusive
from lowdim.temporary import clear_temporaries, is_temporary

__all__ = ["new_folder"]


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """An output folder for this command alone, which must be empty or not exist.

    Raises:
        FileExistsError: it is a file, or not empty.
        InUseError: another command works on it.
    """
    out = Path(out)
    with exclusive(out):
        clear_temporaries(out)
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"{out} is a file; name a folder")
        if out.is_dir() and not all(map(is_temporary, out.iterdir())):
            raise FileExistsError(f"{out} is not empty; name another folder")
        yield out
