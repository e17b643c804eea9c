"""A small input for a model, and whether another model answers it in the same way: the check of what commands write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lowdim.errors import WrittenModelError

__all__ = ["Probe", "probe_inputs", "room_for"]

_ROWS, _TOKENS = 2, 8
#: The largest difference that rounding explains, as a share of the largest output, for each dtype of a model.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: The share of it that the same weights in the same code may use on the same device. In 16 bits it is all of it: buffers that
#: no file holds (frequencies of rotary positions) stay in float32 in `from_pretrained`, and `model.to(bfloat16)` rounds them.
_SAME = {torch.float64: 1e-2, torch.float32: 1e-2}


@dataclass(frozen=True)
class Probe:
    """A model's answer to a small input, kept to ask another model the same.

    Attributes:
        inputs: keywords of the model.
        wanted: its outputs, in float32 or better on the CPU.
        tolerance: the largest difference that counts as rounding where another order of operations computes the same.
        device: where it was asked.
        dtype: of its parameters.

    Example:
        >>> from lowdim.models import Probe, load_model
        >>> model = load_model("stories260k", "causal-lm")
        >>> Probe.of(model).difference(model)
        0.0
    """

    inputs: dict[str, Tensor]
    wanted: tuple[Tensor, ...]
    tolerance: float
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, model: nn.Module, *, inputs: Mapping[str, Tensor] | None = None) -> Self | None:
        """Ask `model`, in evaluation mode; None if no input is known for it, or it cannot be run on one.

        A model whose answer to the same input differs from call to call gets a tolerance of a thousand times that difference.
        """
        given = probe_inputs(model) if inputs is None else dict(inputs)
        if given is None:
            return None
        try:
            first, second = _answer(model, given), _answer(model, given)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError):
            return None  # it wants other inputs: only its tensors can be compared
        if not first or not all(bool(torch.isfinite(t).all()) for t in first):
            return None
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        size = max(float(t.abs().max()) for t in first if t.numel())
        tolerance = max(_TOLERANCE.get(dtype, 1e-1) * size, 1000 * _distance(first, second))
        return cls(given, first, tolerance, next(model.parameters()).device.type, dtype)

    def difference(self, model: nn.Module) -> float:
        """The largest difference of an output; infinite if the outputs have other shapes."""
        return _distance(self.wanted, _answer(model, self.inputs))

    def check(self, model: nn.Module, what: str, *, same: bool = False) -> float:
        """The difference, if rounding explains it.

        Args:
            what: what `model` was loaded from, for the error.
            same: whether it has the same weights in the same layers, so that all but the last digits must agree.

        Raises:
            WrittenModelError: it is larger.
        """
        found = self.difference(model)
        alike = next(model.parameters()).device.type == self.device
        allowed = self.tolerance * ((_SAME.get(self.dtype, 1.0) if same else 1.0) if alike else 10.0)
        if not found <= allowed:
            raise WrittenModelError(
                f"{what} does not give the model that was measured: its outputs differ by up to {found:.3g} on a test input, "
                f"and rounding explains {allowed:.1g}. Nothing is left of what was written"
            )
        return found


def probe_inputs(model: Any) -> dict[str, Tensor] | None:
    """Two short rows of inputs for a transformers model (tokens, pixels or features); None for another kind of model.

    Example:
        >>> from lowdim.models import load_model
        >>> from lowdim.models.probe import probe_inputs
        >>> {name: tuple(x.shape) for name, x in probe_inputs(load_model("stories260k", "causal-lm")).items()}
        {'input_ids': (2, 8), 'attention_mask': (2, 8)}
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    kind = getattr(model, "main_input_name", "input_ids")
    if kind == "pixel_values":
        size = getattr(config, "image_size", None) or 32
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return {kind: _numbers(_ROWS, getattr(config, "num_channels", 3), height, width)}
    tokens = _tokens(config)
    if kind == "input_features" and hasattr(config, "num_mel_bins"):
        found = {kind: _numbers(_ROWS, config.num_mel_bins, 2 * getattr(config, "max_source_positions", 1500))}
    elif kind == "input_values":
        return {kind: _numbers(_ROWS, 4000)}
    elif tokens is None or kind not in ("input_ids", "input_features"):
        return None
    else:
        found = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(config, "is_encoder_decoder", False) and tokens is not None:
        found["decoder_input_ids"] = tokens
    return found


def room_for(model: nn.Module) -> bool:
    """Whether a second copy of the model fits into the memory that is free now; True where that is not known."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return True
    lines = [line.split() for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    return not lines or needed < 0.8 * 1024 * int(lines[0][1])


def _tokens(config: Any) -> Tensor | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words, longest = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)
    if not isinstance(words, int) or words < 1:
        return None
    length = min(_TOKENS, longest) if isinstance(longest, int) and longest > 0 else _TOKENS
    padding = getattr(text, "pad_token_id", None)
    ids = (5 + 7 * torch.arange(_ROWS * length)) % words
    if isinstance(padding, int):
        ids = torch.where(ids == padding, (ids + 1) % words, ids)
    return ids.view(_ROWS, length)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _answer(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The floating-point outputs, without caches."""
    first = next(model.parameters())
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    ready = {name: x.to(first.device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        out = model(**ready)
    finally:
        for module, mode in modes:
            module.training = mode
    values = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple) else (out,)
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return tuple(value.detach().cpu().to(torch.promote_types(value.dtype, torch.float32)) for value in tensors)


def _distance(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
    if [t.shape for t in one] != [t.shape for t in two]:
        return math.inf
    gaps = [float((a.double() - b.double()).abs().max()) for a, b in zip(one, two) if a.numel()]
    return max((math.inf if math.isnan(gap) else gap for gap in gaps), default=0.0)
