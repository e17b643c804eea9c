"""Comparisons with a judgement, a search and samples, with made-up numbers."""

import math
import random
from typing import Any

from fake import comparison

_NAMES = (
    ("linear-probe", "Linear probe", "probe"),
    ("lora", "LoRA", "adapters"),
    ("full", "Full fine-tuning", "full"),
    ("lamda", "LaMDA", "adapters"),
    ("randlora", "RandLoRA", "adapters"),
    ("galore", "GaLore", "optim"),
    ("svfit", "SVFit", "adapters"),
    ("corda", "CorDA", "adapters"),
    ("nola", "NOLA", "adapters"),
    ("monarch", "MoRe", "adapters"),
    ("dct", "LoCA", "adapters"),
    ("sora", "SoRA", "adapters"),
    ("increlora", "IncreLoRA", "adapters"),
    ("loldu", "LoLDU", "adapters"),
    ("diffora", "DiffoRA", "adapters"),
    ("flora", "FLoRA", "adapters"),
    ("lora-sb", "LoRA-SB", "adapters"),
    ("block-lora", "Block LoRA", "adapters"),
    ("s2ft", "S²FT", "adapters"),
)
_RUNGS = (5, 10, 20, 40, 80)


def judged(count: int = 6, *, task: str = "classify", seeds: int = 3, samples: int = 5) -> dict[str, Any]:
    """`count` methods (at most 19) with two sizes and three rates each, of which about two thirds reach the final."""
    rng = random.Random(count)
    lower = task != "classify"
    metric = {"name": "perplexity" if lower else "accuracy", "higher_is_better": not lower}
    half, methods, visits = 0.021, [], []
    for index, (name, label, family) in enumerate(_NAMES[:count]):
        behind = 0.0 if index == 1 else rng.choice((0.004, 0.011, 0.017, 0.03, 0.05, 0.09)) * (1 + rng.random() / 3)
        left = count > 6 and index > 2 and index % 3 == 0
        visits += _visits(name, 0.78 - behind, rng, last=4 if not left else rng.choice((1, 2)))
        methods.append(_row(name, label, family, behind, half, rng, seeds, left=left, lower=lower))
    best = next(m for m in methods if m["name"] == "lora")
    methods += _references(best, half, lower=lower)
    inside = [m["name"] for m in methods if m.get("may_be_best")]
    pick = "linear-probe" if "linear-probe" in inside else "lora"
    record = comparison() | {
        "title": "lowdim:sentence-polarity: all-MiniLM-L6-v2",
        "task": task,
        "metric": metric,
        "methods": methods,
        "winner": {**comparison()["winner"], "exported": "seed 0", "largest_difference": 1e-6, "method": pick},
        "notes": ["Every method saw the same batches in the same order."],
        "judgement": {
            "level": 0.95,
            "judged": "loss" if lower else "accuracy",
            "seeds": seeds,
            "examples": 300,
            "half_width": half if seeds > 1 else None,
            "may_be_best": inside,
            "best": None,
            "apart": [],
            "headline": f"No method is shown to be better than {'Linear probe' if 'linear-probe' in inside else 'LoRA'}.",
            "reasons": [
                f"{len(inside)} of {len(methods)} rows may be the best: they are within 0.021 of LoRA, the highest mean.",
                "Linear probe is handed over: of those that may be best it needs the least peak memory, 0.38 x that of LoRA.",
            ],
            "needed": "To see a difference of 0.010, 1,300 test examples or 9 seeds would be needed.",
        },
        "search": {"kind": "halving", "visits": visits, "steps": 2_310, "exhaustive_steps": 80 * 6 * count},
        "data": {
            "name": "lowdim:sentence-polarity",
            "train": 560,
            "validation": 140,
            "test": 300,
            "labels": ["negative", "positive"],
            "columns": [{"source": "reviews.csv", "text": ["text"], "label": "label", "unused": ["id", "date", "stars"]}],
            "example": "\"[CLS] slack and uninspired, and peopled mainly by characters so unsympathetic [SEP]\" -> 'negative'",
            "notes": ["133 of 1000 texts are longer than 40 tokens and were cut (--max-length)"],
        },
    }
    if samples and lower:
        record["samples"] = [_sample(i, [m["name"] for m in methods if m["mean"] is not None][:4]) for i in range(samples)]
    return record


def _row(name, label, family, behind, half, rng, seeds, *, left, lower) -> dict[str, Any]:
    mean = 2.9 + behind if lower else 0.78 - behind
    mean = math.exp(mean) if lower else mean
    peak = int((80 + 900 * rng.random() ** 2) * 2**20) if name != "linear-probe" else 68 * 2**20
    trials = [
        {"lr": lr, "score": mean * (1 + 0.02 * rng.random()), "size": size, "steps": 80}
        for lr in (1e-4, 1e-3, 1e-2)
        for size in (4, 16)
    ]
    row = {
        "name": name,
        "label": label,
        "family": family,
        "baseline": name in ("linear-probe", "lora", "full"),
        "status": "ok",
        "reason": None,
        "lr": 1e-3,
        "size": 4,
        "trials": trials,
        "trained_parameters": rng.randrange(770, 400_000),
        "forecast_peak_bytes": int(peak * rng.uniform(0.98, 1.02)),
        "measured_peak_bytes": peak,
        "seconds_per_step": 0.05 + rng.random() / 3,
        "file_bytes": rng.randrange(3_000, 40_000_000),
        "curves": [],
    }
    if left:
        return row | {
            "status": "left",
            "mean": None,
            "scores": [],
            "reason": "left the search after 10 of 80 steps: not in the better half",
        }
    curves = []
    for seed in range(seeds):
        loss = [0.45 + behind + 0.3 * math.exp(-i / 25) + rng.gauss(0, 0.04) for i in range(80)]
        curves.append({"seed": seed, "step": list(range(1, 81)), "loss": loss})
    classes = [{"class": c, "precision": mean, "recall": mean, "f1": mean, "count": 150} for c in ("negative", "positive")]
    return row | {
        "mean": mean,
        "scores": [mean + rng.gauss(0, 0.004) for _ in range(seeds)],
        "difference": -behind,
        "half_width": half if seeds > 1 else None,
        "may_be_best": behind <= half,
        "curves": curves,
        "by_class": [] if lower else classes,
        "kept": [2.31, 2.31 + rng.random() / 5] if lower else None,
    }


def _references(best, half, *, lower) -> list[dict[str, Any]]:
    shared = {"status": "ok", "baseline": True, "trivial": True, "half_width": half, "may_be_best": False}
    if lower:
        return [
            {
                **shared,
                "name": "untouched",
                "label": "Untouched model",
                "family": "",
                "mean": 125.8,
                "scores": [125.8],
                "difference": math.log(best["mean"] / 125.8),
                "reason": "the model as it was",
                "kept": [2.31, 2.31],
            }
        ]
    classes = [
        {"class": "negative", "precision": 0.5, "recall": 1.0, "f1": 0.667, "count": 150},
        {"class": "positive", "precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 150},
    ]
    return [
        {
            **shared,
            "name": "majority-class",
            "label": "Majority class",
            "family": "",
            "mean": 0.5,
            "scores": [0.5],
            "difference": 0.5 - best["mean"],
            "reason": "always answering the majority class, 'negative'",
            "by_class": classes,
        }
    ]


def _visits(name, reach, rng, last) -> list[dict[str, Any]]:
    found = []
    for lr in (1e-4, 1e-3, 1e-2):
        for size in (4, 16):
            chosen = lr == 1e-3 and size == 4
            end = last if chosen else rng.choice((0, 0, 1, 1, 2))
            for rung in range(end + 1):
                score = reach - 0.2 * 0.6**rung - (0 if chosen else 0.03) + rng.gauss(0, 0.01)
                goes_on = rung < end or end == 4
                reason = "" if goes_on else "not in the better half"
                found.append(
                    {
                        "method": name,
                        "lr": lr,
                        "size": size,
                        "rung": rung,
                        "steps": _RUNGS[rung],
                        "score": score,
                        "goes_on": goes_on,
                        "reason": reason,
                    }
                )
    return found


def _sample(index: int, names: list[str]) -> dict[str, Any]:
    prompt = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips "
        f"did Natalia sell altogether in April and May? (variant {index})"
    )
    answers = {
        name: f"She sold 48/2 = {24 + i} clips in May.\nTogether 48 + 24 = {72 + i}. #### {72 + i}"
        for i, name in enumerate(names)
    }
    return {
        "prompt": prompt,
        "expected": "#### 72",
        "answers": {"untouched": "The clips are sold and sold and sold and sold", **answers},
    }


def before_and_after() -> dict[str, Any]:
    """A run of a recipe with scores before and after, a baseline, classes, samples and a text that must not be forgotten."""
    rng = random.Random(5)
    classes = [{"class": c, "precision": 0.8, "recall": 0.7, "f1": 0.747, "count": 150} for c in ("negative", "positive")]
    return {
        "schema": 1,
        "method": "lora",
        "label": "LoRA",
        "recipe": {"model": "minilm", "task": "classify", "steps": 120},
        "config": {"rank": 8, "alpha": 16.0},
        "lr": 1e-3,
        "seed": 0,
        "trained_parameters": 147_456,
        "metric": "accuracy",
        "before": 0.507,
        "validation": 0.771,
        "test": 0.743,
        "before_test": 0.493,
        "by_class": classes,
        "samples": [
            {"prompt": "Once upon a time", "expected": "there was a king", "before": "the the the", "after": "there was a cat"}
        ],
        "kept": [2.31, 2.44],
        "losses": [0.45 + 0.3 * math.exp(-i / 25) + rng.gauss(0, 0.04) for i in range(120)],
        "loss_steps": list(range(1, 121)),
        "evaluations": [[40, 0.55], [80, 0.5], [120, 0.49]],
        "subspaces": [],
        "spikes": [],
        "seconds_per_step": 0.117,
        "measured_peak_bytes": 240 * 2**20,
        "environment": {"torch": "2.13.0", "cpu": "AMD EPYC 7763"},
        "lowdim": "0.1.0",
        "file_bytes": 590_000,
        "data": {
            "name": "reviews.csv",
            "train": 560,
            "validation": 140,
            "test": 300,
            "labels": ["negative", "positive"],
            "columns": [{"source": "reviews.csv", "text": ["text"], "label": "label", "unused": ["id", "date"]}],
            "example": "\"[CLS] slack and uninspired [SEP]\" -> 'negative'",
            "notes": [],
            "baseline": {
                "name": "majority-class",
                "what": "always answering the majority class, 'negative'",
                "scores": {"accuracy": 0.5, "f1": 0.333},
            },
        },
    }
