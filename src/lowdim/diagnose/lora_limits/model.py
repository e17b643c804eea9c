"""LoRA limits of every attention head of a model on a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.calibrate import capture
from lowdim.diagnose.core.weights import is_lowdim_layer, is_peft_layer, plain_model, weights_of
from lowdim.diagnose.lora_limits.norms import LoRALimits, check_limits, limits_of_parts
from lowdim.errors import NoMatchingModuleError, check_int
from lowdim.results import Result
from lowdim.surgery import find_layers, is_matrix_layer

__all__ = ["HeadLimits", "LoRALimitsReport", "lora_limits_of"]

_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm")
_FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv", "qkv", "in_proj_weight")
_CAPS = ("attn_logit_softcapping", "attn_logit_softcap")


@dataclass(frozen=True)
class HeadLimits(Result):
    """One query head.

    Attributes:
        layer: the attention module.
        head: the query head; a key head may serve several.
        sequence: the row of the batch with the largest ratio.
        limits: the norms there.
    """

    layer: str
    head: int
    sequence: int
    limits: LoRALimits


@dataclass(frozen=True)
class LoRALimitsReport(Result):
    """All heads of a model on one batch.

    Attributes:
        heads: in the model's order.
        notes: what the numbers leave out for this model.
    """

    heads: list[HeadLimits]
    notes: tuple[str, ...]

    @property
    def worst(self) -> HeadLimits:
        """The head with the largest ratio."""
        return max(self.heads, key=lambda head: head.limits.ratio)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each head."""
        kept = ("bound", "threshold", "ratio", "below", "score_bound", "degree_needed", "feature_rank", "pays")
        found = []
        for head in self.heads:
            limits = head.limits
            name = "q" if limits.norms["q"] >= limits.norms["k"] else "k"
            row = {"layer": head.layer, "head": head.head, "sequence": head.sequence}
            row |= {key: getattr(limits, key) for key in kept}
            row |= {"adapter_norm": max(limits.norms["q_adapter"], limits.norms["k_adapter"])}
            found.append({**row, "largest_at": limits.largest_at[name]})
        return found

    @property
    def summary(self) -> str:
        """One line."""
        worst, paying = self.worst, sum(head.limits.pays for head in self.heads)
        below = sum(head.limits.below for head in self.heads)
        return (
            f"{below} of {len(self.heads)} heads below √ln L, worst {worst.limits.ratio:.3g} x in {worst.layer}, "
            f"head {worst.head} (scores up to {worst.limits.score_bound:.3g}); the linear algorithm pays for {paying}"
        )

    def _table(self) -> list[dict[str, Any]]:
        shown = ("layer", "head", "ratio", "score_bound", "degree_needed", "largest_at")
        ordered = sorted(self.rows(), key=lambda row: -row["ratio"])
        return [{key: row[key] for key in shown} for row in ordered[:12]]

    def plot(self, *, ax: Any = None) -> Any:
        """The ratio of each layer and head as a heat map; returns the matplotlib axes."""
        layers = list(dict.fromkeys(head.layer for head in self.heads))
        width = max(head.head for head in self.heads) + 1
        image = torch.full((len(layers), width), torch.nan)
        for head in self.heads:
            image[layers.index(head.layer), head.head] = head.limits.ratio
        axes = self._axes(ax)
        axes.figure.colorbar(axes.imshow(image.numpy(), aspect="auto", cmap="viridis"), ax=axes, label="norm over √ln L")
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")
        return axes


@torch.no_grad()
def lora_limits_of(
    model: nn.Module,
    batch: Any,
    *,
    query: str = "q_proj",
    key: str = "k_proj",
    value: str = "v_proj",
    heads: int | None = None,
    epsilon: float = 1e-3,
    max_degree: int = 64,
) -> LoRALimitsReport:
    """`lora_limits` of every attention head of a model, on the inputs that a batch gives it.

    Formula: X is the query module's input, one sequence at a time, rows that `attention_mask` drops left out, in float64; the
    frozen part is the base weight, the adapter's the merged weight less the base, so that adapters of every kind count. A
    bias is one more column of ones in X. β is the attention module's `scaling`, else `h^(-1/2)`.

    Args:
        model: a model with attention, plain, wrapped by PEFT or adapted by lowdim.
        batch: a tensor, tuple or mapping that the model is called with.
        query, key, value: names or dotted suffixes of the projections (BERT: `query`, `key`, `value`).
        heads: query heads, >= 1; null takes `config.num_attention_heads`. Key heads are `config.num_key_value_heads`.
        epsilon: allowed relative error of each exponential, in (0, 1).
        max_degree: largest degree looked for, in [1, 1000].

    Returns:
        LoRALimitsReport: of several sequences the one with the largest ratio counts for a head.

    Raises:
        NoMatchingModuleError: no such projections. NotImplementedError: attention whose scores are not `β q · k` (a norm on
            queries or keys, a soft cap), projections in one fused matrix, heads that do not divide; the module is named.
        ValueError: an option out of range, a sequence of fewer than 2 tokens, inputs that are not finite.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lowdim.diagnose import lora_limits_of
        >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        >>> report = lora_limits_of(model, {"input_ids": torch.arange(32)[None]})
        >>> len(report.heads)
        8

    Rotary positions turn rows without changing their length: `score_bound`, `degree_needed` and `pays` hold after them, the
    largest entries are those before (`notes` says so). The model runs in evaluation mode, without gradients.

    Source: Hu et al., "Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based Models", arXiv 2406.03136.
    """
    check_limits(epsilon, max_degree)
    if heads is not None:
        check_int("heads", heads, 1)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module with attention; got {type(model).__name__}")
    plain = plain_model(model)
    queries = _projections(plain, query)
    config = getattr(plain, "config", None)
    merged, frozen = weights_of(model), weights_of(model, merged=False)
    notes = _notes(plain, config)
    found: list[HeadLimits] = []
    (inputs,) = capture(plain, queries, [batch], inputs=True)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    for name in queries:
        if name not in inputs:
            continue
        parent = name.rpartition(".")[0]
        names = {"q": name, "k": _sibling(plain, parent, key), "v": _sibling(plain, parent, value)}
        attention = plain.get_submodule(parent)
        _check_attention(attention, parent, config)
        parts = {m: (frozen[f"{n}.weight"], merged[f"{n}.weight"], _bias(plain, n)) for m, n in names.items()}
        counts = _head_counts(parent, parts, heads, config)
        scaling = getattr(attention, "scaling", None)
        beta = float(scaling) if isinstance(scaling, (int, float)) else (len(parts["q"][0]) // counts[0]) ** -0.5
        found += _layer_heads(parent, inputs[name], mask, parts, counts, beta, epsilon, max_degree)
    if not found:
        raise ValueError("the batch reached no attention layer")
    return LoRALimitsReport(found, notes)


def _projections(model: nn.Module, query: str) -> list[str]:
    def accept(module: nn.Module) -> bool:
        return is_matrix_layer(module) or is_lowdim_layer(module) or is_peft_layer(module)

    try:
        return list(find_layers(model, [query], accept=accept, other_adapters=True))
    except NoMatchingModuleError:
        for name, module in model.named_modules():
            fused = next((part for part in _FUSED if getattr(module, part, None) is not None), None)
            if fused is not None:
                raise NotImplementedError(
                    f"{name}: its queries, keys and values come from one fused projection ({fused}), which is not read"
                ) from None
        raise


def _sibling(model: nn.Module, parent: str, suffix: str) -> str:
    name = f"{parent}.{suffix.rpartition('.')[2]}" if parent else suffix
    try:
        model.get_submodule(name)
    except AttributeError:
        raise NoMatchingModuleError(f"{parent} has a query projection, but no {suffix!r} beside it") from None
    return name


def _check_attention(attention: nn.Module, name: str, config: Any) -> None:
    normed = next((part for part in _NORMS if isinstance(getattr(attention, part, None), nn.Module)), None)
    if normed is not None and not isinstance(getattr(attention, normed), nn.Identity):
        raise NotImplementedError(f"{name}: {normed} changes queries or keys after their projection; the norms do not apply")
    for cap in _CAPS:
        if getattr(attention, cap, None) is not None or getattr(config, cap, None) is not None:
            raise NotImplementedError(f"{name}: its scores are soft-capped ({cap}); the polynomial is of raw scores")


def _head_counts(parent: str, parts: Mapping[str, Any], heads: int | None, config: Any) -> tuple[int, int]:
    """Query heads and key heads."""
    asked = heads if heads is not None else getattr(config, "num_attention_heads", None)
    if asked is None:
        raise ValueError("heads must be given: the model's config has no num_attention_heads")
    queries = int(asked)
    width = len(parts["q"][0]) // queries
    keys = len(parts["k"][0]) // width if width else 0
    stated = getattr(config, "num_key_value_heads", None)
    whole = width * queries == len(parts["q"][0]) and keys > 0 and width * keys == len(parts["k"][0])
    if not whole or queries % keys or len(parts["v"][0]) % keys or (heads is None and stated not in (None, keys)):
        sizes = " and ".join(str(len(parts[m][0])) for m in "qk")
        raise NotImplementedError(f"{parent}: {queries} heads do not divide its projections of {sizes} features")
    return queries, keys


def _bias(model: nn.Module, name: str) -> Tensor | None:
    module: Any = model.get_submodule(name)
    if is_peft_layer(module):
        module = module.get_base_layer()
    elif is_lowdim_layer(module):
        module = module.base
    return getattr(module, "bias", None)


def _layer_heads(
    parent: str,
    inputs: Tensor,
    mask: Tensor | None,
    parts: Mapping[str, tuple[Tensor, Tensor, Tensor | None]],
    counts: tuple[int, int],
    beta: float,
    epsilon: float,
    max_degree: int,
) -> Iterator[HeadLimits]:
    best: dict[int, HeadLimits] = {}
    sequences = inputs if inputs.ndim == 3 else inputs[None]
    for index, rows in enumerate(sequences):
        if mask is not None and mask.shape[:2] == sequences.shape[:2]:
            rows = rows[mask[index].to(rows.device).bool()]
        if len(rows) < 2:
            raise ValueError(f"sequence {index} of the batch has {len(rows)} tokens; at least 2 are needed")
        x = rows.double()
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{parent}: the input of its query projection has NaN or infinite entries")
        before, added = dict[str, Tensor](), dict[str, Tensor]()
        for name, (base, whole, bias) in parts.items():
            before[name] = x @ base.double().to(x.device).T + (0 if bias is None else bias.double().to(x.device))
            if whole is not base and not torch.equal(whole, base):
                added[name] = x @ (whole.double() - base.double()).to(x.device).T
        for head in range(counts[0]):
            key_head = head // (counts[0] // counts[1])
            place = {"q": (head, counts[0]), "k": (key_head, counts[1]), "v": (key_head, counts[1])}
            own, more = ({m: v.chunk(place[m][1], dim=1)[place[m][0]] for m, v in part.items()} for part in (before, added))
            limits = limits_of_parts(own, more, beta, epsilon, max_degree)
            if head not in best or limits.ratio > best[head].limits.ratio:
                best[head] = HeadLimits(parent, head, index, limits)
    yield from best.values()


def _notes(model: nn.Module, config: Any) -> tuple[str, ...]:
    rotary = any("rotary" in type(module).__name__.lower() for module in model.modules())
    notes = ["scores are bounded over all pairs of tokens; a causal mask only removes some of them"]
    if rotary or getattr(config, "rope_theta", None) is not None:
        notes.append(
            "rotary positions keep the length of rows, so score_bound, degree_needed and pays hold after them; the largest "
            "entries are those before"
        )
    notes.append("one outlier token can set a norm: largest_at is its row in the sequence")
    return tuple(notes)
