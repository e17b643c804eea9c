"""What a layer does beyond the plain product or lookup, found by trying it.

A class that extends nn.Linear may scale, mask or renormalise its weight, return several tensors, or ask for more than its
input. Whether an update of the weight means there what it means in nn.Linear is seen from the output for known weights and
inputs, not from a name.
"""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from lowdim.surgery.kinds import CONVOLUTIONS, is_conv1d, is_matrix_class
from lowdim.surgery.placement import OFFLOADED, is_offloaded, rebind_methods
from lowdim.surgery.quantized import is_quantized, stores_codes, unreadable

__all__ = ["Behaviour", "behaviour", "has_stored_weight", "left_out_reason", "shallow_copy"]

COMPUTED = (
    "weight_norm, spectral_norm, pruning or another parametrization: remove it first, as with "
    "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
)
#: Weights up to this many numbers are replaced by known ones for the trial; larger ones are tried as they are.
_SMALL = 2**24


#: Inputs of a trial: enough that the rounding of 16-bit outputs averages out.
_ROWS = 64


@dataclass(frozen=True)
class Behaviour:
    """How a layer's output depends on its weight.

    Attributes:
        gain: the output is `gain` times the plain product (or lookup), plus the bias.
        reason: why an update of the weight would not mean the same there; empty if it does.
    """

    gain: float = 1.0
    reason: str = ""


def behaviour(layer: nn.Module) -> Behaviour:
    """What a linear layer, convolution or embedding computes, compared with the plain layer of its kind.

    Layers with torch's own forward are known and not tried. On the meta device only the output's shape is tried.
    """
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return Behaviour(
            reason=f"max_norm={layer.max_norm:g} rescales its rows in each pass, so an update that is added to its output is "
            "not the one that is merged"
        )
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return Behaviour(reason="nn.MultiheadAttention reads its weight and never calls it, so an adapter there would not act")
    if _is_plain(layer) or not is_matrix_class(layer) or is_quantized(layer):
        return Behaviour()
    if is_offloaded(layer):
        return Behaviour(reason=OFFLOADED)
    weight = layer._parameters.get("weight")
    if weight is None:
        return Behaviour(reason="its weight is computed in each pass by a forward method of its own")
    if stores_codes(weight):
        return Behaviour(reason=f"its weight is stored as {weight.dtype}, and only linear layers are read in that form")
    extra = _extra_arguments(layer)
    if extra:
        return Behaviour(reason=f"its forward method has arguments beyond the input ({', '.join(extra)})")
    try:
        return _tried(layer, weight)
    except Exception as error:  # noqa: BLE001 - it is another library's code, which may fail in any way
        text = " ".join(str(error).split())[:160]
        return Behaviour(reason=f"its forward method cannot be tried on a plain input ({type(error).__name__}: {text})")


def has_stored_weight(layer: nn.Module) -> bool:
    """Whether the layer's weight is a parameter (or quantized), not computed from others in each pass."""
    return layer._parameters.get("weight") is not None or is_quantized(layer)


def left_out_reason(module: nn.Module) -> str:
    """Why a layer that looks like one with a weight matrix is not taken as one; empty if it is, or does not look like one."""
    if unreadable(module):
        return "it keeps its weight quantized in a form that lowdim cannot read; load the model without quantization"
    if not is_matrix_class(module) and not isinstance(module, nn.Linear):
        return ""
    found = behaviour(module)
    if found.reason:
        return found.reason
    if not has_stored_weight(module):
        return f"its weight is not a parameter but computed in each pass ({COMPUTED})"
    return f"its forward method scales the product by {found.gain:g}" if found.gain != 1.0 else ""


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer's own forward method, under accelerate's hook, is torch's (transformers' for Conv1D)."""
    forward: Any = layer.__dict__.get("forward")
    if forward is not None:
        forward = layer.__dict__.get("_old_forward", forward) if "_hf_hook" in layer.__dict__ else forward
        if not isinstance(forward, types.MethodType) or forward.__self__ is not layer:
            return False
        function = forward.__func__
    else:
        function = type(layer).forward
    own = (nn.Linear, nn.Embedding, *CONVOLUTIONS)
    return any(function is kind.forward for kind in own) or (is_conv1d(layer) and function is type(layer).forward)


def _extra_arguments(layer: nn.Module) -> list[str]:
    found = inspect.signature(layer.forward).parameters.values()
    named = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named[1:]


@torch.no_grad()
def _tried(layer: nn.Module, weight: Tensor) -> Behaviour:
    generator = torch.Generator().manual_seed(0)
    known = weight.numel() <= _SMALL or any(
        other is not None and other is not weight and other.shape == weight.shape
        for other in (*layer._parameters.values(), *layer._buffers.values())
    )
    trial = shallow_copy(layer)
    trial.training = False
    shapes_only = weight.is_meta or isinstance(weight, FakeTensor)
    if known and not shapes_only:
        trial._parameters["weight"] = nn.Parameter(_known_weight(weight, generator), requires_grad=False)
    matrix = trial._parameters["weight"]
    assert matrix is not None
    x = _input(layer, matrix, generator)
    got, want = trial.forward(x), _plain_output(layer, matrix, x)
    if not isinstance(got, Tensor):
        return Behaviour(reason=f"its forward method returns a {type(got).__name__}, not one tensor")
    if got.shape != want.shape:
        kind = "lookup" if isinstance(layer, nn.Embedding) else "product"
        return Behaviour(
            reason=f"its forward method is not a plain {kind}: for an input {tuple(x.shape)} it returns {tuple(got.shape)}, "
            f"not {tuple(want.shape)}"
        )
    if shapes_only or not got.is_floating_point():
        return Behaviour()
    if not isinstance(layer, nn.Embedding):
        got = got - trial.forward(torch.zeros_like(x))
    return _compared(got.double(), want.double(), matrix.dtype, isinstance(layer, nn.Embedding))


def _known_weight(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in place of a weight, of rank 2: masks, scales, orders and norms all change its products."""
    rows, columns = len(weight), weight[0].numel()
    left, right = _signed(rows * 2, generator).view(rows, 2), _signed(columns * 2, generator).view(2, columns)
    left[:, 1] *= 0.25
    return (left @ right).view(weight.shape).to(weight)


def _compared(got: Tensor, want: Tensor, dtype: torch.dtype, lookup: bool) -> Behaviour:
    size = float(want.square().sum())
    gain = float((got * want).sum()) / size if size else 0.0
    wide = dtype.itemsize >= 4
    if size == 0 or not torch.isfinite(got).all():
        return Behaviour(reason="its forward method cannot be tried: the weight is zero or not finite")
    error = float((got - gain * want).abs().max()) / (abs(gain) * float(want.abs().max()) or 1.0)
    if gain == 0 or error > (1e-2 if wide else 5e-2):
        what = "a lookup of the input in its weight" if lookup else "a product of its weight with the input"
        return Behaviour(reason=f"its forward method is more than {what} (it may norm, mask, shift or order it)")
    return Behaviour(1.0 if abs(gain - 1) < (1e-4 if wide else 2e-3) else gain)


def _signed(count: int, generator: torch.Generator) -> Tensor:
    """Numbers with magnitudes in [0.5, 1.5] and random signs, `(count,)`."""
    return (torch.rand(count, generator=generator) + 0.5) * (1 - 2 * torch.randint(2, (count,), generator=generator))


def _input(layer: nn.Module, weight: Tensor, generator: torch.Generator) -> Tensor:
    device = weight.device
    if isinstance(layer, nn.Embedding):
        count = layer.num_embeddings
        index = torch.randint(count, (8, 7), generator=generator)
        index[0, 0], index[1, 0] = count - 1, 0
        if layer.padding_idx is not None:
            index[1, 1] = layer.padding_idx
        return index.to(device)
    if isinstance(layer, CONVOLUTIONS):
        spans = [gap * (size - 1) + 2 * step + 1 for size, step, gap in zip(layer.kernel_size, layer.stride, layer.dilation)]
        return torch.randn(1, layer.in_channels, *spans, generator=generator).to(device, weight.dtype)
    features = weight.shape[0] if is_conv1d(layer) else weight.shape[1]
    return torch.randn(_ROWS, features, generator=generator).to(device, weight.dtype)


def _plain_output(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The plain layer's output for this weight, without bias."""
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight)
    for kind in CONVOLUTIONS:
        if isinstance(layer, kind):
            return kind._conv_forward(layer, x, weight, None)  # type: ignore[arg-type]
    return x @ weight if is_conv1d(layer) else F.linear(x, weight)


def shallow_copy(layer: nn.Module) -> nn.Module:
    """A module of the same class that shares tensors and children but can be changed on its own."""
    copy = layer.__class__.__new__(layer.__class__)
    copy.__dict__.update(layer.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[name] = dict(layer.__dict__[name])
    rebind_methods(copy, layer)
    return copy
