"""What each diagnostic of `lowdim diagnose` measures: its inputs on the command line, and the arguments made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowdim.errors import DataError
from lowdim.jobs.adapted import holds_adapter, load_adapted

__all__ = ["MEASURES", "Measure", "flag", "model_and_batch", "weights_source"]

_TEXTS, _LENGTH = 4, 256  # of a batch: the longest of the first texts, and the tokens of each


def weights_source(name: str) -> Any:
    """What `weights_of` reads: a path unchanged; the folder of an adapter or a run, and a model in GGUF, as a module."""
    path = Path(name)
    for folder in (path, path / "adapter"):
        if folder.is_dir() and holds_adapter(folder):
            return load_adapted(folder)[1].merge()
    if path.exists() and path.suffix != ".gguf" and not _only_gguf(path):
        return path
    from lowdim import models

    source = models.resolve(name)
    return models.load_model(name, "causal-lm") if source.gguf else Path(source.path)


def _only_gguf(path: Path) -> bool:
    return path.is_dir() and not any(path.glob("*.safetensors")) and any(path.glob("*.gguf"))


def model_and_batch(inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model (with its adapter attached), and the first texts of the data as one padded batch.

    Raises:
        DataError: no text, or only such as have fewer than two tokens. UnknownNameError: the model has no tokenizer.
    """
    from lowdim import models
    from lowdim.train.data import read_texts

    name, model = str(inputs["model"]), None
    for folder in (Path(name), Path(name) / "adapter"):
        if folder.is_dir() and holds_adapter(folder):
            name, adapted = load_adapted(folder)
            model = adapted.model
            break
    tokenizer = models.load_tokenizer(name)
    model = models.load_model(name, "causal-lm", pad_token_id=tokenizer.pad_token_id) if model is None else model
    texts = read_texts(list(inputs["data"]))[0]
    limit = min(_LENGTH, models.longest_text(name) or _LENGTH)
    pieces = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in texts[: 8 * _TEXTS]]
    pieces = sorted((ids for ids in pieces if len(ids) > 1), key=len, reverse=True)[:_TEXTS]
    if not pieces:
        raise DataError(f"{', '.join(map(str, inputs['data']))}: no text of at least two tokens")
    return model, dict(tokenizer.pad({"input_ids": pieces}, return_tensors="pt"))


def _weights(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(map(weights_source, inputs.values()))


def _as_given(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """For functions that read models and data themselves."""
    return tuple(inputs.values())


@dataclass(frozen=True)
class Measure:
    """How a diagnostic is called.

    Attributes:
        inputs: what it needs: `"model"` is the command's second word, the others are flags.
        arguments: inputs by name -> the function's positional arguments.
        function: its name in `lowdim.diagnose`, or `"module:name"`, if it is not the target of the catalogue's row.
    """

    inputs: tuple[str, ...]
    arguments: Callable[[Mapping[str, Any]], tuple[Any, ...]] = _weights
    function: str = ""


#: Slug -> how it is called. Others are called with weights under the names of their function's positional parameters.
MEASURES: dict[str, Measure] = {
    "batch-lr": Measure(("model", "data"), _as_given, "lowdim.jobs.curvature:batch_lr"),
    "farms": Measure(("model",)),
    "generalization-dynamics": Measure(("model", "data"), _as_given, "lowdim.jobs.curvature:generalization_dynamics"),
    "intrinsic-dimension": Measure(("model",), _as_given, "lowdim.jobs.curvature:intrinsic_dimension"),
    "lora-limits": Measure(("model", "data"), model_and_batch, "lora_limits_of"),
}


def flag(name: str) -> str:
    """An input as it is typed.

    Example:
        >>> flag("model"), flag("data")
        ('MODEL', '--data')
    """
    return "MODEL" if name == "model" else f"--{name}"
