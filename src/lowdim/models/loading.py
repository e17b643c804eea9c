"""Models with weights, or with random ones from the configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowdim.errors import UnknownNameError
from lowdim.models.architectures import is_shape
from lowdim.models.blocks import built_with_blocks
from lowdim.models.configurations import encoder_options, load_config, mean_pooled
from lowdim.models.forms import form_of
from lowdim.models.heads import new_modules
from lowdim.models.limits import bounded_modules
from lowdim.models.padding import PADDING, declare_padding, model_padding, name_padding
from lowdim.models.sentence_classifier import SentenceClassifier
from lowdim.models.sources import Source, quiet, resolve, transformers_module
from lowdim.modules import quantize_base, scheme_named

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["build", "load_by_class", "load_model", "skeleton"]


def load_model(
    name: str,
    task: str,
    *,
    num_labels: int = 2,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    pad_token_id: int | None = None,
    problem: str | None = None,
    quantize: str | None = None,
) -> nn.Module:
    """A pre-trained model with the head of the task; a new head is drawn from `seed`.

    Args:
        task: a key of `lowdim.models.forms.FORMS`, such as `"classify"` (with `num_labels` classes) or `"causal-lm"`.
        problem: the model's `problem_type`, if it is not the task's usual one (`"multi_label_classification"`).
        dtype: of the weights; None means float32.
        pad_token_id: the id that batches are padded with, as `load_tokenizer` gives it; the model is told to ignore it.
        quantize: `"int8"`, `"int4"` or `"nf4"`: the weights of linear layers other than the head are kept in few bits
            (`lowdim.modules.QuantizedLinear`). They are quantized one after the other while they are read: the dense model is
            never held, except from a GGUF file.

    Raises:
        UnknownNameError: the model cannot be found or read, lacks weights, or has no such task.
        ValueError: the model is quantized already.
        MissingExtraError: the package that quantizes is not installed.
    """
    import torch

    form = form_of(task)
    if form.pairs:
        return _sentence_encoder(name, dtype, quantize)
    transformers = transformers_module()
    source = resolve(name)
    if is_shape(name):
        raise UnknownNameError(f"--model {name} is a shape without weights; it can be pretrained only (task pretrain)")
    pooled = form.pools and mean_pooled(source)
    cls = getattr(transformers, "AutoModel" if pooled else form.auto)
    options: dict[str, Any] = {} if pooled else form.options(num_labels, problem)
    config = load_config(name)
    if pooled:
        options = encoder_options(config)
    if model_padding(config) is None and (pad_token_id is not None or getattr(config, PADDING, None) is not None):
        options = {**options, PADDING: pad_token_id}  # before it is built: an embedding of positions may count from it
    if quantize is not None:
        _check_quantize(name, quantize, config)
        options = options if source.gguf else {**options, "quantization_config": _base_config(quantize)}
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
            new = new_modules(model, absent)
            whole: Any = SentenceClassifier(model, num_labels, problem or form.problem) if pooled else model
        except UnknownNameError:
            raise
        except Exception as error:
            raise source.failure(name, f"cannot be loaded for {task}", _refusal(quantize) or error) from error
    broken = sorted(key for key in absent if not form.head or pooled or not key.startswith(new))
    if broken:
        raise UnknownNameError(
            f"--model {name}: {len(broken)} tensors of a model for {task} are missing from its weights or have another shape, "
            f"such as {broken[0]}"
        )
    if source.gguf or quantize is not None:
        _forget_quantization(model)
    if quantize is not None and source.gguf:
        quantize_base(model, quantize, keep=new)
    whole.new_modules = ("classifier",) if pooled else tuple(sorted(new))
    whole.replaced_head = bool(info["mismatched_keys"])  # the checkpoint has a head for other classes
    if pad_token_id is not None:
        declare_padding(model, pad_token_id)
    whole.config._name_or_path = source.path
    return whole


def _sentence_encoder(name: str, dtype: torch.dtype | None, quantize: str | None) -> nn.Module:
    import torch

    from lowdim.models.sentence_encoders import load_sentence_encoder

    if quantize is not None:
        raise ValueError(f"--quantize {quantize} is not for --task embed; leave it out")
    model = load_sentence_encoder(name, device="cpu", pooler=False).to(dtype or torch.float32)
    model.new_modules, model.replaced_head = (), False
    model.config._name_or_path = name if Path(name).expanduser().is_dir() else resolve(name).path
    return model


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

    transformers = transformers_module()
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


def skeleton(source: Source, kind: str) -> nn.Module | None:
    """The model of a folder without its numbers, on the meta device.

    Args:
        kind: the class that is wanted, or an Auto class; None is the result if the folder was written by another class.

    Returns:
        None also where a name, a GGUF file or a quantized checkpoint stands for the model, not a folder of plain weights.

    Raises:
        UnknownNameError: its configuration cannot be read.
    """
    import torch

    from lowdim.models.classes import class_of

    if source.hub or source.gguf or not (Path(source.path) / "config.json").is_file():
        return None
    config = load_config(source.path)
    cls = class_of(config, kind)
    if cls is None or getattr(config, "quantization_config", None) is not None:
        return None
    with quiet(), bounded_modules(f"--model {source.path}"), torch.device("meta"):
        model = cls(config)
    model.tie_weights()
    return model.eval()


def build(config: Any, task: str, *, num_labels: int = 2, problem: str | None = None) -> nn.Module:
    """A model of this configuration with random weights: under a fake-tensor mode nothing is allocated."""
    import copy

    form = form_of(task)
    transformers = transformers_module()
    own = copy.deepcopy(config)
    if form.pairs:
        from lowdim.models.pooled_encoder import PooledEncoder

        with bounded_modules(f"--model {getattr(config, '_name_or_path', '') or type(config).__name__}"):
            encoder = transformers.AutoModel.from_config(own, trust_remote_code=False, **encoder_options(own))
            return PooledEncoder(encoder)
    if form.pools and getattr(config, "mean_pooled", False):
        with bounded_modules(f"--model {getattr(config, '_name_or_path', '') or type(config).__name__}"):
            encoder = transformers.AutoModel.from_config(own, trust_remote_code=False, **encoder_options(own))
        return SentenceClassifier(encoder, num_labels, problem or form.problem)
    cls = getattr(transformers, form.auto)
    for key, value in form.options(num_labels, problem).items():
        setattr(own, key, value)
    if model_padding(own) is None:
        name_padding(own, 0)
    what = f"--model {getattr(config, '_name_or_path', '') or type(config).__name__}"
    with bounded_modules(what), built_with_blocks(own, cls):
        return cls.from_config(own, trust_remote_code=False)


def _check_quantize(name: str, quantize: str, config: Any) -> None:
    """Raise what can be known before the model is loaded."""
    scheme_named(quantize).check()
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"--quantize {quantize}: the weights of --model {name} are quantized already; leave --quantize out")


def _base_config(quantize: str) -> Any:
    from lowdim.models.quantizing import BaseConfig

    return BaseConfig(quantize)


def _refusal(quantize: str | None) -> ValueError | None:
    """Why a weight could not be quantized while it was read."""
    if quantize is None:
        return None
    from lowdim.models.quantizing import refused

    return ValueError(refused.pop()) if refused else None


def _forget_quantization(model: Any) -> None:
    """The model is marked as quantized, which a trainer rejects: a GGUF file's, whose weights are dequantized, and our own."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_is_quantized", False):
            config._is_quantized = False  # type: ignore[union-attr]
    model.is_quantized = False
    model.hf_quantizer = None
    model.__dict__.pop("quantization_method", None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
