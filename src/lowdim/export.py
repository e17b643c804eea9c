"""Trained models for the tools people run: PEFT adapters, merged transformers checkpoints, sentence-transformers folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lowdim.adapters import Adapted, to_peft
from lowdim.errors import check_choice
from lowdim.files import read_tensors, whole_folder, write_tensors, write_text
from lowdim.layers import densify
from lowdim.models import Source, encoder_options, quiet
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
    """Write a trained model for other tools. Nothing is left in `folder` where it fails.

    Args:
        model: an `Adapted`, or a transformers model (which can only be written merged). Writing it merged merges it, in place;
            structured layers become dense ones.
        format: `"peft"`: `adapter_config.json` and `adapter_model.safetensors`; `"merged"`: a checkpoint that
            `from_pretrained` loads. A mean-pooled classifier is written as its encoder (a sentence-transformers folder stays
            one) with `head.safetensors` beside it.
        tokenizer: saved along with a merged model.
        source: where the base model came from, for the loading instructions and for files to copy along.
        rank: write PEFT's LoRA, and truncate updates of full rank to this; None writes PEFT's own method where it has it
            (RandLoRA), exact.

    Returns:
        An `ExportResult` that states the errors.

    Raises:
        UnknownNameError: unknown format.
        ValueError: PEFT export of a model without an adapter, or a model that transformers cannot write.
        OSError: no space or no permission.
    """
    check_choice("--format", format, FORMATS)
    folder = Path(folder)
    if format == "peft":
        if not isinstance(model, Adapted):
            raise ValueError("only an adapted model can be written as a PEFT adapter; export it as 'merged'")
        return _peft(model, folder, source, rank)
    return _merged(model.merge() if isinstance(model, Adapted) else model, folder, tokenizer, source)


def _peft(adapted: Adapted, folder: Path, source: Source | None, rank: int | None) -> ExportResult:
    model: Any = adapted.model
    base = source.path if source else getattr(model.config, "_name_or_path", None) or "BASE_MODEL"
    options = _options(model)
    if source and source.gguf:
        options["gguf_file"] = source.gguf
    with whole_folder(folder) as draft:
        written = to_peft(adapted, draft, rank=rank, native=rank is None, root=getattr(model, "export_root", ""))
        if isinstance(model, SentenceClassifier):
            write_tensors(draft / "head.safetensors", model.classifier.state_dict())
            snippet = (
                "from peft import PeftModel\nfrom safetensors.torch import load_file\n"
                "from transformers import AutoModel, AutoTokenizer\n\n"
                f"base = {base!r}\n"
                f'encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(base, {_typed(options)}), "{folder.name}")\n'
                f"{_head_lines(folder, 'base')}"
            )
        else:
            snippet = (
                f"from peft import PeftModel\nfrom transformers import {_auto(model)}\n\n"
                f"base = {_auto(model)}.from_pretrained({base!r}, {_typed(options)})\n"
                f'model = PeftModel.from_pretrained(base, "{folder.name}")\n'
            )
        write_text(draft / "README.md", _readme("A PEFT adapter written by lowdim", snippet))

    def reload() -> nn.Module:
        import transformers
        from peft import PeftModel

        with quiet():
            bare = getattr(transformers, _auto(model)).from_pretrained(base, **options)
            return _with_head(PeftModel.from_pretrained(bare, str(folder)), folder, model)

    return ExportResult(folder, "peft", snippet, reload, {k: v for k, v in written.errors.items() if v})


def _merged(model: nn.Module, folder: Path, tokenizer: Any, source: Source | None) -> ExportResult:
    model = densify(model)
    inner: Any = model.encoder if isinstance(model, SentenceClassifier) else model
    if not hasattr(inner, "save_pretrained"):
        raise ValueError(f"only transformers models can be written merged; got {type(model).__name__}")
    options = _options(model, for_merged=True)
    with whole_folder(folder) as draft, quiet():
        inner.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        if isinstance(model, SentenceClassifier):
            write_tensors(draft / "head.safetensors", model.classifier.state_dict())
            if source is not None:
                _copy_pooling(Path(source.path), draft)
            snippet = (
                "from safetensors.torch import load_file\nfrom transformers import AutoModel, AutoTokenizer\n\n"
                f'encoder = AutoModel.from_pretrained("{folder.name}", {_typed(options)})\n'
                f"{_head_lines(folder, repr(folder.name))}"
            )
        else:
            snippet = (
                f"from transformers import {_auto(model)}\n\n"
                f'model = {_auto(model)}.from_pretrained("{folder.name}", {_typed(options)})\n'
            )
        write_text(draft / "README.md", _readme("A merged model written by lowdim", snippet))

    def reload() -> nn.Module:
        import transformers

        with quiet():
            return _with_head(getattr(transformers, _auto(model)).from_pretrained(folder, **options), folder, model)

    return ExportResult(folder, "merged", snippet, reload)


def _auto(model: nn.Module) -> str:
    """The class of transformers that loads it."""
    if isinstance(model, SentenceClassifier):
        return "AutoModel"
    return "AutoModelForSequenceClassification" if "SequenceClassification" in type(model).__name__ else "AutoModelForCausalLM"


def _options(model: Any, *, for_merged: bool = False) -> dict[str, Any]:
    """Keywords with which `from_pretrained` gives this very model."""
    options: dict[str, Any] = {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    if isinstance(model, SentenceClassifier):
        return {**options, **encoder_options(model.config)}
    if _auto(model).endswith("SequenceClassification") and not for_merged:
        options |= {"num_labels": model.config.num_labels, "pad_token_id": model.config.pad_token_id}
    return options


def _typed(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _copy_pooling(source: Path, folder: Path) -> None:
    for name in _POOLING_FILES:
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def _with_head(loaded: nn.Module, folder: Path, like: nn.Module) -> nn.Module:
    if not isinstance(like, SentenceClassifier):
        return loaded
    whole = SentenceClassifier(loaded, like.num_labels)
    whole.classifier.load_state_dict(read_tensors(folder / "head.safetensors")[0])
    return whole


def _head_lines(folder: Path, base: str) -> str:
    return (
        f'head = load_file("{folder.name}/head.safetensors")\ntokenizer = AutoTokenizer.from_pretrained({base})\n\n'
        'batch = tokenizer(["a text"], padding=True, truncation=True, return_tensors="pt")\n'
        "states, mask = encoder(**batch).last_hidden_state, batch['attention_mask'].unsqueeze(-1)\n"
        'logits = ((states * mask).sum(1) / mask.sum(1)) @ head["weight"].T + head["bias"]\n'
    )


def _readme(title: str, snippet: str) -> str:
    return f"# {title}\n\n```python\n{snippet}```\n"
