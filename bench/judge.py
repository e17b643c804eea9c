"""What `lowdim compare` costs, on sentences of film reviews (MiniLM, 20 steps of 16), in results/bench-judge.json.

    python bench/judge.py overhead      share of a run that is no pass or step; seconds to the first step
    python bench/judge.py halving       19 adapters, 3 rates, 2 sizes, up to 3 seeds: about five minutes on two cores
    python bench/judge.py halving --workers 2
    python bench/judge.py exhaustive    the same with every candidate trained to its end: about half an hour
    python bench/judge.py halving --fast --workers 2
                                        with --bf16 --group-by-length; also for exhaustive, as an entry of its own
    python bench/judge.py rates         whether rates from curvature help, on the shipped text and sentences: about ten minutes;
                                        in results/measured-rates.json
    python bench/judge.py ranks         whether ranks and pruning ratios from FARMS help: half an hour; in
                                        results/layer-ranks.json

Each part replaces its entry of the file and keeps the others. `--out DIR` keeps the comparison, `--resume` continues it there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "bench-judge.json"
DEMO = ["compare", "--task", "classify", "--rates", "3", "--sizes", "2", "--seeds", "3", "--steps", "20", "--time-limit", "10h"]
FAST = ["--bf16", "--group-by-length"]
OVERHEAD = ["lora", "full", "lamda", "galore"]
RATES = RESULTS.with_name("measured-rates.json")
LAYER_RANKS = RATES.with_name("layer-ranks.json")
#: Comparisons with a measured rate for each method: a language model on the shipped text as `make demo`, and the sentences.
MEASURED = {
    "text": ["--task", "causal-lm", "--data", "lowdim:shakespeare", "--steps", "60", "--max-length", "64",
             "--methods", "full,lora,galore,lamda,randlora,lora-xs,svfit"],
    "sentences": ["--task", "classify", "--steps", "20", "--max-length", "40",
                  "--methods", "linear-probe,full,lora,lamda,svfit"],
}  # fmt: skip


class Meter:
    """CPU seconds of this process, all threads, by part. The outermost part counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.first_step: tuple[float, float] | None = None  # CPU seconds of the process, and the time
        self._open = False

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to this part."""
        if self._open:
            yield
            return
        self._open, begun = True, time.process_time()
        try:
            yield
        finally:
            self._open = False
            self.seconds[name] += time.process_time() - begun
            self.counts[name] += 1

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Calls of this function belong to this part."""
        inner: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if name == "forward" and self.first_step is None:
                self.first_step = (time.process_time(), time.time())
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, attribute, timed)


def measured_compare(folder: str, method: str) -> None:
    """One comparison of one method in this process; prints what its runs took, as JSON."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from lowdim.cli.main import main
    from lowdim.comparison import crew
    from lowdim.methods import Applied
    from lowdim.train.tasks.classify import Classification

    meter, runs = Meter(), []
    meter.wrap(Applied, "loss", "forward")
    meter.wrap(torch.Tensor, "backward", "backward")
    meter.wrap(Classification, "outcomes", "scoring")
    open_steps: list[contextlib.AbstractContextManager[None]] = []

    def begin(*_: Any) -> None:
        open_steps.append(meter.part("step"))
        open_steps[-1].__enter__()

    register_optimizer_step_pre_hook(begin)
    register_optimizer_step_post_hook(lambda *_: open_steps.pop().__exit__(None, None, None))
    perform = crew.perform

    def timed(*args: Any, **kwargs: Any) -> Any:
        before, begun = dict(meter.seconds), time.process_time()
        record = perform(*args, **kwargs)
        spent = {name: meter.seconds[name] - before.get(name, 0.0) for name in ("forward", "backward", "step", "scoring")}
        runs.append({"phase": record.phase, "total": time.process_time() - begun, **spent})
        return record

    crew.perform = timed  # type: ignore[attr-defined]
    sys.argv = ["lowdim", *DEMO, "--methods", method, "--rates", "1", "--sizes", "1", "--seeds", "3", "--out", folder]
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
        main()
    assert meter.first_step is not None
    cpu, wall = meter.first_step
    print(json.dumps({"runs": runs, "cpu_to_first_step": cpu, "wall_to_first_step": wall - float(os.environ["BEGUN"])}))


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over fresh processes, each on one thread."""
    rows, cpu, wall = [], [], []
    for method in OVERHEAD:
        shares, scoring, totals = [], [], []
        for _ in range(options.runs):
            with tempfile.TemporaryDirectory() as folder:
                child = [sys.executable, __file__, "child", "--out", folder, "--method", method]
                environment = {**os.environ, "BEGUN": str(time.time()), "OMP_NUM_THREADS": "1"}
                out = subprocess.run(child, check=True, stdout=subprocess.PIPE, env=environment, text=True).stdout
            found = json.loads(out.splitlines()[-1])
            cpu.append(found["cpu_to_first_step"])
            wall.append(found["wall_to_first_step"])
            for run in found["runs"]:
                if run["phase"] == "seed":
                    work = run["forward"] + run["backward"] + run["step"]
                    shares.append(1.0 - (work + run["scoring"]) / run["total"])
                    scoring.append(run["scoring"] / run["total"])
                    totals.append(run["total"])
        rows.append(
            {
                "method": method,
                "runs": len(totals),
                "cpu_seconds": round(statistics.median(totals), 2),
                "overhead_share": round(statistics.median(shares), 3),
                "scoring_share": round(statistics.median(scoring), 3),
            }
        )
        print(rows[-1], flush=True)
    return {
        "command": "python bench/judge.py overhead",
        "what": "CPU time on one thread of the runs of the final: 20 steps of 16 sentences, scored on 300 test sentences; "
        "overhead is neither forward, backward, optimizer step nor the forward passes of scoring",
        "methods": rows,
        "cpu_seconds_to_first_step": round(statistics.median(cpu), 1),
        "seconds_to_first_step": round(statistics.median(wall), 1),
    }


def compared(options: argparse.Namespace, search: str) -> dict[str, Any]:
    """One comparison of all adapters, as a command of its own."""
    folder = options.out or Path(tempfile.mkdtemp()) / search
    command = [*DEMO, "--methods", "adapters", "--search", search, "--out", str(folder)]
    if options.workers is not None:
        command += ["--workers", str(options.workers)]
    if options.fast:
        command += FAST
    before, begun = os.times(), time.monotonic()
    resume = ["--resume"] if options.resume else []
    subprocess.run([sys.executable, "-m", "lowdim", *command, *resume], check=True)
    seconds, after = time.monotonic() - begun, os.times()
    record = json.loads((folder / "comparison.json").read_text())
    rows = {row["name"]: row for row in record["methods"]}
    judged = record["judgement"]
    times = {
        "seconds": round(seconds, 1),
        "seconds_of_the_comparison": record["seconds"],
        "cpu_seconds": round(after.children_user + after.children_system - before.children_user - before.children_system, 1),
    }
    return {
        "command": "lowdim " + " ".join(part for part in command if part != str(folder) and part != "--out"),
        **({"resumed": True} if options.resume else times),  # the times of a part would say nothing
        "search_steps": record["search"]["steps"],
        "exhaustive_search_steps": record["search"]["exhaustive_steps"],
        "candidates": len({(v["method"], v["lr"], v["size"]) for v in record["search"]["visits"]}),
        "final_steps": sum(len(row["scores"]) for row in rows.values() if not row.get("trivial")) * 20,
        "seeds": judged["seeds"],
        "half_width": judged["half_width"],
        "may_be_best": judged["may_be_best"],
        "headline": judged["headline"],
        "chosen": {name: {"lr": row["lr"], "size": row.get("size"), "mean": row["mean"]} for name, row in rows.items()},
    }


def measured_rates(options: argparse.Namespace) -> dict[str, Any]:
    """What `--rates curvature` found in each comparison."""
    folder, found = options.out or Path(tempfile.mkdtemp()), {}
    for name, how in MEASURED.items():
        command = ["compare", *how, "--rates", "curvature", "--seeds", "3", "--time-limit", "10h"]
        resume = ["--resume"] if options.resume and (folder / name).is_dir() else []
        subprocess.run([sys.executable, "-m", "lowdim", *command, "--out", str(folder / name), *resume], check=True)
        record = json.loads((folder / name / "comparison.json").read_text())
        rows = {row["name"]: row for row in record["methods"] if not row.get("trivial")}
        finals = {key: {"lr": row["lr"], "origin": row.get("lr_origin", ""), "mean": row["mean"]} for key, row in rows.items()}
        found[name] = {
            "command": "lowdim " + " ".join(command),
            **record["rates"],
            "headline": record["judgement"]["headline"],
            "metric": record["metric"]["name"],
            "chosen": finals,
        }
    return {"command": "python bench/judge.py rates", **found}


#: Name -> a comparison with ranks by layer beside uniform ones.
RANKS = {
    "language": [
        "--task",
        "causal-lm",
        "--methods",
        "lora,lora-xs,lamda",
        "--rates",
        "3",
        "--steps",
        "60",
        "--max-length",
        "64",
    ],
    "sentences": [
        "--task",
        "classify",
        "--methods",
        "lora,lora-xs,lamda",
        "--rates",
        "2",
        "--steps",
        "20",
        "--max-length",
        "40",
    ],
}
RATIOS = ["compare", "--compress", "--methods", "magnitude,magnitude+uniform,magnitude+farms", "--budget", "0.7x,0.5x"]


def ranks(options: argparse.Namespace) -> dict[str, Any]:
    """Ranks by layer from FARMS against one rank, and pruning ratios from FARMS against one ratio, each judged by the rule."""
    from lowdim.records import difference_text

    folder = options.out or Path(tempfile.mkdtemp())
    resume = ["--resume"] if options.resume else []
    found: dict[str, Any] = {}
    for name, how in RANKS.items():
        command = ["compare", *how, "--sizes", "2", "--seeds", "3", "--ranks", "farms", "--time-limit", "10h"]
        subprocess.run([sys.executable, "-m", "lowdim", *command, "--out", str(folder / name), *resume], check=True)
        record = json.loads((folder / name / "comparison.json").read_text())
        found[name] = {
            "command": f"lowdim {' '.join(command)}",
            "sentence": record["ranks"]["sentence"],
            "judged": record["judgement"]["judged"],
            "seeds": record["judgement"]["seeds"],
            "pairs": [
                {
                    **pair,
                    "text": difference_text(record["judgement"]["judged"], pair["difference"], pair["half_width"]),
                    "means": [
                        next(r["mean"] for r in record["methods"] if r["name"] == pair["method"] + end)
                        for end in ("", "+farms")
                    ],
                }
                for pair in record["ranks"]["pairs"]
            ],
            "lowest_and_highest_exponent": [pick(record["ranks"]["exponents"].values()) for pick in (min, max)],
            "ranks": {method: [min(r.values()), max(r.values())] for method, r in record["ranks"]["layers"].items()},
        }
    command = [*RATIOS, "--steps", "20", "--seeds", "3"]
    subprocess.run([sys.executable, "-m", "lowdim", *command, "--out", str(folder / "ratios"), *resume], check=True)
    record = json.loads((folder / "ratios" / "families.json").read_text())
    names = dict.fromkeys(run["method"] for run in record["runs"])
    found["ratios"] = {
        "command": f"lowdim {' '.join(command)}",
        "levels": [
            {
                "budget": level["budget"],
                "headline": level["headline"],
                "perplexity": {
                    name: statistics.fmean(
                        r["score"] for r in record["runs"] if (r["method"], r["budget"]) == (name, level["budget"])
                    )
                    for name in names
                },
            }
            for level in record["levels"]
        ],
    }
    return {"command": "python bench/judge.py ranks", **found}


def product_speed() -> dict[str, float]:
    """Billions of operations a second of one core, in products of the sizes of MiniLM's feed-forward layers."""
    import torch

    found = {}
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(512, 384, dtype=dtype), torch.ones(1536, 384, dtype=dtype)
        times = []
        for _ in range(200):
            begun = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - begun)
        found[str(dtype).removeprefix("torch.")] = round(2 * 512 * 384 * 1536 / statistics.median(times) / 1e9, 1)
    return found


def agreement(record: dict[str, Any], suffix: str = "") -> dict[str, Any] | None:
    """How the two confidence sets compare."""
    names = [f"{search}{suffix}" for search in ("halving", "exhaustive")]
    if not set(names) <= set(record):
        return None
    halving, grid = (set(record[name]["may_be_best"]) for name in names)
    return {
        "in_both": sorted(halving & grid),
        "halving_only": sorted(halving - grid),
        "exhaustive_only": sorted(grid - halving),
        "share_of_the_exhaustive_steps": round(record[names[0]]["search_steps"] / record[names[1]]["search_steps"], 3),
        "share_of_the_exhaustive_time": _share(*(record[name].get("seconds") for name in names)),
    }


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else round(part / whole, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", nargs="?", default="overhead", choices=("overhead", "halving", "exhaustive", "rates", "ranks", "child")
    )
    parser.add_argument("--runs", type=int, default=3, help="processes per method (overhead)")
    parser.add_argument("--out", type=Path, help="folder of the comparison")
    parser.add_argument("--resume", action="store_true", help="continue the comparison in --out")
    parser.add_argument("--workers", type=int, help="processes of the comparison (halving, exhaustive)")
    parser.add_argument("--fast", action="store_true", help="with --bf16 --group-by-length (halving, exhaustive)")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "child":
        measured_compare(str(options.out), options.method)
        return
    if options.part == "rates":
        from lowdim.train.environment import environment

        RATES.write_text(json.dumps({**measured_rates(options), "environment": environment()}, indent=1) + "\n")
        return
    if options.part == "ranks":
        from lowdim.train.environment import environment

        LAYER_RANKS.write_text(json.dumps({**ranks(options), "environment": environment()}, indent=1) + "\n")
        return
    if options.part == "overhead":
        found = overhead(options)
    else:
        found = compared(options, "halving" if options.part == "halving" else "grid")
        found["product_speed"] = product_speed()
    from lowdim.train.environment import environment

    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    load = round(os.getloadavg()[0], 1)  # of other programs, too: wall times mean little on a busy machine
    part = f"{options.part}-fast" if options.fast and options.part != "overhead" else options.part
    record[part] = {**found, "load_average": load, "environment": environment()}  # parts may be of several machines
    record.setdefault("environment", environment())
    for suffix in ("", "-fast"):
        if (both := agreement(record, suffix)) is not None:
            record[f"agreement{suffix}"] = both
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
