"""What of a trained model is handed over: a PEFT adapter, a merged model, or the tensors of a module of one's own."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowdim.adapters import Adapted, to_peft
from lowdim.export import ExportResult, export
from lowdim.files import read_tensors, whole_folder, write_tensors, write_text
from lowdim.layers import densify
from lowdim.loading_code import generation_lines
from lowdim.models import Source
from lowdim.models.classes import encoder_of
from lowdim.models.sentence_classifier import SentenceClassifier
from lowdim.modules import more_when_plain

__all__ = ["FORMS", "form_of_winner", "handed_over_bytes", "plain_module", "state_of", "weights_in", "write_winner"]

#: The forms, and what they are called.
FORMS = {"peft": "PEFT adapter", "merged": "merged model", "state": "state dict"}
_STATE = "model.safetensors"


def plain_module(model: Adapted | nn.Module) -> nn.Module:
    """The module that computes; many models have a part named `model`."""
    return model.model if isinstance(model, Adapted) else model


def form_of_winner(model: Adapted | nn.Module, source: Source | None) -> str:
    """The form in which a trained model is handed over.

    An adapter that PEFT loads exactly stays one, over a base that others have; other transformers models are merged; of a
    module of one's own, the tensors are written.
    """
    plain: Any = plain_module(model)
    inner = plain.encoder if isinstance(plain, SentenceClassifier) else plain
    if not hasattr(inner, "save_pretrained"):
        return "state"
    return "peft" if source is not None and isinstance(model, Adapted) and _exact_in_peft(model) else "merged"


def handed_over_bytes(model: Adapted | nn.Module, base: nn.Module, source: Source | None) -> int:
    """The size of the weights that would be handed over, without the header of a merged model's file.

    A PEFT adapter is written to measure it: what PEFT keeps of a method is not what lowdim keeps.

    Args:
        base: the model before training; merged, a trained one has tensors of the same sizes.
    """
    form = form_of_winner(model, source)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        if form == "peft":
            assert isinstance(model, Adapted)
            to_peft(model, folder, root=_root(model.model))
            head = model.model.classifier.state_dict() if isinstance(model.model, SentenceClassifier) else {}
            return weights_in(folder) + _bytes(head)
        if form == "state" and isinstance(model, Adapted):
            model.save(folder)
        return _bytes(state_of(base)) + more_when_plain(base) + weights_in(folder)


def weights_in(folder: Path) -> int:
    """The size of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """All of a model's state, tied tensors once: structured layers keep some of it in buffers."""
    found, seen = {}, set()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and (value.numel() == 0 or value.data_ptr() not in seen):
            seen.add(value.data_ptr())
            found[name] = value
    return found


def write_winner(
    model: Adapted | nn.Module,
    folder: Path,
    base: nn.Module,
    *,
    source: Source | None,
    processor: Any = None,
    joint: str | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> ExportResult:
    """Write a trained model in the form for it; it is merged on the way, unless it stays an adapter.

    Args:
        base: the model before training.
        source: where it came from.
        processor: a tokenizer (with the chat template of the training) or an image processor, saved along.
        joint, inputs: as for `lowdim.export.export`.

    Raises:
        WrittenModelError: the folder does not give the outputs of the trained model; nothing is left in it.
    """
    form = form_of_winner(model, source)
    if form == "state":
        return _write_state(model, folder, base)
    written = export(model, folder, form, tokenizer=processor, source=source, joint=joint, inputs=inputs)
    if form == "peft" and processor is not None:
        processor.save_pretrained(folder)
        more = generation_lines(plain_module(model), processor, repr(folder.name))
        page = folder / "README.md"
        write_text(page, page.read_text(encoding="utf-8").replace(written.how_to_load, written.how_to_load + more))
        return dataclasses.replace(written, how_to_load=written.how_to_load + more)
    return written


def _write_state(model: Adapted | nn.Module, folder: Path, base: nn.Module) -> ExportResult:
    """The tensors of a module that only its owner can build; of an adapted one, the adapter besides."""
    with whole_folder(folder) as draft:
        if isinstance(model, Adapted):
            model.save(draft / "adapter")
            plain = densify(model.merge())
        else:
            plain = densify(model)
        tensors = state_of(plain)
        write_tensors(draft / _STATE, tensors)
        tied = ", strict=False" if len(tensors) < len(plain.state_dict()) else ""
        snippet = (
            "from safetensors.torch import load_file\n\n"
            "model = ...  # your module, as it was given to the comparison\n"
            f'model.load_state_dict(load_file("{folder.name}/{_STATE}"){tied})\n'
        )
        if isinstance(model, Adapted):
            snippet += (
                "\n# or the adapter alone, on the module with the weights that it had before training:\n"
                f'# adapted = lowdim.load_adapter(model, "{folder.name}/adapter")\n'
            )
        write_text(draft / "README.md", f"# The weights of a module, written by lowdim\n\n```python\n{snippet}```\n")

    def load() -> nn.Module:
        again = densify(copy.deepcopy(base))
        again.load_state_dict(read_tensors(folder / _STATE)[0], strict=not tied)
        return again

    return ExportResult(folder, "state", snippet, load)


def _root(model: nn.Module) -> str:
    return getattr(model, "export_root", "") or encoder_of(model)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _exact_in_peft(model: Adapted) -> bool:
    layers = model.layers
    thin = bool(layers) and all(layer.update.low_rank_delta() is not None for layer in layers.values())
    return thin or model.method.peft(model) is not None
