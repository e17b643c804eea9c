"""WINA against TEAL on a sentence encoder: the error of each layer, and of the whole model; and the time of one token."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.calibrate import capture
from lowdim.compress import WINAConfig, WINALinear, wina
from lowdim.linalg import stream
from lowdim.reproduce.settings.minilm import (
    ENCODER_LINEARS,
    load_minilm,
    sentence_embeddings,
    sts_benchmark,
    sts_spearman,
    subjectivity,
    tokenized,
)
from lowdim.reproduce.settings.outcome import Check, Context, Outcome
from lowdim.surgery import find_layers, is_linear
from lowdim.threads import one_thread

__all__ = ["run"]

_SHARES = (0.4, 0.5, 0.65)
_CRITERIA = ("wina", "teal")
_SENTENCES = 60
_SIZE = 4096  # of the square matrix that is timed


def run(context: Context) -> Outcome:
    """Errors of layers and embeddings at three sparsities, the STS-B correlation, and one token through one large layer."""
    outcome = Outcome(
        "wina",
        f"all-MiniLM-L6-v2, its 36 encoder matrices, {_SENTENCES} sentences of the subjectivity corpus, no calibration. Layer"
        " error: |W (x mask) - W x| / |W x| over all tokens that are no padding, on the inputs of the dense model. STS-B:"
        " Spearman correlation (x 100) on the test pairs, mean pooling, all 36 layers sparse.",
    )
    model, tokenizer = load_minilm()
    objective, subjective = subjectivity(context)
    half = 4 if context.quick else _SENTENCES // 2
    batches = tokenized(tokenizer, [*objective[:half], *subjective[:half]])
    _layers(model, batches, outcome)
    _embeddings(context, model, tokenizer, batches, outcome)
    _one_token(outcome, context)
    outcome.notes.append(
        "What is shown is a smaller error of single layers. Over the whole encoder the two criteria are not told apart, and the"
        " paper's models (7 to 14 billion parameters) were out of reach."
    )
    return outcome


@torch.no_grad()
def _layers(model: nn.Module, batches: list[dict[str, Tensor]], outcome: Outcome) -> None:
    layers = find_layers(model, ENCODER_LINEARS, accept=is_linear)
    arms = [(share, criterion) for share in _SHARES for criterion in _CRITERIA]
    sparse = {
        (name, *arm): WINALinear.from_linear(layer, arm[0], criterion=arm[1], dense_prefix=0.0)
        for name, layer in layers.items()
        for arm in arms
    }
    missed, whole = dict.fromkeys(sparse, 0.0), dict.fromkeys(layers, 0.0)
    for batch, found in zip(batches, capture(model, list(layers), batches, inputs=True), strict=True):
        for name, x in found.items():
            rows = x[batch["attention_mask"].bool()]
            matrix: Any = layers[name].weight
            whole[name] += float(F.linear(rows, matrix).square().sum())
            for arm in arms:
                left_out = rows * ~sparse[(name, *arm)].mask(rows)
                missed[(name, *arm)] += float(F.linear(left_out, matrix).square().sum())
    errors = {key: (value / whole[key[0]]) ** 0.5 for key, value in missed.items()}
    for share in _SHARES:
        mean = {c: statistics.mean(errors[name, share, c] for name in layers) for c in _CRITERIA}
        lower = sum(errors[name, share, "wina"] < errors[name, share, "teal"] for name in layers)
        row = {
            "what": "layer error, mean of 36",
            "sparsity": share,
            "WINA": round(mean["wina"], 4),
            "TEAL": round(mean["teal"], 4),
        }
        outcome.rows.append(row | {"WINA lower in": f"{lower} of {len(layers)}"})
        outcome.checks += [
            Check(f"layer error at {share}, WINA <= TEAL", mean["wina"], "<=", mean["teal"]),
            Check(f"layers with a lower error at {share}", lower, ">=", 33),
        ]


def _embeddings(context: Context, model: nn.Module, tokenizer: Any, batches: list[dict[str, Tensor]], outcome: Outcome) -> None:
    want = sentence_embeddings(model, batches)
    one, two, scores = sts_benchmark(context, "test", 64 if context.quick else None)
    sides = [tokenized(tokenizer, side) for side in (one, two)]
    dense = sts_spearman(model, sides, scores)
    outcome.rows.append({"what": "STS-B", "sparsity": 0.0, "dense": round(dense, 2)})
    for share in _SHARES:
        found: dict[str, tuple[float, float]] = {}
        for criterion in _CRITERIA:
            config = WINAConfig(sparsity=share, criterion=criterion, target_modules=ENCODER_LINEARS)  # type: ignore[arg-type]
            sparse = wina(copy.deepcopy(model), config)
            cosine = float((sentence_embeddings(sparse, batches) * want).sum(-1).mean())
            found[criterion] = cosine, sts_spearman(sparse, sides, scores)
        context.say(f"sparsity {share}: cosine and STS-B {found}")
        for i, (what, digits) in enumerate((("cosine to the dense embedding", 4), ("STS-B", 2))):
            row = {"what": what, "sparsity": share, "WINA": round(found["wina"][i], digits)}
            outcome.rows.append(row | {"TEAL": round(found["teal"][i], digits)})
        if share == _SHARES[0]:
            outcome.checks += [
                *(Check(f"cosine at {share}, {c.upper()}", found[c][0], ">=", 0.93) for c in _CRITERIA),
                Check(f"STS-B at {share}, WINA >= dense - 2 points", found["wina"][1], ">=", dense - 2),
            ]


@torch.no_grad()
def _one_token(outcome: Outcome, context: Context) -> None:
    """Dense and sparse product by turns, on one thread."""
    with one_thread():
        draw = stream(0, "wina", "token")
        linear = nn.Linear(_SIZE, _SIZE, bias=False)
        linear.weight.copy_(torch.randn(_SIZE, _SIZE, generator=draw))
        token = torch.randn(1, _SIZE, generator=draw)
        for share in _SHARES:
            layer = WINALinear.from_linear(linear, share).eval()
            pairs = [(_seconds(linear, token), _seconds(layer, token)) for _ in range(5 if context.quick else 60)]
            ratio = statistics.median(dense / sparse for dense, sparse in pairs[2:])
            what = f"one token, {_SIZE} x {_SIZE}: dense / sparse time"
            outcome.rows.append({"what": what, "sparsity": share, "WINA": round(ratio, 2)})
            if share == 0.5:
                outcome.checks.append(Check("time ratio of one token at 0.5", ratio, ">=", 1.5))


def _seconds(layer: nn.Module, token: Tensor) -> float:
    begun = time.perf_counter()
    layer(token)
    return time.perf_counter() - begun
