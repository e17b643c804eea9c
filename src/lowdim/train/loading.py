"""What a recipe names, loaded: its data, tokenizer and base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowdim import models
from lowdim.models.blocks import with_blocks
from lowdim.models.forms import form_of
from lowdim.models.sentence_encoders import draw_weights
from lowdim.train.answers import use_template
from lowdim.train.recipes import Recipe
from lowdim.train.tasks import Task, load

__all__ = ["load_base", "load_task", "random_model", "recipe_processor", "recipe_tokenizer"]


def load_task(recipe: Recipe, processor: Any) -> Task:
    """The recipe's data, prepared for its model."""
    return load(
        recipe,
        processor,
        evaluation=recipe.eval,
        validation=recipe.validation,
        text=recipe.text,
        max_length=recipe.max_length,
        most=None if form_of(recipe.task).inputs == "pixels" else models.longest_text(recipe.model),
        seed=recipe.seed,
        limit=recipe.limit,
    )


def recipe_processor(recipe: Recipe) -> Any:
    """What makes a model's inputs: the tokenizer, or for images the image processor."""
    if form_of(recipe.task).inputs == "pixels":
        return models.load_image_processor(recipe.model)
    tokenizer = recipe_tokenizer(recipe.model, recipe.tokenizer, recipe.data, recipe.text)
    if recipe.task == "instruct":
        use_template(tokenizer)  # so that what is saved with the model holds the template that it was trained with
    return tokenizer


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


def load_base(recipe: Recipe, num_labels: int, processor: Any, problem: str | None = None) -> nn.Module:
    """The model that the recipe starts from: pre-trained, or random weights drawn from its seed.

    Args:
        problem: as in `lowdim.models.load_model`.
    """
    dtype = getattr(torch, recipe.dtype)
    padding = getattr(processor, "pad_token_id", None)  # an image processor has none
    if not recipe.from_scratch:
        return models.load_model(
            recipe.model,
            recipe.task,
            num_labels=num_labels,
            seed=recipe.seed,
            dtype=dtype,
            pad_token_id=padding,
            problem=problem,
            quantize=recipe.quantize,
        )
    fitted = processor if recipe.tokenizer is not None else None
    model = random_model(
        *(recipe.model, recipe.task, recipe.seed, fitted),
        num_labels=num_labels,
        problem=problem,
        ffn=recipe.ffn,
        mixer=recipe.mixer,
    )
    if padding is not None:
        models.declare_padding(model, padding)
    return cast_stored(model, dtype)


def random_model(
    name: str,
    task: str,
    seed: int,
    tokenizer: Any = None,
    *,
    num_labels: int = 2,
    problem: str | None = None,
    ffn: str | None = None,
    mixer: str | None = None,
) -> nn.Module:
    """A model of this shape with weights drawn from the seed, and the tokenizer's vocabulary if one is given.

    Args:
        ffn, mixer: other parts of its blocks, as in `lowdim.models.blocks.with_blocks`.
    """
    if form_of(task).pairs:
        if (ffn or mixer or tokenizer) is not None:
            raise ValueError("task embed keeps the model's own blocks and tokenizer; leave out ffn, mixer and tokenizer")
        encoder = models.load_model(name, task)
        draw_weights(encoder, seed)
        return encoder
    config = models.load_config(name)
    if ffn is not None or mixer is not None:
        with_blocks(config, ffn, mixer)
    if tokenizer is not None:
        models.fit_vocabulary(config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.build(config, task, num_labels=num_labels, problem=problem)


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
