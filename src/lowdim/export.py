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
from lowdim.loading_code import (
    answer_lines,
    as_keywords,
    class_line,
    generation_lines,
    head_lines,
    imports,
    loading_call,
    pair_lines,
    peft_lines,
)
from lowdim.models import Probe, Source, encoder_options, quiet, room_for
from lowdim.models.classes import encoder_of, imported, is_sentence_transformer, loading_class
from lowdim.models.sentence_classifier import SentenceClassifier
from lowdim.models.sentence_encoders import without_pooler
from lowdim.modules import quantize_like, quantized_scheme
from lowdim.results import Result
from lowdim.surgery import parent_and_child

__all__ = ["FORMATS", "ExportResult", "export", "merged_files"]

FORMATS = ("peft", "merged")
#: A base with fewer exact zeros in every adapted layer has them by chance.
_SPARSE = 0.01
#: The same for weights in few bits, of which up to 16 % are rounded to 0.
_ROUNDED = 0.2
_POOLING_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json")


@dataclass(frozen=True)
class ExportResult(Result):
    """The result of an export: the files, their errors, and how to load them.

    Attributes:
        how_to_load: Python that loads the folder without lowdim.
        reload: loads the folder the same way, to check it.
        errors: layer -> relative error of a truncated update; empty or zeros where exact.
        ranks: layer -> rank that was written, for a PEFT adapter.
        whole_ranks: layer -> rank without a cut, for a PEFT adapter; empty where PEFT has the method itself.
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
    whole_ranks: dict[str, int] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer of an adapter: its rank, the rank without a cut, its error; no rows for a merged model."""
        return [
            {"layer": name, "rank": rank, "whole_rank": self.whole_ranks.get(name), "error": self.errors.get(name, 0.0)}
            for name, rank in self.ranks.items()
        ]

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
    keep_mask: bool = False,
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
        rank: write PEFT's LoRA with at most this rank in each layer, listed with its error in `ranks.json`; None writes updates
            that are low-rank, and PEFT's own method where it has it (RandLoRA), exactly.
        max_error: instead of `rank`, the smallest rank of each layer with at most this relative error, e.g. 0.01.
        target: `"vllm"` or `"llamacpp"`, for format `"peft"`: LoRA that this program loads, with one rank for all layers; an
            error lists the obstacles before anything is written. For llama.cpp there is an `adapter.gguf` next to PEFT's files.
        joint: for a classifier of pairs of texts, what stands between them (`""`: what the tokenizer puts there); the loading
            instructions then show how a pair is read.
        inputs: keywords of the model for that comparison; None makes two short rows.
        keep_mask: for an adapter written merged: weights that were exactly 0 before it stay 0, so its outputs differ; an error
            for a base without zeros.

    Returns:
        An `ExportResult` that states the errors.

    Raises:
        UnknownNameError: unknown format or target.
        ValueError: PEFT export of a model without an adapter, or of one that `target` cannot load; a model that transformers
            cannot write; a rank above what every layer has; `rank`, `max_error` or `target` for another format than `"peft"`.
        WrittenModelError: the folder does not give the outputs of the trained model; nothing is left in it.
        OSError: no space or no permission.
    """
    check_choice("--format", format, FORMATS)
    folder = Path(folder)
    if keep_mask and (format == "peft" or not isinstance(model, Adapted)):
        raise ValueError("keep_mask is for merging an adapter into a sparse model: --format merged, of an adapter")
    if format == "peft":
        if not isinstance(model, Adapted):
            raise ValueError("only an adapted model can be written as a PEFT adapter; export it as 'merged'")
        return _peft(model, folder, source, {"rank": rank, "max_error": max_error, "target": target}, joint, inputs)
    if (rank, max_error, target) != (None, None, None):
        raise ValueError(
            "a rank, an error or a target is for --format peft; a merged model is written whole and loads anywhere"
        )
    if keep_mask and isinstance(model, Adapted):
        model = _merged_sparse(model)  # what is compared is the sparse model: its outputs are not the adapter's
    trained = model.model if isinstance(model, Adapted) else model  # many models have a part of that name
    probe = Probe.of(trained, inputs=inputs)
    plain = densify(model.merge() if isinstance(model, Adapted) else model)
    if probe is not None:
        probe.check(plain, "the merged model")
    return _merged(plain, folder, tokenizer, source, joint, inputs)


def _merged_sparse(adapted: Adapted) -> nn.Module:
    """The model, merged with its zeros kept; as it was, with an error, if it has none to speak of."""
    merged = adapted.merge(keep_mask=True)
    report = adapted.merge_report
    assert report is not None
    if all(change.sparsity_before < (_ROUNDED if change.layer in report.dequantized else _SPARSE) for change in report.layers):
        adapted.unmerge()
        raise ValueError(
            f"keep_mask (--keep-mask) is for a sparse base model: no adapted layer here has {_SPARSE:.0%} exact zeros "
            "(besides those of rounding to few bits); leave it out, or name the sparse model (--model)"
        )
    return merged


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
    inner = model.get_submodule(root)
    config: Any = getattr(inner, "config", None)
    base = source.path if source else getattr(config, "_name_or_path", None) or "BASE_MODEL"
    options = _options(model)
    if source and source.gguf:
        options["gguf_file"] = source.gguf
    probe = Probe.of(model, inputs=inputs) if source is not None and room_for(model) else None

    def load(place: Path) -> nn.Module:
        from peft import PeftModel

        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT misses shared bases that it finds in another layer
            bare = quantize_like(_load(model, base, options), model if is_sentence_transformer(model) else inner)
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
                f"base = {base!r}\nencoder = AutoModel.from_pretrained(base, {as_keywords(options)})\n"
                f'encoder = PeftModel.from_pretrained(encoder, "{folder.name}")\n'
                f"{head_lines(folder, 'base', joint)}{answer_lines(model)}"
            )
        else:
            snippet = (
                f"from peft import PeftModel\n{imports(model, joint)}\n"
                f"{peft_lines(model, root, base, options, folder)}{pair_lines(repr(base), joint)}{class_line(model)}"
            )
        page = _readme("A PEFT adapter written by lowdim", snippet)
        if (scheme := quantized_scheme(model)) is not None:
            page += f"\nTrained over quantized weights ({scheme}): over dense ones the outputs differ a little.\n"
        if written.notes:
            page += f"\n## For {TARGETS[how['target']]}\n\n" + "".join(f"- {_code(note)}\n" for note in written.notes)
        write_text(draft / "README.md", page)
        errors = {name: error for name, error in written.errors.items() if error}
        difference = None if errors or probe is None or not _has_peft() else probe.check(load(draft), "the PEFT adapter")
    how_ranked = (errors, written.ranks, written.suggested_rank, written.notes)
    return ExportResult(folder, "peft", snippet, lambda: load(folder), *how_ranked, difference, written.whole_ranks)


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
        if is_sentence_transformer(model):
            without_pooler(model, draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        if isinstance(model, SentenceClassifier):
            write_tensors(draft / "head.safetensors", model.classifier.state_dict())
            if source is not None:
                _copy_pooling(Path(source.path), draft)
            snippet = (
                "from safetensors.torch import load_file\nfrom transformers import AutoModel, AutoTokenizer\n\n"
                f'encoder = AutoModel.from_pretrained("{folder.name}", {as_keywords(options)})\n'
                f"{head_lines(folder, repr(folder.name), joint)}{answer_lines(model)}"
            )
        else:
            snippet = (
                f"{imports(model, joint)}\n"
                f"model = {loading_call(model, repr(folder.name), options)}\n"
                f"{pair_lines(repr(folder.name), joint)}{generation_lines(model, tokenizer, repr(folder.name))}"
            )
        write_text(draft / "README.md", _readme("A merged model written by lowdim", snippet))
        difference = None if probe is None else probe.check(load(draft), "the merged model in the folder", same=True)
    return ExportResult(folder, "merged", snippet, lambda: load(folder), largest_difference=difference)


def merged_files(model: nn.Module, folder: Path, draft: Path) -> ExportResult:
    """The result of a merged checkpoint whose weights are in `draft` already, and will be in `folder`; adds its README.

    Args:
        model: of the class and dtype of the checkpoint; its numbers are not read.
    """
    options = _options(model, for_merged=True)
    snippet = f"{imports(model, None)}\nmodel = {loading_call(model, repr(folder.name), options)}\n"
    write_text(draft / "README.md", _readme("A merged model written by lowdim", snippet))

    def load() -> nn.Module:
        with quiet():
            return _load(model, folder, options)

    return ExportResult(folder, "merged", snippet, load)


def _load(model: nn.Module, place: str | Path, options: dict[str, Any]) -> Any:
    """The model in a folder, as the loading instructions load it."""
    module, name = loading_class(model)
    if is_sentence_transformer(model):
        return imported(module, name)(str(place), trust_remote_code=False)
    return imported(module, name).from_pretrained(place, trust_remote_code=False, **options)


def _options(model: Any, *, for_merged: bool = False) -> dict[str, Any]:
    """Keywords with which `from_pretrained` gives this very model."""
    options: dict[str, Any] = {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    if isinstance(model, SentenceClassifier) or getattr(model, "pooler", True) is None:
        return {**options, **encoder_options(model.config)}
    name = type(model).__name__
    if for_merged or "Classification" not in name:
        return options
    options["num_labels"] = model.config.num_labels
    if getattr(model, "replaced_head", False):
        options["ignore_mismatched_sizes"] = True
    return {**options, "pad_token_id": model.config.pad_token_id} if "SequenceClassification" in name else options


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


def _code(note: str) -> str:
    """A note unchanged, a command in backticks."""
    return f"`{note}`" if note.startswith(("vllm ", "llama-")) else note


def _readme(title: str, snippet: str) -> str:
    return f"# {title}\n\n```python\n{snippet}```\n"
