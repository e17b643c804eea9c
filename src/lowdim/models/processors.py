"""What makes a model's inputs: tokenizers, and processors of images and sound."""

from __future__ import annotations

import importlib.util
from typing import Any

from lowdim.errors import MissingExtraError, UnknownNameError
from lowdim.models.architectures import is_shape
from lowdim.models.configurations import load_config
from lowdim.models.padding import set_padding
from lowdim.models.sources import quiet, resolve, transformers_module

__all__ = ["load_image_processor", "load_processor", "load_tokenizer"]


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, with the padding token that the model ignores (see `lowdim.models.padding`).

    Raises:
        UnknownNameError: the model cannot be found, or has no tokenizer that can be read.
    """
    transformers = transformers_module()
    source = resolve(name)
    if is_shape(name):
        raise UnknownNameError(f"--model {name} is a shape without a tokenizer; choose one: bytes, characters, or a folder")
    with quiet():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.path, **source.options)
            tokenizer("a")  # a limit or a special token of another type is only noticed here
        except Exception as error:
            raise source.failure(name, "its tokenizer cannot be read", error) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers returns an empty tokenizer if it finds no files
        raise UnknownNameError(f"--model {name}: it has no tokenizer (no vocabulary was found)")
    set_padding(tokenizer, _config_or_none(name))
    return tokenizer


def load_image_processor(name: str) -> Any:
    """What makes a model's inputs from images: the image processor of its folder, computed by Pillow and numpy.

    Where torchvision is installed, transformers would take it instead, and the same image would give other numbers: Pillow is
    asked for on every machine.

    Raises:
        UnknownNameError: the model cannot be found, or has no image processor that can be read.
        MissingExtraError: Pillow is not installed, or timm, for a model of timm.
    """
    transformers = transformers_module()
    if importlib.util.find_spec("PIL") is None:
        raise MissingExtraError("pillow", "image", "reading images")
    source = resolve(name)
    if is_shape(name):
        raise UnknownNameError(f"--model {name} is a language model's shape; name a folder with an image model")
    load_config(name)  # whose failures have messages of their own
    with quiet():
        try:
            return transformers.AutoImageProcessor.from_pretrained(source.path, backend="pil", **source.options)
        except Exception as error:  # transformers raises various errors for a damaged folder
            raise source.failure(name, "its image processor (preprocessor_config.json) cannot be read", error) from error


def load_processor(name: str) -> Any:
    """What makes a model's inputs from pictures or sound; None if it has no such part that can be read."""
    transformers = transformers_module()
    source = resolve(name)
    with quiet():
        for kind in ("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor"):
            try:
                return getattr(transformers, kind).from_pretrained(source.path, **source.options)
            except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
                continue
    return None


def _config_or_none(name: str) -> Any:
    try:
        return load_config(name)
    except UnknownNameError:  # a tokenizer's own folder
        return None
