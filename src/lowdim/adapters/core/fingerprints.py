"""Whether a weight is the one that an adapter was trained over: digests that hold in every floating dtype."""

from __future__ import annotations

import base64
import binascii
import hashlib

import torch
from torch import Tensor, nn

from lowdim.adapters.core.guards import pristine_matrix
from lowdim.linalg import wide
from lowdim.modules import QuantizedLinear
from lowdim.surgery import is_quantized

__all__ = ["base_difference", "digest_weight", "fingerprint", "layer_difference", "layer_fingerprint"]

#: Entries that are kept as they are, to compare weights of different dtypes.
_KEPT = 32


def digest_weight(weight: Tensor) -> str:
    """A digest of shape and up to 65,536 entries rounded to bfloat16: the same in float32 and bfloat16."""
    flat = weight.detach().reshape(-1)
    step = (flat.numel() // 65536) | 1  # odd: a power of two would sample only a few columns
    sample = flat[::step].to(torch.bfloat16).cpu().view(torch.int16)
    return hashlib.blake2b(repr(tuple(weight.shape)).encode() + sample.numpy().tobytes(), digest_size=12).hexdigest()


def fingerprint(weight: Tensor, kind: str = "") -> str:
    """`digest:dtype:entries` of a weight.

    Args:
        kind: of a quantized layer, whose weight is given dequantized.
    """
    kept = base64.b64encode(_entries(weight).cpu().numpy().tobytes()).decode()
    return f"{digest_weight(weight)}:{kind or _name(weight.dtype)}:{kept}"


def base_difference(recorded: str, weight: Tensor, kind: str = "") -> str | None:
    """What tells `weight` from the one that was recorded, as a clause; None if they are the same up to the rounding of a dtype.

    The digest decides where both have one dtype, or where one is the bfloat16 rounding of the other. Otherwise the entries
    that were kept must agree within half a unit in the last place of each of the two dtypes.

    Args:
        recorded: of `fingerprint`; an older one is a digest alone.
    """
    digest, _, rest = recorded.partition(":")
    if digest == digest_weight(weight):
        return None
    then, _, kept = rest.partition(":")
    now = kind or _name(weight.dtype)
    if not rest:
        return "differs" + (
            "" if now in ("float32", "bfloat16") else f" (it is {now} here: try the model in float32 or bfloat16)"
        )
    before = _decoded(kept, weight)
    if before is None or then == now:
        return "differs"
    dtype = getattr(torch, then, None)
    if kind or not isinstance(dtype, torch.dtype):
        return f"differs (it was {then} when the adapter was trained, and is {now} here)"
    after = _entries(weight).cpu().double()
    allowed = _half_step(before, dtype) + _half_step(after, weight.dtype)
    if bool(((before - after).abs() <= allowed).all()):
        return None
    return f"differs by more than rounding from {then} to {now}"


def layer_fingerprint(layer: nn.Module) -> str:
    """`fingerprint` of a layer's pre-trained weight, under all of its adapters."""
    return fingerprint(pristine_matrix(layer), _quantized_kind(layer))


def layer_difference(recorded: str, layer: nn.Module) -> str | None:
    """`base_difference` of a layer's pre-trained weight."""
    return base_difference(recorded, pristine_matrix(layer), _quantized_kind(layer))


def _quantized_kind(layer: nn.Module) -> str:
    """The library and the class of a quantized weight; empty for any other."""
    plain = getattr(layer, "plain", layer)
    if not is_quantized(plain):
        return ""
    if isinstance(plain, QuantizedLinear):
        return f"lowdim {plain.scheme}"
    parts = (plain, getattr(plain, "weight", None))
    found = next((part for part in parts if type(part).__module__.startswith(("bitsandbytes.", "torchao."))), plain)
    return f"{type(found).__module__.partition('.')[0]} {type(found).__name__}"


def _entries(weight: Tensor) -> Tensor:
    """Up to `_KEPT` entries, evenly spread, in float32 or better."""
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // _KEPT) | 1
    return wide(flat[::step][:_KEPT]).contiguous().float()


def _decoded(kept: str, weight: Tensor) -> Tensor | None:
    try:
        raw = base64.b64decode(kept, validate=True)
    except (binascii.Error, ValueError):
        return None
    want = len(_entries(weight))
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).double() if len(raw) == 4 * want and want else None


def _half_step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a number that rounds to each value can be from it."""
    about = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    return values.abs().clamp_min(about.smallest_normal) * about.eps * 0.5 * 1.001


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
