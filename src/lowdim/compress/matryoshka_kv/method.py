"""MatryoshkaKV: orthogonal projections of the KV cache, from principal components."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowdim.calibrate import call_model, to_device
from lowdim.calibrate.batches import given_batches
from lowdim.calibrate.passes import as_it_was
from lowdim.compress.core.report import CompressedLayer, CompressionReport, attach_report
from lowdim.compress.matryoshka_kv.interface import keeping_ranks, kv_layers, projections, recording, turn_off, turn_on
from lowdim.compress.matryoshka_kv.pca import Recorder
from lowdim.compress.matryoshka_kv.projection import NAME, MatryoshkaProjection
from lowdim.compress.matryoshka_kv.ranks import greedy_kv_ranks
from lowdim.errors import Options, check_float, check_int, shown
from lowdim.linalg import cayley_inverse, cayley_signs
from lowdim.surgery import model_device

__all__ = ["MatryoshkaKVConfig", "matryoshka_kv", "search_kv_ranks", "set_kv_ranks"]

_log = logging.getLogger(__name__)

Ranks = int | Sequence[Sequence[int]] | None


@dataclass(frozen=True)
class MatryoshkaKVConfig(Options):
    """The ranks of `matryoshka_kv`, and the loss of `matryoshka_step`.

    Attributes:
        key_ranks: how many directions of each head's keys are cached: one number for all heads, >= 1, or one for each layer
            with a projection and each KV head; null keeps all.
        value_ranks: the same of the values, >= 1.
        budget: share of the dense cache's bytes, in (0, 1]; the ranks are then found by `greedy_kv_ranks` on the first batch.
        rank_step: ranks drawn in training are multiples of this, >= 1; null means an eighth of the head.
        kl_weight: of the divergence from the model at full rank, >= 0.
        ce_weight: of the loss on the labels, >= 0.
        temperature: of both distributions in the divergence, > 0.

    Raises:
        ValueError: a number outside its range, both weights 0, a budget and ranks.

    Example:
        >>> from lowdim.compress import MatryoshkaKVConfig
        >>> MatryoshkaKVConfig(key_ranks=16, value_ranks=16).kl_weight
        0.25
    """

    #: Mutually exclusive options.
    one_of: ClassVar[tuple[tuple[str, ...], ...]] = (("budget", "key_ranks"), ("budget", "value_ranks"))

    key_ranks: Ranks = None
    value_ranks: Ranks = None
    budget: float | None = None
    rank_step: int | None = None
    kl_weight: float = 0.25
    ce_weight: float = 0.75
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("key_ranks", "value_ranks"):
            given: Any = getattr(self, name)
            if isinstance(given, Tensor):
                object.__setattr__(self, name, given := given.tolist())
            if isinstance(given, (int, float)):
                check_int(name, given, 1)
            elif given is not None:
                object.__setattr__(self, name, tuple(tuple(row) for row in given))
        if self.budget is not None:
            check_float("budget", self.budget, 0.0, 1.0, low_open=True)
            if self.key_ranks is not None or self.value_ranks is not None:
                raise ValueError(f"budget={self.budget:g} finds the ranks; leave out key_ranks and value_ranks")
        if self.rank_step is not None:
            check_int("rank_step", self.rank_step, 1)
        check_float("kl_weight", self.kl_weight, 0.0)
        check_float("ce_weight", self.ce_weight, 0.0)
        check_float("temperature", self.temperature, 0.0, low_open=True)
        if self.kl_weight == self.ce_weight == 0:
            raise ValueError("kl_weight and ce_weight are both 0; one must be above it")


def matryoshka_kv(model: nn.Module, config: MatryoshkaKVConfig, batches: Iterable[Any] | None) -> Any:
    """Give every attention layer that caches all tokens a projection of its keys and values, in place; trains nothing.

    Formula: the keys (after the rotary embedding) and values of each KV head over all sample tokens have mean `μ` and
    covariance `E[x xᵀ] - μ μᵀ`; its eigenvectors, largest eigenvalue first, are the columns of `U_k` and `U_v`. From then on
    attention uses the first `key_ranks` and `value_ranks` of them (`matryoshka_attention`), with any cache or none.
    `MatryoshkaCache(model)` is the cache that holds these numbers only.

    Args:
        config: the ranks, or a budget from which they are found.
        batches: dicts for `model(**batch)`, in one pass; padding is left out where a batch has an `attention_mask`.

    Returns:
        The model. Its attention layers have a `lowdim_kv` (`MatryoshkaProjection`). `last_report(model)` gives for keys and
        values of each layer the ranks, the cached numbers of a token, and the relative error
        `√(Σ_{i>r} λ_i / Σ λ_i)` of the states on the samples (of the keys around their mean).

    Raises:
        TypeError: not a decoder of transformers, or one whose layers cannot get a projection (the layer and the reason).
        ValueError: no batches, ranks outside [1, head_dim] or not as many as layers and heads, NaN in a layer's states, a
            budget that the ranks cannot meet. The model is then as it was.
        MissingExtraError: transformers is not installed.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lowdim.compress import MatryoshkaKVConfig, last_report, matryoshka_kv
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> batch = {"input_ids": torch.randint(64, (4, 32))}
        >>> model = matryoshka_kv(model, MatryoshkaKVConfig(key_ranks=4, value_ranks=6), [batch])
        >>> print(last_report(model).summary)  # doctest: +ELLIPSIS
        MatryoshkaKV: 2 layers replaced, 0 left dense; 32 -> 20 cached numbers per token in them; largest relative error ...

    When not: the cache is small compared with the weights (short prompts, batch 1), or a sliding window bounds it already. On a
    CPU decoding is then not faster.

    Source: Lin et al., "MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection", arXiv 2410.14731.
    """
    batches = given_batches(batches, "the bases come from the keys and values of sample data")
    layers = kv_layers(model)
    before = {name: layer._modules.get(NAME) for name, layer in layers.items()}
    turn_on(model)
    try:
        recorders, first = _record(model, layers, batches)
        made, spectra = {}, {}
        for name, layer in layers.items():
            made[name], spectra[name] = _projection(name, layer, recorders[name])
        _set_all(made, config.key_ranks, config.value_ranks)
        for name, layer in layers.items():
            layer.add_module(NAME, made[name])
        if config.budget is not None:
            set_kv_ranks(model, *search_kv_ranks(model, first, budget=config.budget))
    except BaseException:
        for name, layer in layers.items():
            layer._modules.pop(NAME, None)
            if before[name] is not None:
                layer.add_module(NAME, before[name])
        if not any(before.values()):
            turn_off(model)
        raise
    report = _report(made, spectra)
    attach_report(model, report)
    _log.info("%s", report.summary)
    return model


def set_kv_ranks(model: nn.Module, key_ranks: Any = None, value_ranks: Any = None) -> None:
    """Change the ranks of a model with projections.

    Args:
        key_ranks, value_ranks: one number for all heads; one for each layer with a projection and each KV head; None: all
            directions.

    Raises:
        TypeError: the model has no projections. ValueError: as in `matryoshka_kv`; nothing has changed.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lowdim.compress import MatryoshkaKVConfig, matryoshka_kv, set_kv_ranks
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = matryoshka_kv(model, MatryoshkaKVConfig(), [{"input_ids": torch.randint(64, (4, 32))}])
        >>> set_kv_ranks(model, 4, [[2, 6]])
        >>> model.model.layers[0].self_attn.lowdim_kv.ranks
        ((4, 4), (2, 6))
    """
    _set_all(projections(model), key_ranks, value_ranks)


def _set_all(found: Mapping[str, MatryoshkaProjection], key_ranks: Any, value_ranks: Any) -> None:
    chosen = [_by_layer(name, given, found) for name, given in (("key_ranks", key_ranks), ("value_ranks", value_ranks))]
    checked = []
    for projection, key, value in zip(found.values(), *chosen, strict=True):
        checked.append((projection, projection.checked("key_ranks", key), projection.checked("value_ranks", value)))
    for projection, key, value in checked:
        projection.set_ranks(key, value)


def _by_layer(argument: str, given: Any, found: Mapping[str, MatryoshkaProjection]) -> list[Any]:
    """What `set_ranks` of each layer takes."""
    if given is None:
        return [projection.head_dim for projection in found.values()]
    if isinstance(given, int):
        return [given] * len(found)
    rows = given.tolist() if isinstance(given, Tensor) else list(given)
    if len(rows) != len(found):
        raise ValueError(
            f"{argument} must have a row for each of the {len(found)} layers with a projection; got {len(rows)} rows"
        )
    return rows


def _record(model: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Any]) -> tuple[dict[str, Recorder], Any]:
    """One pass over the samples; and the first batch."""
    recorders = {name: Recorder() for name in layers}
    first: Any = None
    device = model_device(model)
    with recording(layers, recorders), as_it_was(model, {}, want_gradient=False), torch.no_grad():
        for batch in batches:
            placed = to_device(batch, device)
            first = placed if first is None else first
            mask = placed.get("attention_mask") if isinstance(placed, Mapping) else None
            for recorder in recorders.values():
                recorder.mask = mask if mask is not None and mask.ndim == 2 else None
            call_model(model, placed)
    if first is None:
        raise ValueError("batches is empty: at least one sample batch is needed")
    return recorders, first


@torch.no_grad()
def _projection(name: str, layer: nn.Module, seen: Recorder) -> tuple[MatryoshkaProjection, tuple[Tensor, Tensor]]:
    """The projection of one layer, and the eigenvalues of keys and values."""
    if not seen.keys.count:
        raise TypeError(
            f"layer {name} is a {type(layer).__name__} that was never called, or computes its attention without transformers' "
            "AttentionInterface; it cannot get a projection"
        )
    try:
        (_, key, key_spread), (mean, value, value_spread) = seen.keys.pca(), seen.values.pca()
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from error
    if key.shape != value.shape:
        raise TypeError(
            f"layer {name} is a {type(layer).__name__} whose keys have {key.shape[-1]} numbers in a head and whose values have "
            f"{value.shape[-1]}; projections need the same number"
        )
    like = next(layer.parameters())
    made = MatryoshkaProjection(*key.shape[:2], layer=name, device=like.device, dtype=like.dtype)
    for raw, basis in ((made.key_raw, key), (made.value_raw, value)):
        raw.copy_(cayley_inverse(basis * cayley_signs(basis)[:, None]))
    made.value_mean.copy_(mean)
    return made.train(layer.training), (key_spread, value_spread)


def _report(made: Mapping[str, MatryoshkaProjection], spectra: Mapping[str, tuple[Tensor, Tensor]]) -> CompressionReport:
    rows = []
    for name, projection in made.items():
        heads, d = projection.num_kv_heads, projection.head_dim
        for side, ranks, spread in zip(("keys", "values"), projection.ranks, spectra[name]):
            kept = torch.arange(d, device=spread.device) < torch.tensor(ranks, device=spread.device)[:, None]
            lost = float((spread * ~kept).sum() / spread.sum().clamp_min(1e-300))
            low, high = min(ranks), max(ranks)
            what = f"rank {low} of {d}" if low == high else f"ranks {low} to {high} of {d}"
            row = CompressedLayer(
                f"{name}.{side}", heads, d, None, math.sqrt(lost), heads * d, sum(ranks), what=what, replaced=True
            )
            rows.append(row)
    return CompressionReport("MatryoshkaKV", tuple(rows), counted="cached numbers per token")


def search_kv_ranks(
    model: nn.Module,
    batch: Any,
    *,
    budget: float,
    interval: int | None = None,
    round_fraction: float = 0.75,
) -> tuple[Tensor, Tensor]:
    """The ranks that `greedy_kv_ranks` finds for a model with projections, by its final hidden state on one batch.

    Every round costs two forward passes for each KV head of each layer. The model's ranks are afterwards as they were;
    `set_kv_ranks(model, *found)` sets the new ones.

    Args:
        batch: what `model(**batch)` takes; a few hundred tokens are enough.
        budget, interval, round_fraction: as in `greedy_kv_ranks`.

    Returns:
        Key ranks and value ranks `(layers with a projection, KV heads)`, int64.

    Raises:
        TypeError: the model has no projections. ValueError: as in `greedy_kv_ranks`, or layers of different shapes.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lowdim.compress import MatryoshkaKVConfig, matryoshka_kv, search_kv_ranks
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> batch = {"input_ids": torch.randint(64, (4, 32))}
        >>> model = matryoshka_kv(model, MatryoshkaKVConfig(), [batch])
        >>> key_ranks, value_ranks = search_kv_ranks(model, batch, budget=0.5)
        >>> int(key_ranks.sum() + value_ranks.sum()) <= 0.5 * 2 * 2 * 8
        True

    Source: arXiv 2410.14731.
    """
    found = projections(model)
    shapes = {(p.num_kv_heads, p.head_dim) for p in found.values()}
    if len(shapes) > 1:
        raise ValueError(f"the search needs layers of one shape; got (KV heads, head_dim) of {shown(sorted(shapes))}")
    ((heads, d),) = shapes
    placed = to_device(batch, model_device(model))
    placed = placed if isinstance(placed, Mapping) else {"input_ids": placed}

    def hidden(key_ranks: Tensor, value_ranks: Tensor) -> Tensor:
        set_kv_ranks(model, key_ranks, value_ranks)
        return model(**{**placed, "output_hidden_states": True, "use_cache": False}).hidden_states[-1]

    with keeping_ranks(found), as_it_was(model, {}, want_gradient=False), torch.no_grad():
        return greedy_kv_ranks(hidden, len(found), heads, d, budget=budget, interval=interval, round_fraction=round_fraction)
