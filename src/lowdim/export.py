"""Trained models for the tools people run: PEFT adapters, merged transformers checkpoints, sentence-transformers folders."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from lowdim.adapters import Adapted, to_peft
from lowdim.adapters.core.files.peft_targets import TARGETS
from lowdim.errors import check_choice
from lowdim.files import read_tensors, whole_folder, write_tensors, write_text
from lowdim.layers import densify
from lowdim.models import Probe, Source, encoder_options, quiet, room_for
from lowdim.models.classes import encoder_of, imported, is_sentence_transformer, loading_class
from lowdim.models.sentence_classifier import SentenceClassifier
from lowdim.results import Result
from lowdim.surgery import parent_and_child

__all__ = ["FORMATS", "ExportResult", "export"]

FORMATS = ("peft", "merged")
_POOLING_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json")


@dataclass(frozen=True)
class ExportResult(Result):
    """The result of an export: the files, their errors, and how to load them.

    Attributes:
        how_to_load: Python that loads the folder without lowdim.
        reload: loads the folder the same way, to check it.
        errors: layer -> relative error of a truncated update; empty or zeros where exact.
        ranks: layer -> rank that was written, for a PEFT adapter.
        suggested_rank: the smallest common rank with an error of at most 1 % in every layer, where something was truncated.
        notes: what users of `target` need to know: the command, limits to raise.
        largest_difference: between the outputs of the trained model and of the one that the folder gave when it was loaded
            again; None if that was not possible (no peft, an unknown base model, no room for a second model), or the update
            was truncated.
    """

    left_out: ClassVar[tuple[str, ...]] = ("reload",)

    folder: Path
    format: str
    how_to_load: str
    reload: Callable[[], nn.Module]
    errors: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    suggested_rank: int | None = None
    notes: tuple[str, ...] = ()
    largest_difference: float | None = None

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer of an adapter: its rank and its error; no rows for a merged model."""
        return [{"layer": name, "rank": self.ranks.get(name), "error": error} for name, error in self.errors.items()]

    @property
    def summary(self) -> str:
        """One line."""
        lost = f"largest relative error {max(self.errors.values()):.3g}" if any(self.errors.values()) else "exact"
        return f"{self.format} in {self.folder}: {lost}"


def export(
    model: Adapted | nn.Module,
    folder: str | Path,
    format: str = "peft",
    *,
    tokenizer: Any = None,
    source: Source | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    target: str | None = None,
    joint: str | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> ExportResult:
    """Write a trained model for other tools. If it fails, nothing is left in `folder`.

    What was written is loaded again and compared with the trained model on two short inputs, where memory for a second model is
    free; that costs the time of loading it, and two passes of 16 tokens through each.

    Args:
        model: an `Adapted`, or a transformers model (which can only be written merged). Writing it merged merges it, in place;
            structured layers become dense ones.
        format: `"peft"`: `adapter_config.json` and `adapter_model.safetensors`; `"merged"`: a checkpoint that
            `from_pretrained` loads. A mean-pooled classifier is written as its encoder (a sentence-transformers folder stays
            one) with `head.safetensors` next to it.
        tokenizer: saved along with a merged model.
        source: where the base model came from, for the loading instructions and for files to copy along.
        rank: write PEFT's LoRA, and truncate updates of full rank to this; None writes PEFT's own method where it has it
            (RandLoRA), exactly.
        max_error: instead of `rank`, the smallest rank of each layer with at most this relative error, e.g. 0.01.
        target: `"vllm"` or `"llamacpp"`, for format `"peft"`: LoRA that this program loads, with one rank for all layers; an
            error lists the obstacles before anything is written.
        joint: for a classifier of pairs of texts, what stands between them (`""`: what the tokenizer puts there); the loading
            instructions then show how a pair is read.
        inputs: keywords of the model for that comparison; None makes two short rows.

    Returns:
        An `ExportResult` that states the errors.

    Raises:
        UnknownNameError: unknown format or target.
        ValueError: PEFT export of a model without an adapter, or of one that `target` cannot load; a model that transformers
            cannot write; `rank`, `max_error` or `target` for another format than `"peft"`.
        WrittenModelError: the folder does not give the outputs of the trained model; nothing is left in it.
        OSError: no space or no permission.
    """
    check_choice("--format", format, FORMATS)
    folder = Path(folder)
    if format == "peft":
        if not isinstance(model, Adapted):
            raise ValueError("only an adapted model can be written as a PEFT adapter; export it as 'merged'")
        return _peft(model, folder, source, {"rank": rank, "max_error": max_error, "target": target}, joint, inputs)
    if (rank, max_error, target) != (None, None, None):
        raise ValueError(
            "a rank, an error or a target is for --format peft; a merged model is written whole and loads anywhere"
        )
    trained = model.model if isinstance(model, Adapted) else model  # many models have a part of that name
    probe = Probe.of(trained, inputs=inputs)
    plain = densify(model.merge() if isinstance(model, Adapted) else model)
    if probe is not None:
        probe.check(plain, "the merged model")
    return _merged(plain, folder, tokenizer, source, joint, inputs)


def _peft(
    adapted: Adapted,
    folder: Path,
    source: Source | None,
    how: dict[str, Any],
    joint: str | None,
    inputs: Mapping[str, Tensor] | None,
) -> ExportResult:
    model: Any = adapted.model
    root = getattr(model, "export_root", "") or encoder_of(model)
    config: Any = getattr(model.get_submodule(root), "config", None)
    base = source.path if source else getattr(config, "_name_or_path", None) or "BASE_MODEL"
    options = _options(model)
    if source and source.gguf:
        options["gguf_file"] = source.gguf
    probe = Probe.of(model, inputs=inputs) if source is not None and room_for(model) else None

    def load(place: Path) -> nn.Module:
        from peft import PeftModel

        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT misses shared bases that it finds in another layer
            bare = _load(model, base, options)
            if is_sentence_transformer(model):
                parent, child = parent_and_child(bare, root)
                setattr(parent, child, PeftModel.from_pretrained(bare.get_submodule(root), str(place)))
                return bare
            return _with_head(PeftModel.from_pretrained(bare, str(place)), place, model)

    with whole_folder(folder) as draft:
        written = to_peft(adapted, draft, **how, native=how["rank"] is None, root=root, name=folder.name)
        if isinstance(model, SentenceClassifier):
            write_tensors(draft / "head.safetensors", model.classifier.state_dict())
            snippet = (
                "from peft import PeftModel\nfrom safetensors.torch import load_file\n"
                "from transformers import AutoModel, AutoTokenizer\n\n"
                f"base = {base!r}\n"
                f'encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(base, {_typed(options)}), "{folder.name}")\n'
                f"{_head_lines(folder, 'base', joint)}"
            )
        else:
            snippet = (
                f"from peft import PeftModel\n{_imports(model, joint)}\n"
                f"{_peft_lines(model, root, base, options, folder)}{_pair_lines(repr(base), joint)}"
            )
        page = _readme("A PEFT adapter written by lowdim", snippet)
        if written.notes:
            page += f"\n## For {TARGETS[how['target']]}\n\n" + "".join(f"- {_code(note)}\n" for note in written.notes)
        write_text(draft / "README.md", page)
        errors = {name: error for name, error in written.errors.items() if error}
        difference = None if errors or probe is None or not _has_peft() else probe.check(load(draft), "the PEFT adapter")
    how_ranked = (errors, written.ranks, written.suggested_rank, written.notes)
    return ExportResult(folder, "peft", snippet, lambda: load(folder), *how_ranked, difference)


def _has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def _merged(
    model: nn.Module,
    folder: Path,
    tokenizer: Any,
    source: Source | None,
    joint: str | None,
    inputs: Mapping[str, Tensor] | None,
) -> ExportResult:
    inner: Any = model.encoder if isinstance(model, SentenceClassifier) else model
    if not hasattr(inner, "save_pretrained"):
        raise ValueError(f"only transformers models can be written merged; got {type(model).__name__}")
    options = _options(model, for_merged=True)
    probe = Probe.of(model, inputs=inputs) if room_for(model) else None

    def load(place: Path) -> nn.Module:
        with quiet():
            return _with_head(_load(model, place, options), place, model)

    with whole_folder(folder) as draft, quiet():
        inner.save_pretrained(str(draft))
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        if isinstance(model, SentenceClassifier):
            write_tensors(draft / "head.safetensors", model.classifier.state_dict())
            if source is not None:
                _copy_pooling(Path(source.path), draft)
            snippet = (
                "from safetensors.torch import load_file\nfrom transformers import AutoModel, AutoTokenizer\n\n"
                f'encoder = AutoModel.from_pretrained("{folder.name}", {_typed(options)})\n'
                f"{_head_lines(folder, repr(folder.name), joint)}"
            )
        else:
            snippet = (
                f"{_imports(model, joint)}\n"
                f"model = {_call(model, repr(folder.name), options)}\n"
                f"{_pair_lines(repr(folder.name), joint)}"
            )
        write_text(draft / "README.md", _readme("A merged model written by lowdim", snippet))
        difference = None if probe is None else probe.check(load(draft), "the merged model in the folder", same=True)
    return ExportResult(folder, "merged", snippet, lambda: load(folder), largest_difference=difference)


def _load(model: nn.Module, place: str | Path, options: dict[str, Any]) -> Any:
    """The model in a folder, as the loading instructions load it."""
    module, name = loading_class(model)
    if is_sentence_transformer(model):
        return imported(module, name)(str(place), trust_remote_code=False)
    return imported(module, name).from_pretrained(place, trust_remote_code=False, **options)


def _call(model: nn.Module, place: str, options: dict[str, Any]) -> str:
    """The call of `_load`, as text."""
    name = loading_class(model)[1]
    return f"{name}({place})" if is_sentence_transformer(model) else f"{name}.from_pretrained({place}, {_typed(options)})"


def _options(model: Any, *, for_merged: bool = False) -> dict[str, Any]:
    """Keywords with which `from_pretrained` gives this very model."""
    options: dict[str, Any] = {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    if isinstance(model, SentenceClassifier) or getattr(model, "pooler", True) is None:
        return {**options, **encoder_options(model.config)}
    name = type(model).__name__
    if for_merged or "Classification" not in name:
        return options
    options["num_labels"] = model.config.num_labels
    return {**options, "pad_token_id": model.config.pad_token_id} if "SequenceClassification" in name else options


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


def _batch_line(joint: str | None) -> str:
    """A batch of one text, or of one pair."""
    texts = (
        '["a text"]' if joint is None else '["a text"], ["its partner"]' if not joint else f"[{f'a text{joint}its partner'!r}]"
    )
    return f'batch = tokenizer({texts}, padding=True, truncation=True, return_tensors="pt")\n'


def _imports(model: nn.Module, joint: str | None) -> str:
    module, name = loading_class(model)
    names = [name] if joint is None else [name, "AutoTokenizer"]
    return f"from {module} import {', '.join(names)}\n"


def _peft_lines(model: nn.Module, root: str, base: str, options: dict[str, Any], folder: Path) -> str:
    """How the base model is loaded, and the adapter over it, or over the part of it that the adapter is for."""
    call = _call(model, repr(base), options)
    if not root:
        return f'base = {call}\nmodel = PeftModel.from_pretrained(base, "{folder.name}")\n'
    first, _, rest = root.partition(".")
    part = f"model[{first}].{rest}" if first.isdigit() else f"model.{root}"
    return f'model = {call}\n{part} = PeftModel.from_pretrained({part}, "{folder.name}")\n'


def _pair_lines(base: str, joint: str | None) -> str:
    """How a classifier reads a pair of texts; nothing for single texts."""
    if joint is None:
        return ""
    return f"tokenizer = AutoTokenizer.from_pretrained({base})\n\n{_batch_line(joint)}logits = model(**batch).logits\n"


def _head_lines(folder: Path, base: str, joint: str | None) -> str:
    return (
        f'head = load_file("{folder.name}/head.safetensors")\ntokenizer = AutoTokenizer.from_pretrained({base})\n\n'
        f"{_batch_line(joint)}"
        "states, mask = encoder(**batch).last_hidden_state, batch['attention_mask'].unsqueeze(-1)\n"
        'logits = ((states * mask).sum(1) / mask.sum(1)) @ head["weight"].T + head["bias"]\n'
    )


def _code(note: str) -> str:
    """A note unchanged, a command in backticks."""
    return f"`{note}`" if note.startswith(("vllm ", "python ")) else note


def _readme(title: str, snippet: str) -> str:
    return f"# {title}\n\n```python\n{snippet}```\n"
