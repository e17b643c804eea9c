"""Train every shipped recipe in a process of its own and record time, memory and scores, in results/recipes.json.

Run: `python bench/recipes.py [NAME ...]`; named recipes replace their rows. `make tables` writes recipes/README.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "recipes.json"
MAKERS = ("make_digits.py", "make_sentences.py", "make_texts.py")


def measured(name: str, folder: Path) -> dict[str, Any]:
    """One recipe: the whole command's time and memory, and what its record says."""
    out = folder / name
    command = [sys.executable, __file__, "child", str(ROOT / "recipes" / f"{name}.yaml"), str(out)]
    begun = time.monotonic()
    printed = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.monotonic() - begun
    record = json.loads((out / "run.json").read_text())
    cpu, process = json.loads(printed.splitlines()[-1])
    kept = ("method", "label", "trained_parameters", "metric", "before", "validation", "before_test", "test")
    return {
        "recipe": name,
        **{key: record.get(key) for key in kept},
        **({"verdict": record["replacement"]["verdict"]} if "replacement" in record else {}),
        "model": record["recipe"]["model"],
        "task": record["recipe"]["task"],
        "steps": record["recipe"]["steps"],
        "batch_size": record["recipe"]["batch_size"],
        "peak_bytes": record["measured_peak_bytes"],
        "process_bytes": process,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "cpu": record["environment"]["cpu"],
    }


def child(recipe: str, out: str) -> None:
    """The command itself; prints the CPU seconds and the largest resident size of the process."""
    from lowdim.cli.main import main as command

    sys.argv = ["lowdim", "run", recipe, "--out", out]
    try:
        command()
    except SystemExit as end:
        if end.code:
            raise
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
        return
    shipped = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*shipped, []], help="recipes; all by default")
    named = parser.parse_args().names
    names = named or shipped
    from lowdim.train.environment import environment

    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    rows = {row["recipe"]: row for row in record["rows"]}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        for maker in MAKERS:
            subprocess.run([sys.executable, str(ROOT / "recipes" / maker)], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for name in names:
            rows[name] = measured(name, Path(folder))
            shutil.rmtree(Path(folder) / name)
            print(rows[name], flush=True)
    kept = [rows[name] for name in shipped if name in rows]
    circumstances = record["environment"] if named and "environment" in record else environment()  # each row has its CPU
    found = {"command": "python bench/recipes.py", "rows": kept, "environment": circumstances}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
