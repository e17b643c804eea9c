"""The demo's comparison in one process, in two, and on a local Ray of two workers of which one is killed, in results/ray.json.

    python bench/workers.py one          one process with all threads of the machine
    python bench/workers.py thread       one process with one thread, whose numbers the following must have to the bit
    python bench/workers.py workers      two processes with one thread each
    python bench/workers.py ray          a local Ray of two workers, one of which is killed after a third of the runs

Each part replaces its entry of the file and keeps the others. Numbers are compared with those that `thread` has left in --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).resolve().parents[1] / "results" / "ray.json"
PARTS = {
    "one": [],
    "thread": ["--threads", "1"],
    "workers": ["--threads", "1", "--workers", "2"],
    "ray": ["--threads", "1", "--workers", "2", "--ray", "local"],
}
#: What a clock decides, or whoever trained.
_OTHER = {"seconds_per_step", "created", "seconds", "command", "settings", "checksum"}


def numbers(value: Any) -> Any:
    """A record without what depends on the clock or on who trained."""
    if isinstance(value, dict):
        return {key: numbers(each) for key, each in value.items() if key not in _OTHER}
    return [numbers(each) for each in value] if isinstance(value, list) else value


def records(folder: Path) -> dict[str, Any]:
    """Every record of a comparison, by its path."""
    files = [folder / "comparison.json", *(folder / "runs").rglob("run.json")]
    return {file.relative_to(folder).as_posix(): numbers(json.loads(file.read_text())) for file in files}


def killed(process: subprocess.Popen[bytes], folder: Path, runs: int) -> str | None:
    """Wait for the command; once so many runs have ended, kill a Ray worker that trains. Returns the worker's title."""
    title = None
    while process.poll() is None:
        time.sleep(0.05)
        if title is None and len(list((folder / "runs").rglob("run.json"))) >= runs:
            for each in psutil.Process(process.pid).children(recursive=True):
                with_title = " ".join(each.cmdline())
                if with_title.startswith("ray::_train"):
                    title = with_title
                    each.kill()
                    break
    return title


def compared(part: str, place: Path, steps: int | None) -> dict[str, Any]:
    """One comparison as a command of its own."""
    folder, reference = place / part, place / "thread"
    shutil.rmtree(folder, ignore_errors=True)
    shown = ["compare", *PARTS[part], "--time-limit", "10h", *([] if steps is None else ["--steps", str(steps)])]
    before, begun = os.times(), time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "lowdim", *shown, "--out", str(folder)], stderr=subprocess.PIPE)
    title = killed(process, folder, len(list((reference / "runs").rglob("run.json"))) // 3) if part == "ray" else None
    said = process.communicate()[1].decode()
    seconds, after = time.monotonic() - begun, os.times()
    if process.returncode:
        raise SystemExit(f"{part} ended with {process.returncode}: {said}")
    found: dict[str, Any] = {
        "command": "lowdim " + " ".join(shown),
        "seconds": round(seconds, 1),
        "runs": len(list((folder / "runs").rglob("run.json"))),
        "headline": json.loads((folder / "comparison.json").read_text())["judgement"]["headline"],
    }
    if part == "ray":
        assert title is not None
        found |= {"killed": title.strip(), "said": [line for line in said.splitlines() if "lost" in line]}
    else:  # Ray's workers are no children of the command
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        found["cpu_seconds"] = round(spent, 1)
    if part in ("workers", "ray") and reference.is_dir():
        own, expected = records(folder), records(reference)
        found["same_tree_and_numbers_as_one_process"] = own == expected
        found["records_that_differ"] = sorted(name for name in own.keys() | expected if own.get(name) != expected.get(name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()) / "lowdim-bench-workers", help="of the comparisons"
    )
    parser.add_argument("--steps", type=int, help="of each run, for a try")
    options = parser.parse_args()
    if set(options.parts) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    from lowdim.train.environment import environment

    for part in options.parts or PARTS:
        load = round(os.getloadavg()[0], 1)  # of other programs: wall times mean little on a busy machine
        found = compared(part, options.out, options.steps) | {"load_average_before": load}
        print(json.dumps({part: found}, indent=1), flush=True)
        record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        record[part] = found
        record["environment"] = environment()
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
