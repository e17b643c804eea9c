"""What a recipe names, loaded: its data, tokenizer and base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowdim import models
from lowdim.train.recipes import Recipe
from lowdim.train.tasks import Task, classification, language_modelling

__all__ = ["load_base", "load_task", "random_model", "recipe_tokenizer"]


def load_task(recipe: Recipe, tokenizer: Any) -> Task:
    """The recipe's data, tokenised."""
    keywords: dict[str, Any] = {
        "evaluation": recipe.eval,
        "text": recipe.text,
        "max_length": recipe.max_length,
        "most": models.longest_text(recipe.model),
        "seed": recipe.seed,
        "limit": recipe.limit,
    }
    if recipe.task == "classify":
        segments = models.reads_segments(recipe.model)
        return classification(tokenizer, recipe.data, label=recipe.label, segments=segments, **keywords)
    if recipe.task == "pretrain":
        from lowdim.train.packing import pretraining

        length = keywords.pop("max_length")
        return pretraining(tokenizer, recipe.data, length=length, streaming=recipe.streaming, **keywords)
    return language_modelling(tokenizer, recipe.data, **keywords)


def recipe_tokenizer(model: str, name: str | None, data: Sequence[str], text: str | None) -> Any:
    """A tokenizer by name: `bytes`, `characters` (of the data), a folder or hub id; None uses the model's own.

    Raises:
        UnknownNameError: it cannot be found, or the model has none.
        DataError: `characters` for a text that is not known in advance.
    """
    from lowdim.train.packing import training_text
    from lowdim.train.tokenizers import byte_tokenizer, character_tokenizer

    if name == "bytes":
        return byte_tokenizer()
    if name == "characters":
        return character_tokenizer(training_text(data, text))
    return models.load_tokenizer(name or model)


def load_base(recipe: Recipe, num_labels: int, tokenizer: Any) -> nn.Module:
    """The model that the recipe starts from: pre-trained, or random weights drawn from its seed."""
    dtype = getattr(torch, recipe.dtype)
    if not recipe.from_scratch:
        return models.load_model(
            recipe.model, recipe.task, num_labels=num_labels, seed=recipe.seed, dtype=dtype, pad_token_id=tokenizer.pad_token_id
        )
    fitted = tokenizer if recipe.tokenizer is not None else None
    model = random_model(recipe.model, recipe.task, recipe.seed, fitted, num_labels=num_labels)
    if tokenizer.pad_token_id is not None:
        models.declare_padding(model, tokenizer.pad_token_id)
    return cast_stored(model, dtype)


def random_model(name: str, task: str, seed: int, tokenizer: Any = None, *, num_labels: int = 2) -> nn.Module:
    """A model of this shape with weights drawn from the seed, and the tokenizer's vocabulary if one is given."""
    config = models.load_config(name)
    if tokenizer is not None:
        models.fit_vocabulary(config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.build(config, task, num_labels=num_labels)


def cast_stored(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the tensors that a file holds, in place, as `from_pretrained(dtype=...)` does.

    `model.to(dtype)` would round buffers that no file holds as well, such as the frequencies of rotary positions; the model
    that is loaded again would compute something else.
    """
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)
    return model
