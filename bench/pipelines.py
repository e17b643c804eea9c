"""The shipped recipes of several compressions, run once, and what each step measured.

    python recipes/make_texts.py
    OMP_NUM_THREADS=2 python bench/pipelines.py [--only smollm2] [--finished smollm2=FOLDER] [--out results/pipelines.json]

Rows of a run that is there already (`--finished`) are taken from its folder. Times and speeds are by the clock; the load of the
machine at the end is recorded with them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes" / "compress").glob("*.yaml"))}
#: Of each step; what each layer got and the value of each row stay in the run's own folder.
KEPT = (
    "step", "what", "seconds", "score", "interval", "change", "disk_bytes", "memory_bytes", "cache_bytes", "tokens_per_second",
    "block_errors", "notes",
)  # fmt: skip


def run(name: str, finished: Path | None) -> dict[str, Any]:
    """The record of one recipe, without what is large."""
    from lowdim.pipeline import load_pipeline, run_pipeline
    from lowdim.records import PipelineRecord

    if finished is not None:
        record = PipelineRecord.read(finished)
    else:
        with tempfile.TemporaryDirectory() as folder:
            record = run_pipeline(load_pipeline(RECIPES[name], out=f"{folder}/out"), say=print)
    steps = [{key: value for key, value in step.to_dict().items() if key in KEPT} for step in record.steps]
    recipe = {key: value for key, value in record.recipe.items() if key != "out"}
    return {
        "recipe": name,
        "metric": record.metric,
        "model": record.model,
        "held_out": record.data["test"],
        "settings": recipe,
        "steps": steps,
        "environment": record.environment,
        "load": os.getloadavg()[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=sorted(RECIPES), action="append")
    parser.add_argument("--finished", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    there = {name: Path(folder) for name, _, folder in (text.partition("=") for text in arguments.finished)}
    old = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {"rows": []}
    rows = {row["recipe"]: row for row in old["rows"]}
    for name in arguments.only or RECIPES:
        rows[name] = run(name, there.get(name))
    if arguments.out:
        arguments.out.write_text(json.dumps(record([rows[name] for name in sorted(rows)]), indent=1) + "\n")


def record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, and the circumstances that all of them share; the number of cores may differ."""
    first, *others = (row["environment"] for row in rows)
    return {"environment": {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}, "rows": rows}


if __name__ == "__main__":
    main()
