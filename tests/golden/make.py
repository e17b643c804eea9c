"""Write the golden files that are missing: what lowdim writes, and what must come of it when it is read again.

    python tests/golden/make.py            # every kind
    python tests/golden/make.py adapters   # one kind

Files that are there are never rewritten: they stand for what users have on their disks. To store another answer on purpose,
delete that file or folder first, run this, and say in the commit why the numbers changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in the same order in every run

from golden import adapters, bases, curves, exports, functions, layers, optimizers, runs


def main(kinds: list[str]) -> None:
    """Write what is missing of these kinds."""
    for kind in bases.KINDS:
        if not (bases.FILES / "bases" / f"{kind}.safetensors").exists():
            bases.write(kind)
    curves.write_models()
    for kind in kinds or WRITERS:
        names, place, write = WRITERS[kind]
        for name in names:
            if not place(name).exists():
                write(name)
                print(f"wrote {kind}/{name}")  # noqa: T201


def _expected(folder: Path) -> Callable[[str], Path]:
    """Where the answers of a golden folder are: they are written last."""
    return lambda name: folder / name / "expected.safetensors"


#: kind -> its names, where the last file of a name is, and what writes it
WRITERS: dict[str, tuple[Iterable[str], Callable[[str], Path], Callable[[str], None]]] = {
    "adapters": (adapters.CASES, _expected(adapters.FOLDER), adapters.write),
    "curves": (curves.cases(), curves.place, curves.write),
    "compressed": (("lord", "welore"), _expected(exports.FOLDER / "compressed"), exports.write_compressed),
    "exports": (("together.safetensors", "intruders.json"), exports.FOLDER.joinpath, exports.write_others),
    "functions": (("functions.safetensors",), bases.FILES.joinpath, functions.write),
    "layers": (layers.CASES, _expected(layers.FOLDER), layers.write),
    "optimizers": (optimizers.CASES, _expected(optimizers.FOLDER), optimizers.write),
    "peft": (exports.PEFT, lambda name: exports.FOLDER / "peft" / name / "errors.json", exports.write_peft),
    "resumed": (runs.RESUMED, lambda name: runs.FOLDER / name / "expected.json", runs.write_resumed),
    "finished": (("lora",), lambda name: runs.FOLDER / name / "run.json", runs.write_finished),
    "comparison": (("comparison.json",), runs.COMPARISON.joinpath, runs.write_comparison),
}

if __name__ == "__main__":
    main(sys.argv[1:])
