"""Trained models for the tools people run: PEFT adapters, merged transformers checkpoints, sentence-transformers folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowdim.adapters import Adapted, to_peft
from lowdim.errors import check_choice
from lowdim.files import read_tensors, write_tensors, write_text
from lowdim.models import Source
from lowdim.sentence_classifier import SentenceClassifier

__all__ = ["FORMATS", "ExportResult", "export"]

FORMATS = ("peft", "merged")
_POOLING_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json")


@dataclass(frozen=True)
class ExportResult:
    """What was written, what it lost, and how to load it.

    Attributes:
        errors: layer -> relative error of a truncated update; empty or zeros where exact.
        how_to_load: Python that loads the folder without lowdim.
        reload: loads the folder the same way, to check it.
    """

    folder: Path
    format: str
    how_to_load: str
    reload: Callable[[], nn.Module]
    errors: dict[str, float] = field(default_factory=dict)


def export(
    model: Adapted | nn.Module,
    folder: str | Path,
    format: str = "peft",
    *,
    tokenizer: Any = None,
    source: Source | None = None,
    rank: int | None = None,
) -> ExportResult:
    """Write a trained model for other tools.

    Args:
        model: an `Adapted`, or a plain transformers model (which can only be written merged).
        format: `"peft"`: `adapter_config.json` and `adapter_model.safetensors`; `"merged"`: a checkpoint that
            `from_pretrained` loads. A mean-pooled classifier is written as its encoder (a sentence-transformers folder stays
            one) with `head.safetensors` beside it.
        tokenizer: saved along with a merged model.
        source: where the base model came from, for the loading instructions and for files to copy along.
        rank: at which to truncate an update of full rank (PEFT only).

    Returns:
        An `ExportResult` that states the errors.

    Raises:
        UnknownNameError: unknown format.
        ValueError: PEFT export of a model without an adapter.
    """
    check_choice("--format", format, FORMATS)
    folder = Path(folder)
    if format == "peft":
        if not isinstance(model, Adapted):
            raise ValueError("only an adapted model can be written as a PEFT adapter; export it as 'merged'")
        return _peft(model, folder, source, rank)
    plain = model.merge() if isinstance(model, Adapted) else model
    return _merged(plain, folder, tokenizer, source)


def _peft(adapted: Adapted, folder: Path, source: Source | None, rank: int | None) -> ExportResult:
    model = adapted.model
    root = getattr(model, "export_root", "")
    written = to_peft(adapted, folder, rank=rank, root=root)
    base = source.path if source else getattr(model.config, "_name_or_path", "BASE_MODEL")
    options = f", gguf_file={source.gguf!r}" if source and source.gguf else ""
    if isinstance(model, SentenceClassifier):
        write_tensors(folder / "head.safetensors", model.classifier.state_dict())
        extra = ", add_pooling_layer=False" if model.config.model_type in ("bert", "roberta", "xlm-roberta", "mpnet") else ""
        snippet = (
            "from peft import PeftModel\nfrom safetensors.torch import load_file\nfrom transformers import AutoModel, AutoTokenizer\n\n"
            f'base = {base!r}\nencoder = PeftModel.from_pretrained(AutoModel.from_pretrained(base{extra}), "{folder.name}")\n'
            f"{_head_lines(folder, 'AutoTokenizer.from_pretrained(base)')}"
        )
        count = model.num_labels

        def reload() -> nn.Module:
            from peft import PeftModel
            from transformers import AutoModel

            encoder = AutoModel.from_pretrained(base, **({"add_pooling_layer": False} if extra else {}))
            return _with_head(PeftModel.from_pretrained(encoder, str(folder)), folder, count)
    else:
        cls = (
            "AutoModelForSequenceClassification" if "SequenceClassification" in type(model).__name__ else "AutoModelForCausalLM"
        )
        labels = f", num_labels={model.config.num_labels}" if cls.endswith("SequenceClassification") else ""
        snippet = (
            f"from peft import PeftModel\nfrom transformers import {cls}\n\n"
            f'model = PeftModel.from_pretrained({cls}.from_pretrained({base!r}{options}{labels}), "{folder.name}")\n'
        )

        def reload() -> nn.Module:
            import transformers
            from peft import PeftModel

            keywords: dict[str, Any] = dict(source.options) if source else {}
            if labels:
                keywords["num_labels"] = model.config.num_labels
            return PeftModel.from_pretrained(getattr(transformers, cls).from_pretrained(base, **keywords), str(folder))

    write_text(folder / "README.md", _readme("A PEFT adapter written by lowdim", snippet))
    return ExportResult(folder, "peft", snippet, reload, {k: v for k, v in written.errors.items() if v})


@torch.no_grad()
def _merged(model: nn.Module, folder: Path, tokenizer: Any, source: Source | None) -> ExportResult:
    folder.mkdir(parents=True, exist_ok=True)
    inner: Any = model.encoder if isinstance(model, SentenceClassifier) else model
    if not hasattr(inner, "save_pretrained"):
        raise ValueError(f"only transformers models can be written merged; got {type(model).__name__}")
    inner.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if isinstance(model, SentenceClassifier):
        write_tensors(folder / "head.safetensors", model.classifier.state_dict())
        if source is not None:
            _copy_pooling(Path(source.path), folder)
        extra = ", add_pooling_layer=False" if inner.config.model_type in ("bert", "roberta", "xlm-roberta", "mpnet") else ""
        snippet = (
            "from safetensors.torch import load_file\nfrom transformers import AutoModel, AutoTokenizer\n\n"
            f'encoder = AutoModel.from_pretrained("{folder.name}"{extra})\n'
            f"{_head_lines(folder, f'AutoTokenizer.from_pretrained({folder.name!r})')}"
        )
        count = model.num_labels

        def reload() -> nn.Module:
            from transformers import AutoModel

            options = {"add_pooling_layer": False} if extra else {}
            return _with_head(AutoModel.from_pretrained(folder, **options), folder, count)
    else:
        cls = (
            "AutoModelForSequenceClassification" if "SequenceClassification" in type(model).__name__ else "AutoModelForCausalLM"
        )
        snippet = f'from transformers import {cls}\n\nmodel = {cls}.from_pretrained("{folder.name}")\n'

        def reload() -> nn.Module:
            import transformers

            return getattr(transformers, cls).from_pretrained(folder)

    write_text(folder / "README.md", _readme("A merged model written by lowdim", snippet))
    return ExportResult(folder, "merged", snippet, reload)


def _copy_pooling(source: Path, folder: Path) -> None:
    for name in _POOLING_FILES:
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def _with_head(encoder: nn.Module, folder: Path, num_labels: int) -> nn.Module:
    model = SentenceClassifier(encoder, num_labels)
    model.classifier.load_state_dict(read_tensors(folder / "head.safetensors")[0])
    return model


def _head_lines(folder: Path, tokenizer: str) -> str:
    return (
        f'head = load_file("{folder.name}/head.safetensors")\ntokenizer = {tokenizer}\n\n'
        'batch = tokenizer(["a text"], padding=True, truncation=True, return_tensors="pt")\n'
        "states, mask = encoder(**batch).last_hidden_state, batch['attention_mask'].unsqueeze(-1)\n"
        'logits = ((states * mask).sum(1) / mask.sum(1)) @ head["weight"].T + head["bias"]\n'
    )


def _readme(title: str, snippet: str) -> str:
    return f"# {title}\n\n```python\n{snippet}```\n"
