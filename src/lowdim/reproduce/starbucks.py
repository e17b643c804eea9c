"""Starbucks on STS-B: a fixed list of (layers, dimensions) against sampled layers with all dimensions, and no training."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from lowdim.linalg import derive_seed, stream
from lowdim.models import load_sentence_encoder
from lowdim.represent import SizeTable, StarbucksLoss, shrink_encoder, size_table
from lowdim.reproduce.settings.minilm import StsPairs, sts_benchmark
from lowdim.reproduce.settings.outcome import Check, Context, Outcome

PAIRS = ((1, 32), (2, 64), (3, 128), (4, 192), (5, 256), (6, 384))
ARMS = ("Starbucks", "Matryoshka2d")
CUT = (3, 128)
TOKENS = 24  # of a sentence


def run(context: Context) -> Outcome:
    """Two ways to train all-MiniLM-L6-v2 on the training part, and the untouched model, at six sizes on the dev part."""
    train, dev = sts_benchmark(context, "train"), sts_benchmark(context, "dev", 200 if context.quick else None)
    seeds, steps = ((0,), 3) if context.quick else ((0, 1), 120)
    untouched = _spearman(_encoder(), dev)
    rows: list[dict[str, Any]] = [_row("untouched", None, untouched)]
    found: dict[str, list[dict[tuple[int, int], float]]] = {arm: [] for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    cut: dict[str, float] = {}
    for seed in seeds:
        for arm in ARMS:
            model = _encoder()
            seconds[arm] += _train(model, arm, train, seed, steps)
            found[arm].append(_spearman(model, dev))
            rows.append(_row(arm, seed, found[arm][-1]))
            context.say(f"seed {seed}, {arm}: " + ", ".join(f"{value:.3f}" for value in found[arm][-1].values()))
            if arm == "Starbucks" and not cut:
                cut = _cut(model, dev[0])
    means = {arm: {pair: mean(each[pair] for each in found[arm]) for pair in PAIRS} for arm in ARMS}
    overall = {arm: mean(means[arm].values()) for arm in ARMS}
    rows += [_row(f"{arm}, mean", None, means[arm]) for arm in ARMS]
    rows.append({"cut to": str(CUT), **{name: round(value, 4) for name, value in cut.items()}})
    ahead = sum(means["Starbucks"][pair] > means["Matryoshka2d"][pair] for pair in PAIRS)
    step = {arm: 1000 * median(seconds[arm]) for arm in ARMS}
    return Outcome(
        slug="starbucks",
        setting=f"all-MiniLM-L6-v2, {TOKENS} tokens, on STS-B train (5,749 pairs), {steps} steps of 16 pairs, "
        f"CoSENT, AdamW 5e-5, seeds {seeds}; "
        f"Spearman on dev ({len(dev[0]):,} pairs) at {PAIRS}; Matryoshka2dLoss of sentence-transformers with the same "
        "dimensions",
        rows=rows,
        checks=[
            Check("mean over pairs: Starbucks - Matryoshka2d", overall["Starbucks"] - overall["Matryoshka2d"], ">=", 0.0),
            Check("mean over pairs: Starbucks - untouched", overall["Starbucks"] - mean(untouched.values()), ">=", 0.02),
            Check("cut to (3, 128) and loaded again: largest difference", cut["difference"], "<=", 1e-5),
            Check("its bytes over the forecast, less 1", abs(cut["bytes_over_forecast"] - 1), "<=", 0.01),
        ],
        notes=[
            f"Starbucks is ahead of Matryoshka2dLoss at {ahead} of {len(PAIRS)} pairs, "
            f"by {overall['Starbucks'] - overall['Matryoshka2d']:+.3f} on average.",
            f"A step took {step['Starbucks']:.0f} ms of one core (median), with Matryoshka2dLoss {step['Matryoshka2d']:.0f}, "
            "which samples one layer in a step where Starbucks takes all pairs.",
            f"Cut to (3, 128) the model has {cut['bytes_share']:.2f} of the bytes and takes {cut['time_share']:.2f} of the "
            "time of "
            "the whole: the word embeddings, which stay, are half of it.",
            "The paper trains with 128 pairs a batch for an epoch of all-NLI, and its encoder has 12 layers.",
        ],
    )


def _encoder() -> Any:
    model = load_sentence_encoder("minilm", device="cpu")
    model.max_seq_length = TOKENS
    return model


def _row(arm: str, seed: int | None, scores: dict[tuple[int, int], float]) -> dict[str, Any]:
    named = {f"({layers}, {dim})": round(value, 4) for (layers, dim), value in scores.items()}
    return {"arm": arm, "seed": "" if seed is None else seed, **named, "mean": round(mean(scores.values()), 4)}


def _table(model: Any, data: StsPairs) -> SizeTable:
    layers, dims = (sorted({pair[i] for pair in PAIRS}) for i in (0, 1))
    return size_table(model, data, layers=layers, dims=dims, repeats=1, resamples=10)


def _spearman(model: Any, data: StsPairs) -> dict[tuple[int, int], float]:
    sizes = {(row.layers, row.dim): row.quality for row in _table(model, data).sizes}
    return {pair: sizes[pair] for pair in PAIRS}


def _train(model: Any, arm: str, data: StsPairs, seed: int, steps: int) -> list[float]:
    """Train in place; the seconds of each step."""
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss, Matryoshka2dLoss

    base, dims = CoSENTLoss(model), [dim for _, dim in PAIRS]
    loss = StarbucksLoss(model, base, PAIRS) if arm == "Starbucks" else Matryoshka2dLoss(model, base, dims)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    first, second, scores = data
    order, seconds = stream(seed, "starbucks", "order"), []
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "starbucks", "dropout") % 2**32)
        while len(seconds) < steps:
            for rows in torch.randperm(len(first), generator=order).split(16)[: steps - len(seconds)]:
                begun = time.process_time()
                columns = [model.preprocess([side[i] for i in rows.tolist()]) for side in (first, second)]
                optimizer.zero_grad()
                loss(columns, scores[rows]).backward()
                optimizer.step()
                seconds.append(time.process_time() - begun)
    model.eval()
    return seconds


def _cut(model: Any, texts: list[str]) -> dict[str, float]:
    """What is cut, written and read again, against the trained model at that pair."""
    from sentence_transformers import SentenceTransformer

    texts = texts[:256]
    small = shrink_encoder(model, *CUT)
    forecast = 4 * sum(p.numel() for p in small.parameters())
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        written = Path(folder, "model.safetensors").stat().st_size
        loaded = SentenceTransformer(folder, device="cpu")
    difference = (loaded.encode(texts, convert_to_tensor=True) - _states(model, texts)).abs().max()
    small_time, whole_time = _seconds(lambda: loaded.encode(texts)), _seconds(lambda: model.encode(texts))
    return {
        "difference": float(difference),
        "bytes_over_forecast": written / forecast,
        "bytes_share": forecast / (4 * sum(p.numel() for p in model.parameters())),
        "ms": 1000 * small_time / len(texts),
        "ms_whole": 1000 * whole_time / len(texts),
        "time_share": small_time / whole_time,
    }


@torch.no_grad()
def _states(model: Any, texts: list[str]) -> Tensor:
    """The trained model at (3, 128), from transformers' own hidden states."""
    parts = []
    for start in range(0, len(texts), 32):
        features = model.preprocess(texts[start : start + 32])
        inputs = {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in features}
        state = model[0].auto_model(**inputs, output_hidden_states=True).hidden_states[CUT[0]]
        mask = features["attention_mask"][..., None]
        parts.append(torch.nn.functional.normalize((state * mask).sum(1) / mask.sum(1), dim=-1)[:, : CUT[1]])
    return torch.cat(parts)


def _seconds(call: Callable[[], Any]) -> float:
    """The median of three calls."""
    spent = []
    for _ in range(3):
        begun = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begun)
    return median(spent)
