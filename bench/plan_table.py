"""The forecasts of docs/choosing.md: `python bench/plan_table.py` writes results/plan-minilm.json.

It asks what `lowdim plan --model minilm --task classify --batch-size 16 --length 48 --json` asks. Forecasts are computed, not
measured; they depend on the versions of torch and transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lowdim.files import write_json
from lowdim.train.environment import environment

RESULTS = Path(__file__).parents[1] / "results" / "plan-minilm.json"
WORDS = ["plan", "--model", "minilm", "--task", "classify", "--batch-size", "16", "--length", "48", "--json"]


def main() -> None:
    done = subprocess.run([sys.executable, "-m", "lowdim", *WORDS], capture_output=True, text=True, check=True)
    rows = [{key: value for key, value in row.items() if "seconds" not in key} for row in json.loads(done.stdout)]
    what = "Forecasts of peak memory; times, which depend on the machine, are left out."
    write_json(RESULTS, {"command": f"lowdim {' '.join(WORDS)}", "what": what, "environment": environment(), "forecasts": rows})


if __name__ == "__main__":
    main()
