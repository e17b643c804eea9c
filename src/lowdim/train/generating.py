"""What a language model writes after prompts: greedily, in batches that are padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.models import quiet
from lowdim.surgery import model_device

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    stop: Sequence[int] = (),
    pad: int = 0,
    batch_size: int = 16,
) -> list[list[int]]:
    """The most probable next tokens after each prompt, in evaluation mode; what is in a batch does not change them.

    Args:
        model: a language model of transformers.
        prompts: token ids, at least one for each.
        most: tokens to write at most.
        stop: tokens that end an answer; they are not returned.
        pad: the id that fills shorter prompts, on the left, where the model does not look.

    Raises:
        FloatingPointError: the model's outputs are not finite.

    Example:
        >>> from lowdim import models
        >>> from lowdim.train.generating import generate
        >>> tokenizer, model = models.load_tokenizer("stories260k"), models.load_model("stories260k", "causal-lm")
        >>> prompts = tokenizer(["Once upon a", "One day, a little"])["input_ids"]
        >>> [tokenizer.decode(ids) for ids in generate(model, prompts, most=3)]
        ['time, there', 'girl']
    """
    device, was_training = model_device(model), model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    found: list[list[int]] = [[] for _ in prompts]
    try:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            rows = [list(prompts[place]) for place in places]
            for place, answer in zip(places, _batch(model, rows, device, most, list(stop), pad)):
                found[place] = answer
    finally:
        model.train(was_training)
    return found


def _batch(model: Any, rows: list[list[int]], device: torch.device, most: int, stop: list[int], pad: int) -> list[list[int]]:
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    greedy = GenerationConfig(
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=stop or None,
    )
    checks: Any = LogitsProcessorList([_checked])
    with quiet():
        written = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, logits_processor=checks)
    return [_until(row, stop) for row in written[:, width:].tolist()]


def _checked(ids: Tensor, logits: Tensor) -> Tensor:
    """The logits as they are."""
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError("an output of the model is not finite")
    return logits


def _until(ids: list[int], stop: Sequence[int]) -> list[int]:
    """The ids before the first that ends an answer."""
    return ids[: next((place for place, token in enumerate(ids) if token in stop), len(ids))]
