"""A base model whose linear weights are quantized while transformers loads them, one after the other.

transformers hands each tensor of a checkpoint to a quantizer as it reads it, so that no more than one dense weight is held.
Importing this module registers that quantizer; `lowdim.models.load_model(..., quantize=...)` imports it when it is used.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowdim.modules import QuantizedLinear, base_layers
from lowdim.surgery import is_conv1d, make_linear, parent_and_child

__all__ = ["BaseConfig"]

_METHOD = "lowdim-base"
#: Why a weight could not be quantized, the last time: transformers raises an error that does not say it.
refused: list[str] = []


class BaseConfig(QuantizationConfigMixin):
    """`from_pretrained(quantization_config=BaseConfig("int8"))`.

    Attributes:
        scheme: `"int8"`, `"int4"` or `"nf4"`.
    """

    def __init__(self, scheme: str, quant_method: str = _METHOD):
        self.quant_method: Any = quant_method
        self.scheme = scheme


class BaseQuantizer(HfQuantizer):
    """Puts a `QuantizedLinear` in the place of each linear layer when its weight is read."""

    quantization_config: Any
    chosen: frozenset[str] = frozenset()

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        self.chosen = frozenset(f"{name}.weight" for name in base_layers(model))
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether it is the weight of a layer that `base_layers` names."""
        return param_name in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        """What is done with such a weight."""
        return _Quantize(self)

    def is_serializable(self) -> bool:
        """It is not: the base stays where it is, and adapters are saved without it."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through every layer."""
        return True


class _Quantize(ConversionOps):
    """The codes of a weight, for the layer that it swaps in."""

    def __init__(self, quantizer: BaseQuantizer):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, model: Any = None, **_: Any) -> dict[str, Tensor]:
        """Quantize, and put the layer in place."""
        found: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight: Tensor = value[0] if isinstance(value, list) else value
            if name not in self.quantizer.chosen:
                found[name] = weight
                continue
            path = name.rpartition(".")[0]
            layer = model.get_submodule(path)
            if weight.shape != layer.weight.shape:
                raise ValueError(f"{name} has shape {tuple(weight.shape)}; the model needs {tuple(layer.weight.shape)}")
            try:
                new = self._quantized(layer, weight)
            except ValueError as error:
                refused[:] = [f"layer {path}: {error}"]
                raise
            parent, child = parent_and_child(model, path)
            parent._modules[child] = new
            found[name] = new.weight
        return found

    def _quantized(self, layer: Any, weight: Tensor) -> QuantizedLinear:
        matrix = weight.T if is_conv1d(layer) else weight
        new: Any = QuantizedLinear.from_linear(
            make_linear(matrix, requires_grad=False), self.quantizer.quantization_config.scheme
        )
        new.transposed = is_conv1d(layer)
        new.register_parameter("bias", layer.bias)
        new._is_hf_initialized = True
        return new.train(layer.training)


register_quantization_config(_METHOD)(BaseConfig)
register_quantizer(_METHOD)(BaseQuantizer)
