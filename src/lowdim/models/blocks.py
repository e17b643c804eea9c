"""Models whose blocks have other parts: structured feed-forward layers, or token mixers in the place of attention.

The choice stands in the configuration (`with_blocks`), and `lowdim.models.build` follows it: transformers' patch mapping puts
the parts in the place of the architecture's own classes while the model is built.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lowdim.errors import check_choice
from lowdim.models.sources import transformers_module

__all__ = ["FFNS", "MIXERS", "built_with_blocks", "check_blocks", "has_blocks", "with_blocks"]

FFNS = ("lowrank", "blockdense", "blockshuffle", "dense")
MIXERS = ("delta-product", "s4d")
_KEY = "lowdim_blocks"


def check_blocks(ffn: str | None, mixer: str | None) -> None:
    """Raise for a feed-forward layer or a mixer that does not exist, or for what cannot be read as its options."""
    for argument, value, known in (("ffn", ffn, FFNS), ("mixer", mixer, MIXERS)):
        if value is not None:
            check_choice(argument, _read(argument, value)[0], known)


def with_blocks(config: Any, ffn: str | None = None, mixer: str | None = None) -> Any:
    """Choose the parts of a model's blocks, in its configuration, which is returned.

    Args:
        config: of a decoder with `hidden_size`, `intermediate_size`, `hidden_act`, such as a Llama.
        ffn: `"lowrank"`, `"blockdense"`, `"blockshuffle"` or `"dense"`, with options after commas: `"blockdense,rank=64"`. The
            rank is half of the model's width, at most 256, if it is not given.
        mixer: `"delta-product"` or `"s4d"`, with options likewise; its heads are the attention's if they are not given.

    Raises:
        UnknownNameError: no such part. ValueError, TypeError: options or sizes that do not fit, or an architecture whose blocks
            have no such part to replace.

    Example:
        >>> from lowdim.models import build
        >>> from lowdim.models.architectures import llama_config
        >>> from lowdim.models.blocks import with_blocks
        >>> config = with_blocks(llama_config("llama-tiny", vocab_size=64), ffn="blockdense,rank=32")
        >>> block = build(config, "pretrain").model.layers[0].mlp
        >>> type(block.fc1).__name__, block.fc1.rank
        ('BlockDense', 32)
    """
    check_blocks(ffn, mixer)
    chosen: dict[str, Any] = {}
    if ffn is not None:
        from lowdim.layers import structured_mlp

        kind, options = _read("ffn", ffn)
        missing = [name for name in ("hidden_size", "intermediate_size", "hidden_act") if not hasattr(config, name)]
        if missing:
            raise ValueError(f"ffn {kind} needs a configuration with {', '.join(missing)}; {type(config).__name__} has none")
        if kind in ("lowrank", "blockdense"):
            blocks = options.get("nblocks", 4) if kind == "blockdense" else 1
            options.setdefault("rank", max(1, min(256, config.hidden_size // 2) // blocks) * blocks)
        structured_mlp(kind, **options)  # refuses options that the layers do not have
        chosen["ffn"] = {"kind": kind, **options}
    if mixer is not None:
        from lowdim.layers.core.mixer_block import mixer_options

        name, options = _read("mixer", mixer)
        chosen["mixer"] = {"name": name, **mixer_options(name, config), **options}
        config.layer_types = ["hybrid"] * config.num_hidden_layers
    setattr(config, _KEY, chosen or None)
    return config


def has_blocks(model: Any) -> bool:
    """Whether the model was built with other parts."""
    return bool(getattr(getattr(model, "config", None), _KEY, None))


@contextmanager
def built_with_blocks(config: Any, cls: Any) -> Iterator[None]:
    """Inside the block, models of this configuration get the parts that it has chosen.

    Args:
        cls: the Auto class of the model.

    Raises:
        ValueError, TypeError: as in `with_blocks`.
    """
    chosen = getattr(config, _KEY, None)
    if not chosen:
        yield
        return
    transformers_module()
    from transformers import monkey_patching as patching

    model_class = cls._model_mapping[type(config)]
    module = sys.modules[model_class.__module__]
    mapping: dict[str, Any] = {}
    for part, suffix in (("ffn", "MLP"), ("mixer", "Attention")):
        if part in chosen:
            name = _own_class(module, model_class, suffix)
            mapping[f"^{name}$"] = _replacement(part, dict(chosen[part]), getattr(module, name), config)
    patching.register_patch_mapping(mapping)
    try:
        yield
    finally:
        patching.unregister_patch_mapping(list(mapping))


def _replacement(part: str, options: dict[str, Any], own: type, config: Any) -> Any:
    """The class that takes the place; it is tried once on the meta device, since an error under the mapping would leave it."""
    import torch

    if part == "ffn":
        from lowdim.layers import structured_mlp

        made: Any = structured_mlp(options.pop("kind"), **options)
        own_init = made.__init__

        def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            own_init(self, config, *args, **kwargs)
            self.plain = (own, config)

        made.__init__ = init
        arguments: tuple[Any, ...] = (config,)
    else:
        from lowdim.layers.core.mixer_block import mixer_attention

        made, arguments = mixer_attention(options.pop("name"), options), (config, 0)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            made(*arguments)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{part}: {error}") from error
    return made


def _own_class(module: Any, model_class: type, suffix: str) -> str:
    """The architecture's class of that part, such as LlamaMLP."""
    prefix = model_class.__name__.partition("For")[0].removesuffix("LMHeadModel")
    name = f"{prefix}{suffix}"
    if not isinstance(getattr(module, name, None), type):
        part = "feed-forward block" if suffix == "MLP" else "self-attention"
        raise ValueError(f"{model_class.__name__} has no {part} of one class ({name}) that could be replaced; a Llama has")
    return name


def _read(argument: str, text: str) -> tuple[str, dict[str, Any]]:
    """`"blockdense,rank=64"` -> `("blockdense", {"rank": 64})`."""
    import json

    name, *pairs = (word.strip() for word in text.split(","))
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{argument} must be a name, with options as name=value after commas; got {text!r}")
        if (key := key.strip()) in options:
            raise ValueError(f"{argument} gives {key} twice; give it once: {text!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value.strip()
    return name, options
