"""Linear layers that keep their weight in few bits, and the values of that weight.

A layer is quantized by what it stores: integers, 8-bit floats, or a tensor class with a `dequantize` of its own (torchao,
quanto). Its values come from that method, from its scales where the class is known, or from its own forward pass.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowdim.surgery.kinds import describe, is_linear_class

__all__ = ["dequantized", "is_quantized", "known_dtype", "layer_dtype", "stores_codes", "unreadable"]

#: Names under which transformers' and compressed-tensors' layers keep what their codes are multiplied by.
_SCALES = ("weight_scale_inv", "weight_scale")


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer keeps its weight in few bits: torchao's and quanto's tensors, bitsandbytes' and float8 layers."""
    if not is_linear_class(layer):
        return False
    weight = layer.__dict__["_parameters"].get("weight")
    if type(weight) is nn.Parameter and weight.dtype.itemsize > 1 and weight.is_floating_point():
        return False
    if type(layer).__module__.startswith("bitsandbytes."):
        return True
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        return _has_own_values(weight) or stores_codes(weight)
    return any(stores_codes(t) for t in _own_tensors(layer).values())


def unreadable(module: nn.Module) -> bool:
    """Whether it is a quantized linear layer of a class that is not nn.Linear (GPTQ, AWQ, HQQ, torch.ao): it is not adapted."""
    if isinstance(module, nn.Linear) or callable(getattr(module, "to_linear", None)):
        return False
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features", "infeatures", "outfeatures")]
    if sum(isinstance(size, int) for size in sizes) < 2:
        return False
    if type(module).__module__.startswith("torch.ao.nn.quantized"):
        return True
    own = _own_tensors(module)
    dense = own.get("weight")
    if dense is not None and not stores_codes(dense) and not _has_own_values(dense):
        return False
    return any(stores_codes(t) and t.ndim >= 2 for t in own.values()) or hasattr(module, "W_q")


def stores_codes(tensor: Tensor) -> bool:
    """Whether the entries are integers or 8-bit floats, which mean a weight only with their scales."""
    return tensor.dtype.itemsize == 1 or not (tensor.is_floating_point() or tensor.is_complex())


def _has_own_values(weight: Tensor) -> bool:
    kind = type(weight)
    return kind is not nn.Parameter and (
        kind.__module__.startswith("torchao.") or getattr(kind, "dequantize", None) is not Tensor.dequantize
    )


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}


@torch.no_grad()
def dequantized(layer: nn.Module) -> Tensor:
    """The values of a quantized layer's weight, `(out_features, in_features)` in float32.

    Raises:
        TypeError: no way to read them is known, and the layer cannot be run here.
    """
    own: Any = getattr(layer, "dense_weight", None)
    if callable(own):  # lowdim's QuantizedLinear
        return cast(Tensor, own(torch.float32))
    weight: Any = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and _has_own_values(weight):
        return weight.dequantize().to(torch.float32)
    known = type(layer).__module__.startswith(("transformers.", "compressed_tensors."))
    scaled = _scaled(layer)
    if known and scaled is not None:
        return scaled
    try:
        return _from_outputs(layer)
    except Exception as error:
        if scaled is not None:
            return scaled
        text = " ".join(str(error).split())[:200]
        raise TypeError(
            f"the weight is not floating point but {_stored(layer)}: its scales are unknown to lowdim, and the layer does not "
            f"run here to read its values ({type(error).__name__}: {text}); load the model without quantization. "
            f"Got {describe(layer)}"
        ) from error


def _stored(layer: nn.Module) -> str:
    dtypes = {str(t.dtype).removeprefix("torch.") for t in _own_tensors(layer).values() if stores_codes(t)}
    return ", ".join(sorted(dtypes)) or "packed"


def _from_outputs(layer: nn.Module) -> Tensor:
    """The layer's own kernel knows its format: its output for unit vectors is the weight. Checked on one more input."""
    run: Any = layer.forward  # not the call: hooks act on the layer's whole output
    inputs = int(layer.in_features)  # type: ignore[arg-type]
    device = next(iter(_own_tensors(layer).values())).device
    dtype = layer_dtype(layer)
    eye = torch.eye(inputs, dtype=dtype, device=device)
    zero = run(torch.zeros(1, inputs, dtype=dtype, device=device)).to(torch.float32)
    matrix = (run(eye).to(torch.float32) - zero).mT.contiguous()
    trial = torch.linspace(-1, 1, inputs, dtype=dtype, device=device)[None]
    got, want = run(trial).to(torch.float32) - zero, trial.to(torch.float32) @ matrix.mT
    error = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want).clamp_min(1e-30)
    if not torch.isfinite(matrix).all() or float(error) > 0.2:
        raise ValueError("its output is not a product of one matrix with its input")
    return matrix


def _scaled(layer: nn.Module) -> Tensor | None:
    """`codes · scale`, the scale expanded over its blocks; None where the layer holds no such pair."""
    own = _own_tensors(layer)
    codes = own.get("weight")
    scale = next((own[name] for name in _SCALES if name in own), None)
    if codes is None or scale is None or codes.ndim != 2 or any("zero" in name for name in own):
        return None
    spread = _spread(scale.to(torch.float32), codes.shape, getattr(layer, "block_size", None))
    return None if spread is None else codes.to(torch.float32) * spread


def _spread(scale: Tensor, shape: torch.Size, block: Any) -> Tensor | None:
    """The scale of each entry, broadcastable to `shape`: one for all, one a row, one a column, or one a block."""
    rows, columns = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim < 2 or 1 in scale.shape:
        if scale.numel() == rows:
            return scale.reshape(rows, 1)
        return scale.reshape(1, columns) if scale.numel() == columns else None
    if scale.ndim != 2:
        return None
    sides = tuple(block) if block is not None else tuple(math.ceil(n / m) for n, m in zip(shape, scale.shape))
    if any(math.ceil(n / side) != m for n, side, m in zip(shape, sides, scale.shape)):
        return None
    return scale.repeat_interleave(sides[0], 0)[:rows].repeat_interleave(sides[1], 1)[:, :columns]


def layer_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of a layer's output: its weight's, or the one that a quantized layer computes in; else torch's default."""
    return known_dtype(layer) or torch.get_default_dtype()


def known_dtype(layer: nn.Module) -> torch.dtype | None:
    """The dtype of a layer's output, if the layer alone tells it: one that stores codes computes in that of its input."""
    for tensor in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            return tensor.dtype
    return getattr(layer, "compute_dtype", None)
