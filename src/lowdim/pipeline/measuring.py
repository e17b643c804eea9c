"""What each step is measured by."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowdim.calibrate import capture
from lowdim.compress import MatryoshkaCache, MatryoshkaProjection, WINALinear
from lowdim.linalg import wide
from lowdim.surgery import blocks_of, model_device
from lowdim.train.metrics import Metric, science

__all__ = [
    "block_errors",
    "block_outputs",
    "cache_bytes",
    "change",
    "disk_bytes",
    "first_batch",
    "interval",
    "memory_bytes",
    "speeds",
]

_LEVEL = 0.95
_PROMPT, _NEW, _ROUNDS = 32, 8, 3  # tokens of a prompt, tokens after it, and how often
_FEW = 4  # sequences on which blocks are compared


def interval(score: float, values: Sequence[float], metric: Metric) -> tuple[float, float]:
    """The ends of a score's interval at 95 %, by Student's t over the rows; both NaN for fewer than two rows.

    Perplexity's is that of the mean loss, exponentiated.
    """
    half = _half_width(values)
    if metric.name == "perplexity":
        return score * math.exp(-half), score * math.exp(half)
    return score - half, score + half


def change(values: Sequence[float], before: Sequence[float], metric: Metric) -> tuple[float, float, float]:
    """What has changed from `before`, and the ends of its interval: rows are compared one by one.

    Perplexity changes by a factor, which is above 1 where it became worse; others by a difference, below 0 where they did.
    """
    if len(values) != len(before):
        return math.nan, math.nan, math.nan
    gaps = np.asarray(values) - np.asarray(before)
    mean, half = float(gaps.mean()), _half_width(gaps)
    if metric.name == "perplexity":
        return math.exp(-mean), math.exp(-mean - half), math.exp(-mean + half)
    return mean, mean - half, mean + half


def disk_bytes(folder: Path) -> int:
    """Bytes of the weights' files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def memory_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that are held, each storage once, and of copies that sparse layers have made."""
    tensors = [*model.parameters(), *model.buffers()]
    copies = sum(module.copied_bytes() for module in model.modules() if isinstance(module, WINALinear))
    return copies + sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
def cache_bytes(model: Any, batch: dict[str, Tensor]) -> int:
    """Bytes of keys and values for a token, by filling a cache with a prompt."""
    ids = batch["input_ids"][:1, :_PROMPT]
    cache = _cache(model)
    model(ids, past_key_values=cache, use_cache=True)
    if isinstance(cache, MatryoshkaCache):
        held = cache.nbytes()
    else:
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    return round(held / ids.shape[1])


@torch.no_grad()
def speeds(model: Any, batch: dict[str, Tensor], *, generates: bool, sizes: Iterable[int] = (1, 8)) -> dict[str, float]:
    """Tokens a second at each batch size, by the clock: of decoding after a prompt, or of one pass for an encoder."""
    found = {}
    for size in sizes:
        rows = {key: value.repeat(math.ceil(size / len(value)), *[1] * (value.ndim - 1))[:size] for key, value in batch.items()}
        run, tokens = _decoding(model, rows["input_ids"]) if generates else _pass(model, rows)
        run()
        times = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        found[str(size)] = tokens / statistics.median(times)
    return found


def block_outputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output of each block on a few samples."""
    few = {key: value[:_FEW] for key, value in batch.items()}
    names = blocks_of(model)
    return next(capture(model, names, [few])) if names else {}


def block_errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float | None]:
    """`‖y − y₀‖ / ‖y₀‖` by block; None where it is not finite."""
    errors = {}
    for name, wanted in right.items():
        size = wide(wanted).norm().clamp_min(1e-30)
        error = float((wide(found[name]) - wide(wanted)).norm() / size)
        errors[name] = error if math.isfinite(error) else None
    return errors


def _half_width(values: Any) -> float:
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return math.nan
    quantile = science("scipy.stats", "the interval of a score").t.ppf(0.5 + _LEVEL / 2, len(numbers) - 1)
    return float(quantile * numbers.std(ddof=1) / math.sqrt(len(numbers)))


def _cache(model: Any) -> Any:
    if any(isinstance(module, MatryoshkaProjection) for module in model.modules()):
        return MatryoshkaCache(model)
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _decoding(model: Any, ids: Tensor) -> tuple[Callable[[], None], int]:
    prompt, token = ids[:, :_PROMPT], ids[:, :1]
    cache = _cache(model)
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def run() -> None:
        for _ in range(_NEW):
            model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-_NEW)

    return run, _NEW * len(ids)


def _pass(model: Any, rows: dict[str, Tensor]) -> tuple[Callable[[], None], int]:
    mask = rows.get("attention_mask")
    tokens = rows["input_ids"].numel() if mask is None else int(mask.sum())
    return lambda: model(**rows), tokens


def first_batch(batches: Sequence[dict[str, Any]], model: nn.Module) -> dict[str, Tensor]:
    """The first of the samples, where the model is."""
    return {key: value.to(model_device(model)) for key, value in batches[0].items()}
