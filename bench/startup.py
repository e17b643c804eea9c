"""What `import lowdim` adds to importing torch, and how long `lowdim --help` takes: medians over fresh processes.

Run: `python bench/startup.py [--runs 7] [--out results/bench-startup.json]`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

CASES = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import torch, lowdim": [sys.executable, "-c", "import torch, lowdim"],
    "import torch, lowdim and its seven families": [
        sys.executable,
        "-c",
        "import torch\nfrom lowdim import adapters, compress, diagnose, layers, optim, represent, solve",
    ],
    "lowdim --help": [sys.executable, "-m", "lowdim", "--help"],
    "lowdim list": [sys.executable, "-m", "lowdim", "list"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(options.runs + 1):  # the first run warms the disk cache and is not counted
        for name, command in CASES.items():
            begun = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    median = {name: round(statistics.median(times), 3) for name, times in seconds.items()}
    base = median["import torch"]
    record = {
        "command": "python bench/startup.py",
        "runs": options.runs,
        "median_seconds": median,
        "added_by_lowdim": round(median["import torch, lowdim"] - base, 3),
        "added_by_all_families": round(median["import torch, lowdim and its seven families"] - base, 3),
        "environment": {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()},
    }
    print(json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
