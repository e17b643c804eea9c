"""A model's transformers configuration: read without its weights, and what it says of the inputs that the model takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lowdim.errors import MissingExtraError, UnknownNameError, listed, nearest, shown
from lowdim.files import read_json_object
from lowdim.models.architectures import is_shape, shape_config
from lowdim.models.limits import check_configuration
from lowdim.models.padding import name_padding
from lowdim.models.sources import Source, quiet, resolve, transformers_module

__all__ = ["encoder_options", "fit_vocabulary", "load_config", "longest_text", "mean_pooled", "reads_segments"]


def load_config(name: str) -> Any:
    """The transformers configuration of a model; no weights are read (except a GGUF file's header).

    Raises:
        UnknownNameError: the model cannot be found, or its configuration cannot be read.
        MissingExtraError: it is a model of timm, which is not installed.
    """
    transformers = transformers_module()
    if is_shape(name):
        config = shape_config(name)
        config.mean_pooled = False
        return config
    source = resolve(name)
    with quiet():
        try:
            content = _configuration(source)
            check_configuration(content, f"--model {name}")
            _check_architecture(content, name)
            if _is_of_timm(content) and importlib.util.find_spec("timm") is None:
                raise MissingExtraError("timm", "timm", f"the model {source.label}")
            config = transformers.AutoConfig.from_pretrained(source.path, **source.options)
        except (UnknownNameError, MissingExtraError):
            raise
        except Exception as error:  # transformers raises various errors for a damaged folder
            raise source.failure(name, "its configuration cannot be read", error) from error
    config.mean_pooled = mean_pooled(source)
    return config


def fit_vocabulary(config: Any, tokenizer: Any) -> None:
    """Set a configuration's vocabulary, and its special tokens, to a tokenizer's."""
    config.vocab_size = len(tokenizer)
    name_padding(config, tokenizer.pad_token_id)
    config.eos_token_id = tokenizer.eos_token_id
    config.bos_token_id = tokenizer.bos_token_id


def longest_text(name: str) -> int | None:
    """The maximum number of tokens that the model can read; None if its configuration does not say."""
    config = load_config(name)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    # RoBERTa-like models count positions starting after the padding token.
    skipped = (config.pad_token_id or 0) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    return limit - skipped


def reads_segments(name: str) -> bool:
    """Whether the model has an embedding for the text of a pair that a token is from (`token_type_ids`)."""
    count = getattr(load_config(name), "type_vocab_size", None)
    return isinstance(count, int) and count > 1


def encoder_options(config: Any) -> dict[str, Any]:
    """Keywords of `AutoModel`: a mean-pooled model never runs BERT's pooler, so it is omitted, neither adapted nor counted."""
    poolers = ("albert", "bert", "camembert", "mpnet", "roberta", "xlm-roberta")
    return {"add_pooling_layer": False} if config.model_type in poolers else {}


def mean_pooled(source: Source) -> bool:
    """Whether the folder is a sentence-transformers model that averages its token states."""
    path = Path(source.path) / "1_Pooling" / "config.json"
    return path.is_file() and bool(read_json_object(path).get("pooling_mode_mean_tokens"))


def _check_architecture(content: dict[str, Any], name: str) -> None:
    """Refuse an architecture that the installed transformers does not have; one with code of its own is refused later."""
    kind, known = content.get("model_type"), transformers_module().CONFIG_MAPPING
    if kind is None or "auto_map" in content or kind in known:
        return
    version, close = transformers_module().__version__, listed(nearest(str(kind), known.keys()))
    raise UnknownNameError(
        f"--model {name}: its configuration is of the architecture {shown(kind)}, which transformers {version} does not have "
        f"(nearest: {close})"
    )


def _is_of_timm(content: dict[str, Any]) -> bool:
    """Whether this is the configuration of a model of timm: by its type, or as timm writes it itself."""
    return content.get("model_type") == "timm_wrapper" or ("architecture" in content and "model_type" not in content)


def _configuration(source: Source) -> dict[str, Any]:
    """What the configuration file says, before any class is made of it."""
    file = Path(source.path)
    file = file if file.is_file() else file / "config.json"
    if file.is_file() and not source.gguf:
        return read_json_object(file)
    return transformers_module().PretrainedConfig.get_config_dict(source.path, **source.options)[0]
