"""A base model with the adapter of a folder, whether lowdim or PEFT wrote it, by what the folder says of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowdim.errors import DataError, UnknownNameError

__all__ = ["About", "described", "holds_adapter", "load_adapted"]

#: PEFT's task -> the Auto class whose model it is for.
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class About:
    """What an adapter's folder says.

    Attributes:
        base: the base model.
        kind: its class, or an Auto class.
        labels: the number of classes of a head that was trained along; 0 without a head.
        quantize: how the base's weights were kept in the training.
        whole: the modules that the adapter holds whole.
        of_peft: whether PEFT wrote it.
    """

    base: str | None
    kind: str | None
    labels: int
    quantize: str | None = None
    whole: tuple[str, ...] = ()
    of_peft: bool = False


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter of lowdim's or of PEFT's."""
    from lowdim.adapters.core.files.layout import TENSORS
    from lowdim.adapters.core.files.peft_reader import is_peft_folder

    return (folder / TENSORS).is_file() or is_peft_folder(folder)


def load_adapted(folder: Path, *, model: str | None = None, task: str | None = None) -> tuple[str, Any]:
    """The base model's name, and the model with the adapter attached.

    Args:
        model: the base model; None uses the name in the folder.
        task: `"classify"` or `"causal-lm"`; None detects it.

    Raises:
        CheckpointError, DataError, UnknownNameError: the adapter is damaged, its base model is unknown or cannot be loaded.
    """
    from lowdim import models
    from lowdim.adapters import load_adapter
    from lowdim.modules import quantize_base

    about = described(folder)
    name = model or about.base
    if not name:
        raise DataError(f"{folder} does not say which model it is for; name it with --model")
    task = task or _task(about)
    if task is None:
        base = models.load_by_class(name, str(about.kind), num_labels=about.labels or None)
        if about.quantize is not None:
            quantize_base(base, about.quantize, keep=about.whole)
    else:
        pad = models.load_tokenizer(name).pad_token_id
        base = models.load_model(name, task, num_labels=about.labels or 2, pad_token_id=pad, quantize=about.quantize)
    return name, load_adapter(base, folder)


def _task(about: About) -> str | None:
    """The task of lowdim's that builds this model; None if it is of another class."""
    kind = about.kind or ""
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if kind in ("SentenceClassifier", "AutoModelForSequenceClassification"):
        return "classify"
    if kind == "SentenceTransformer":
        return "embed"
    takes = _inputs(kind)
    if kind.endswith("ForSequenceClassification") and takes == "input_ids":
        return "classify"
    known = kind.startswith("AutoModel") or takes is not None
    return None if known else ("classify" if about.labels else "causal-lm")


def _inputs(kind: str) -> str | None:
    """The first input of a class of transformers; None if there is no such class."""
    from lowdim.models.classes import class_named

    try:
        return class_named(kind).main_input_name
    except UnknownNameError:
        return None


def described(folder: Path) -> About:
    """What the folder of an adapter says of it.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    from lowdim.adapters.core.files.layout import read_adapter
    from lowdim.adapters.core.files.peft_reader import is_of_peft, read_peft

    if not is_of_peft(folder):
        tensors, header = read_adapter(folder)
        kind = header.base_model.get("class")
        labels, whole = _labels(tensors, header.modules_to_save), tuple(header.modules_to_save)
        return About(header.base, kind if isinstance(kind, str) else None, labels, header.quantize, whole)
    found = read_peft(folder)
    mapped = (found.config.auto_mapping or {}).get("base_model_class")
    kind = mapped if isinstance(mapped, str) else _TASKS.get(found.config.task_type or "")
    labels = _labels(found.kept, {key.rpartition(".")[0] for key in found.kept})
    return About(found.config.base_model_name_or_path, kind, labels, of_peft=True)


def _labels(tensors: Mapping[str, Any], modules: Iterable[str]) -> int:
    """The rows of a saved head's last matrix, which gives the logits."""
    from lowdim.surgery import HEAD_NAMES

    heads = tuple(f"{name}." for name in modules if not HEAD_NAMES.isdisjoint(name.split(".")) and "lm_head" not in name)
    sizes = [len(t) for key, t in sorted(tensors.items()) if t.ndim == 2 and heads and key.startswith(heads)]
    return sizes[-1] if sizes else 0
