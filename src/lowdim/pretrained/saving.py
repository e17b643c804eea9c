"""Writing a compressed model, and reading it back as a check."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import LowdimError
from lowdim.files import whole_folder, write_json, write_tensors
from lowdim.layers.core.swap import structured_layers
from lowdim.models import Probe, quiet
from lowdim.modules import Rebuildable, describe_layers

__all__ = ["prepare_compressed", "save_compressed", "stored_bytes"]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that a checkpoint of this model holds, from shapes alone; tied ones count once.

    Example:
        >>> from torch import nn
        >>> from lowdim.modules import LowRankLinear
        >>> from lowdim.pretrained import stored_bytes
        >>> stored_bytes(nn.Linear(100, 100)), stored_bytes(LowRankLinear(100, 100, rank=10))
        (40400, 8400)
    """
    named = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    # What a layer packs for files is not the tensor that it holds.
    tensors = {id(named.get(name, tensor)): tensor for name, tensor in model.state_dict().items()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def save_compressed(
    model: Any,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    record: Mapping[str, Any] | None = None,
    dense: bool = False,
    max_shard_size: str | int = "50GB",
) -> int:
    """Write a compressed transformers model as a checkpoint, and read it back before it replaces the old one.

    What was read back is also asked for its outputs on two short inputs, which must be those of `model` (up to rounding with
    `dense`). It costs memory for a second copy of the model and the time of loading it.

    With lowdim imported, `from_pretrained(folder)` of the model's own class or of `AutoModel...` gives the same tensors, and
    so bit-identical outputs; otherwise nothing is written. The model can be saved again afterwards, as a checkpoint of
    `Trainer` or by its own `save_pretrained`. A model without compressed layers is saved as usual.

    Args:
        model: a transformers model whose layers a system of `lowdim.compress` has replaced.
        folder: other files in it are kept.
        tokenizer: saved in the same folder.
        record: more information on the model (method, options, scores); written as `compression.json`.
        dense: write the dense equivalent, which loads without lowdim and has the size of the dense model; the thin factors are
            written to `factors.safetensors`.
        max_shard_size: larger checkpoints are split, as in `save_pretrained`.

    Returns:
        Bytes of all tensors in the checkpoint.

    Raises:
        TypeError: not a transformers model.
        LowdimError: a layer that cannot be described in a file, a bias that a dense checkpoint of this class cannot hold,
            `dense` of a model whose weights are unchanged, or a checkpoint that does not read back as written. Nothing is then
            left in the folder.
        OSError: no space or no permission.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        >>> from lowdim.compress import WeLoreConfig, welore
        >>> from lowdim.pretrained import save_compressed, stored_bytes
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=32)
        >>> model = welore(LlamaForCausalLM(LlamaConfig(**sizes)), WeLoreConfig(threshold=0.6))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = save_compressed(model, folder)
        ...     again = AutoModelForCausalLM.from_pretrained(folder)
        >>> size == stored_bytes(again)
        True
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers model; got {type(model).__name__}. Save the state dict of others with "
            "lowdim.files.write_tensors and load it with lowdim.compress.load_compressed"
        )
    if dense:
        _refuse_added(model)
    written = _dense(model) if dense else prepare_compressed(model)
    same = all(module.same_when_dense for module in model.modules() if isinstance(module, Rebuildable))
    probe = Probe.of(model if same or not dense else written)
    with quiet(), whole_folder(folder) as draft:
        written.save_pretrained(draft, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        if dense:
            write_tensors(draft / "factors.safetensors", _factors(model))
        if record is not None:
            write_json(draft / "compression.json", record)
        again = _read_back(written, draft)
        if probe is not None:
            probe.check(again, "the checkpoint", same=not dense)
    return stored_bytes(written)


def prepare_compressed(model: Any) -> Any:
    """Give the model the description by which transformers saves it, and reads it again, as a compressed one; returns it.

    Raises:
        LowdimError: another library has quantized it, or a layer cannot be described in a file.
    """
    from lowdim.pretrained.quantizer import LowdimConfig, LowdimQuantizer

    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, LowdimQuantizer):
        method = quantizer.quantization_config.quant_method
        raise LowdimError(
            f"{type(model).__name__} is quantized by {method}, and a checkpoint can hold only one description; compress "
            "the model that was not quantized"
        )
    layers = describe_layers(model)
    for name, module in structured_layers(model).items():
        if name not in layers:
            raise LowdimError(
                f"layer {name} is a {type(module).__name__}, which a file cannot describe yet; save_compressed(model, folder, "
                "dense=True) writes the dense model"
            )
    if not layers and quantizer is not None:
        quantizer.remove_quantization_config(model)
    if layers:
        report = getattr(model, "lowdim_report", None)
        config = LowdimConfig(layers, system=getattr(report, "system", None))
        model.config.quantization_config = config
        model.hf_quantizer = LowdimQuantizer(config, pre_quantized=True)
    return model


def _refuse_added(model: nn.Module) -> None:
    """A module that changes no weight has no dense equivalent but the model that was compressed."""
    for name, module in model.named_modules():
        if isinstance(module, Rebuildable) and module.added:
            raise LowdimError(
                f"{name} is a {type(module).__name__}, which leaves every weight as it is: there is no dense checkpoint but "
                "the model that was compressed; leave out dense=True (--dense), and the folder also loads without lowdim, "
                "uncompressed"
            )


def _dense(model: Any) -> Any:
    from lowdim.pretrained.dense import dense_model

    return dense_model(model)


def _factors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of compressed layers that a dense checkpoint lacks."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Rebuildable):
            own = {key: value for key, value in module.state_dict().items() if key not in ("weight", "bias")}  # type: ignore[attr-defined]
            found |= {f"{name}.{key}": value for key, value in own.items()}
    return found


def _read_back(model: Any, draft: Path) -> Any:
    """The model that the written checkpoint gives, compared with `model` tensor by tensor."""
    again, info = type(model).from_pretrained(draft, dtype="auto", output_loading_info=True)
    odd = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in sorted(map(str, info[kind]))]
    here, there = model.state_dict(), again.state_dict()
    odd += [key for key in here if key not in there or not _equal(here[key], there[key])]
    odd += [key for key in there if key not in here]
    if odd:
        names = ", ".join(dict.fromkeys(odd[:5]))
        raise LowdimError(
            f"the checkpoint of {type(model).__name__} does not read back as it was written: {names}"
            f"{' ...' if len(odd) > 5 else ''}; nothing was left in the folder"
        )
    return again


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.detach().cpu(), two.detach().cpu())
