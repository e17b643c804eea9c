"""A comparison as `lowdim compare` might write it, with made-up numbers."""

import math
import random
from typing import Any

_METHODS = [
    # name, label, family, mean, trained, peak MiB, ms/step, file KiB, learning rate
    ("lora", "LoRA", "adapters", 0.842, 147_456, 612, 61.0, 580, 1e-3),
    ("lamda", "LaMDA", "adapters", 0.836, 24_576, 371, 55.2, 410, 2e-3),
    ("corda", "CorDA", "adapters", 0.839, 147_456, 640, 62.8, 1180, 5e-4),
    ("nola", "NOLA", "adapters", 0.811, 3_072, 402, 74.9, 14, 1e-2),
    ("galore", "GaLore", "optim", 0.833, 10_646_784, 784, 98.4, 41_700, 2e-4),
    ("fira", "Fira", "optim", 0.838, 10_646_784, 801, 101.7, 41_700, 2e-4),
    ("sst", "Sparse spectral training", "layers", 0.797, 1_204_224, 690, 88.1, 4_800, 1e-3),
    ("drs", "Dynamic rank selection", "layers", 0.779, 2_408_448, 720, 91.0, 9_500, 1e-3),
    ("full", "Full fine-tuning", "full", 0.845, 22_713_216, 1_140, 118.0, 88_800, 5e-5),
    ("head", "Head only", "head", 0.702, 1_540, 268, 24.1, 8, 1e-2),
]


def comparison(seeds: int = 3, steps: int = 40) -> dict[str, Any]:
    """Ten methods that ran, one skipped, one failed."""
    rng = random.Random(7)
    methods = []
    for name, label, family, mean, trained, peak, ms, file, lr in _METHODS:
        scores = [round(mean + rng.gauss(0, 0.008), 4) for _ in range(seeds)]
        average = sum(scores) / seeds
        spread = math.sqrt(sum((s - average) ** 2 for s in scores) / max(1, seeds - 1))
        half = 2.2 * spread / math.sqrt(seeds) + 0.005
        floor = 1.25 - mean
        curves = []
        for seed in range(seeds):
            loss = [floor + (1.1 - floor) * math.exp(-i / (7 + trained**0.1)) + rng.gauss(0, 0.045) for i in range(steps)]
            curves.append({"seed": seed, "step": list(range(1, steps + 1)), "loss": loss})
        trials = [
            {"lr": lr * f, "score": mean - 0.03 * math.log10(f) ** 2 * 3 + rng.gauss(0, 0.006) - 0.01}
            for f in (0.2, 0.5, 1, 2, 5)
        ]
        if name == "nola":
            trials = trials[:3]
        methods.append(
            {
                "name": name, "label": label, "family": family, "status": "ok", "reason": None,
                "baseline": name in ("full", "head"), "lr": lr, "trials": trials, "scores": scores, "mean": average,
                "interval": [average - half, average + half], "trained_parameters": trained,
                "forecast_peak_bytes": int(peak * 2**20 * rng.uniform(0.94, 1.13)), "measured_peak_bytes": peak * 2**20,
                "seconds_per_step": ms / 1000, "file_bytes": file * 1024, "curves": curves,
                "within_noise": name in ("lora", "lamda", "corda", "fira", "galore", "full"),
            }
        )  # fmt: skip
    for m in methods:
        cost = m["measured_peak_bytes"]
        m["pareto"] = not any(o["mean"] > m["mean"] and o["measured_peak_bytes"] <= cost for o in methods)
    reasons = {
        "ATLAS": "forecast peak memory is above the budget of 1.50 GiB",
        "SVFit": "ValueError: rank must be at most 384 (layer encoder.layer.0.attention.query); got 512",
    }
    for (label, reason), status in zip(reasons.items(), ("skipped", "failed")):
        methods.append({"name": label.lower(), "label": label, "family": "adapters", "status": status, "reason": reason})
    methods[10]["forecast_peak_bytes"] = 2_362_232_012
    return {
        "schema": 1, "title": "Ticket routing with all-MiniLM-L6-v2", "created": "2026-11-23T20:18:00+00:00",
        "lowdim": "0.1.0", "command": "lowdim compare tickets.csv --text body --label queue --budget 1.5GiB --seeds 3",
        "environment": {
            "python": "3.12.8", "torch": "2.13.0", "transformers": "5.23.0", "cpu": "AMD EPYC 7763", "cores": 8,
            "gpu": None, "memory_bytes": 34_359_738_368, "os": "Linux 6.8",
        },
        "task": "classify", "metric": {"name": "accuracy", "higher_is_better": True},
        "model": {"name": "all-MiniLM-L6-v2", "parameters": 22_713_216, "dtype": "float32"},
        "data": {
            "name": "tickets.csv", "train": 1200, "validation": 300, "test": 500,
            "labels": ["billing", "outage", "sales", "other"], "notes": ["11 empty rows were left out"],
        },
        "settings": {"steps": steps, "batch_size": 16, "max_length": 128, "seeds": list(range(seeds)), "trials": 5},
        "budget_bytes": 1_610_612_736, "methods": methods,
        "winner": {
            "method": "lamda", "folder": "lowdim-compare/winner", "format": "PEFT LoRA checkpoint",
            "why": "It is within noise of the best score and needs the least memory of those that are.",
            "how_to_load": "from peft import PeftModel\nfrom transformers import AutoModelForSequenceClassification\n\n"
            'base = AutoModelForSequenceClassification.from_pretrained("all-MiniLM-L6-v2", num_labels=4)\n'
            'model = PeftModel.from_pretrained(base, "lowdim-compare/winner")',
        },
        "notes": [
            "Every method saw the same batches in the same order.",
            "Peak memory is the process’s, less what it held before training.",
        ],
    }  # fmt: skip


def run() -> dict[str, Any]:
    """One run."""
    rng = random.Random(3)
    return {
        "method": "lamda", "config": {"rank": 8, "alpha": 16, "target_modules": ["query", "value"], "lr": 2e-3},
        "seed": 0, "versions": {"lowdim": "0.1.0", "torch": "2.13.0"},
        "hardware": {"cpu": "AMD EPYC 7763", "cores": 8, "memory_bytes": 34_359_738_368},
        "losses": [0.4 + 0.7 * math.exp(-i / 40) + rng.gauss(0, 0.04) for i in range(200)],
        "score": 0.8361, "metric": "accuracy", "seconds_per_step": 0.0552, "trained_parameters": 24_576,
        "measured_peak_bytes": 389_021_696,
    }  # fmt: skip
