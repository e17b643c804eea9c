"""Write the golden files that are missing: what lowdim writes, and what must come of it when it is read again.

    python tests/golden/make.py            # every kind
    python tests/golden/make.py adapters   # one kind

Files that are there are never rewritten: they stand for what users have on their disks. To store another answer on purpose,
delete that file or folder first, run this, and say in the commit why the numbers changed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in the same order in every run

from golden import adapters, bases, curves


def main(kinds: list[str]) -> None:
    """Write what is missing of these kinds."""
    for kind in bases.KINDS:
        if not (bases.FILES / "bases" / f"{kind}.safetensors").exists():
            bases.write(kind)
    for kind in kinds or WRITERS:
        for name in WRITERS[kind]():
            print(f"wrote {kind}/{name}")  # noqa: T201


def _adapters() -> list[str]:
    missing = [name for name in adapters.CASES if not (adapters.FOLDER / name / "expected.safetensors").exists()]
    for name in missing:
        adapters.write(name)
    return missing


def _curves() -> list[str]:
    if not curves.MODELS.exists():
        curves.write_models()
    missing = [name for name in curves.cases() if not curves.place(name).exists()]
    for name in missing:
        curves.write(name)
    return missing


WRITERS = {"adapters": _adapters, "curves": _curves}

if __name__ == "__main__":
    main(sys.argv[1:])
