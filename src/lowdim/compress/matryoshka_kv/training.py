"""Training the projections: random ranks in each step, the model at full rank as the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.compress.matryoshka_kv.interface import keeping_ranks, projections
from lowdim.compress.matryoshka_kv.method import MatryoshkaKVConfig
from lowdim.compress.matryoshka_kv.ranks import sample_kv_ranks
from lowdim.errors import check_float
from lowdim.linalg import stream, wide
from lowdim.surgery import freeze_except

__all__ = ["matryoshka_freeze", "matryoshka_loss", "matryoshka_step"]


def matryoshka_loss(
    student_logits: Tensor,  # (batch, tokens, vocabulary)
    teacher_logits: Tensor,  # (batch, tokens, vocabulary)
    labels: Tensor,  # (batch, tokens), -100: ignored
    *,
    kl_weight: float = 0.25,
    ce_weight: float = 0.75,
    temperature: float = 1.0,
) -> Tensor:
    """Distillation from the model at full rank, and the loss on the next tokens.

    Formula: `kl_weight · T² · KL(p_T ‖ p_S) / (batch · tokens) + ce_weight · CE`, with `p = softmax(logits / T)`, the
    divergence summed over vocabulary and positions, and CE the mean over the labels of the next tokens that are not ignored.

    Args:
        kl_weight, ce_weight, temperature: as in `MatryoshkaKVConfig`.

    Returns:
        A scalar, in float32 or better.

    Raises:
        ValueError: logits of different shapes, labels that do not fit, a weight below 0, a temperature not above 0.

    Example:
        >>> import torch
        >>> from lowdim.compress import matryoshka_loss
        >>> logits = torch.zeros(1, 3, 4)
        >>> round(float(matryoshka_loss(logits, logits, torch.tensor([[0, 1, 2]]))), 4)  # 0.75 ln 4
        1.0397

    Source: Lin et al., "MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection", arXiv 2410.14731.
    """
    check_float("kl_weight", kl_weight, 0.0)
    check_float("ce_weight", ce_weight, 0.0)
    check_float("temperature", temperature, 0.0, low_open=True)
    if student_logits.shape != teacher_logits.shape or labels.shape != student_logits.shape[:2]:
        raise ValueError(
            "student_logits and teacher_logits must be (batch, tokens, vocabulary) and labels (batch, tokens); got "
            f"{tuple(student_logits.shape)}, {tuple(teacher_logits.shape)} and {tuple(labels.shape)}"
        )
    student, teacher = wide(student_logits), wide(teacher_logits.detach())
    loss = student.new_zeros(())
    if kl_weight:
        ours, theirs = (F.log_softmax(x.flatten(0, 1) / temperature, -1) for x in (student, teacher))
        loss = loss + kl_weight * temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    if ce_weight:
        loss = loss + ce_weight * F.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return loss


def matryoshka_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    config: MatryoshkaKVConfig,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """The loss of one training step: ranks are drawn for each head, and the model at full rank is the teacher.

    Args:
        batch: what `model(**batch)` takes; labels are its `"labels"`, or the ids.
        config: the weights of the loss and the step of the ranks.
        generator, seed: of the ranks; pass another seed in each step.

    Returns:
        `matryoshka_loss`, ready for `backward()`. The model's ranks are afterwards what they were.

    Raises:
        TypeError: the model has no projections. ValueError: as in `sample_kv_ranks` and `matryoshka_loss`.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lowdim.compress import MatryoshkaKVConfig, matryoshka_freeze, matryoshka_kv, matryoshka_step
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
        >>> model, config = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)), MatryoshkaKVConfig()
        >>> batch = {"input_ids": torch.randint(64, (4, 32))}
        >>> optimizer = torch.optim.AdamW(matryoshka_freeze(matryoshka_kv(model, config, [batch])), lr=1e-3)
        >>> for step in range(2):
        ...     matryoshka_step(model, batch, config, seed=step).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    When not: at budgets of a half and above, where the principal components are already good, and training costs a little.

    Source: arXiv 2410.14731.
    """
    found = projections(model)
    if generator is None and seed is not None:
        generator = stream(seed, "matryoshka ranks")
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    inputs = {**{key: value for key, value in batch.items() if key != "labels"}, "use_cache": False}
    with keeping_ranks(found):
        for p in found.values():
            p.set_ranks(p.head_dim, p.head_dim)
        with torch.no_grad():
            teacher = model(**inputs).logits
        for p in found.values():
            keys, values = sample_kv_ranks(1, p.num_kv_heads, p.head_dim, config.rank_step, generator)
            p.set_ranks(keys[0], values[0])
        student = model(**inputs).logits
    weights = {"kl_weight": config.kl_weight, "ce_weight": config.ce_weight, "temperature": config.temperature}
    return matryoshka_loss(student, teacher, labels, **weights)


def matryoshka_freeze(model: nn.Module) -> list[nn.Parameter]:
    """Make only the projections trainable: `key_raw`, `value_raw` and `value_mean` of every layer that has one.

    Returns:
        The trained parameters in model order; the paper hands them to AdamW with a learning rate of 1e-3.

    Raises:
        TypeError: the model has no projections.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lowdim.compress import MatryoshkaKVConfig, matryoshka_freeze, matryoshka_kv
        >>> sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = matryoshka_kv(model, MatryoshkaKVConfig(), [{"input_ids": torch.randint(64, (4, 32))}])
        >>> [tuple(p.shape) for p in matryoshka_freeze(model)]
        [(2, 8, 8), (2, 8, 8), (2, 8)]

    Source: arXiv 2410.14731.
    """
    found = projections(model)
    return freeze_except(model, (p for projection in found.values() for p in projection.parameters(recurse=False)))
