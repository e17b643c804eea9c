"""Golden folders of `lowdim run` and `lowdim compare`: interrupted runs with a checkpoint, a finished run, a comparison."""

from __future__ import annotations

import io
import json
import shutil
from typing import Any

from golden import bases, curves

FOLDER = bases.FILES / "runs"
COMPARISON = bases.FILES / "comparison"
#: Runs that are interrupted after half of their steps: what each needs from its checkpoint to go on differs.
RESUMED: dict[str, dict[str, Any]] = {
    "galore-8bit": {"method": "galore-8bit"},
    "increlora": {"method": "increlora"},
    "lamda": {"method": "lamda"},
    "low-rank-restart": {"method": "low-rank-restart"},
    "maestro": {"method": "maestro"},
    "sara": {"method": "sara"},
    "sst": {"method": "sst"},
}
FINISHED = {"method": "lora"}
#: Left out of a comparison's folder: what is written anew whenever it is resumed.
_MADE_ANEW = ("report.html", "winner")


def _recipe(changes: dict[str, Any]) -> dict[str, Any]:
    return {"model": "small", "save_steps": curves.STEPS // 2, **changes}


def write_resumed(name: str) -> None:
    """Run to the end; keep the checkpoint in the middle and the numbers of the whole run."""
    with curves.workplace() as place:
        record = curves.run(_recipe(RESUMED[name]), "out")
        numbers = curves.numbers_of(record, place / "out")
        checkpoint = place / "out" / "checkpoints" / f"checkpoint-{curves.STEPS // 2}"
        (checkpoint / "training_args.bin").unlink()  # a pickle of the trainer's, which nothing here reads
        shutil.copytree(checkpoint, FOLDER / name / "checkpoints" / checkpoint.name)
        shutil.copy(place / "out" / "recipe.yaml", FOLDER / name)
    (FOLDER / name / "expected.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def resume(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an interrupted run gives when it goes on now, and what it must give."""
    with curves.workplace() as place:
        shutil.copytree(FOLDER / name, place / "out")
        record = curves.run(_recipe(RESUMED[name]), "out", resume=True)
        numbers = curves.numbers_of(record, place / "out")
    return numbers, json.loads((FOLDER / name / "expected.json").read_text(encoding="utf-8"))


def write_finished(name: str) -> None:
    """A whole run's folder."""
    with curves.workplace() as place:
        curves.run({"model": "small", **FINISHED}, "out")
        shutil.rmtree(place / "out" / "checkpoints", ignore_errors=True)
        shutil.copytree(place / "out", FOLDER / name)


def compare(*, resume: bool) -> dict[str, Any]:
    """The comparison in the current folder, which is a `workplace()`."""
    from rich.console import Console

    from lowdim.comparison import CompareSettings
    from lowdim.comparison import compare as compare_methods

    settings = CompareSettings(
        model="bert", data=("sentences.jsonl",), methods=("linear-probe", "svfit"), seeds=2, rates=1, steps=3, batch_size=8,
        max_length=16,
    )  # fmt: skip
    return compare_methods(settings, "out", resume=resume, console=Console(file=io.StringIO()))


def write_comparison(name: str) -> None:
    """A comparison's folder."""
    with curves.workplace() as place:
        compare(resume=False)
        shutil.copytree(place / "out", COMPARISON, ignore=shutil.ignore_patterns(*_MADE_ANEW))
