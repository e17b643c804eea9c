"""Which modules are layers of one matrix, by class; `behaviour` says whether they act like it."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["CONVOLUTIONS", "HEAD_NAMES", "describe", "is_conv1d", "is_linear_class", "is_matrix_class"]

#: Last path components of modules that transformers uses as prediction heads; never touched by default.
HEAD_NAMES = frozenset({"lm_head", "embed_out", "classifier", "score", "qa_outputs", "cls", "classification_head"})

#: Layers whose kernel is one matrix once all but its first dimension are flattened.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether `layer` is transformers' Conv1D (weight stored `(in, out)`), checked without importing transformers."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear_class(layer: nn.Module) -> bool:
    """Whether the layer is nn.Linear, a subclass of it, or transformers' Conv1D.

    The output projection inside nn.MultiheadAttention does not count: attention reads its weight and never calls it.
    """
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def is_matrix_class(layer: nn.Module) -> bool:
    """Whether the layer is linear, a convolution or an embedding by class."""
    return is_linear_class(layer) or isinstance(layer, (*CONVOLUTIONS, nn.Embedding))


def describe(layer: nn.Module) -> str:
    """Class and weight shape, for messages."""
    weight = getattr(layer, "weight", None)
    shape = f" with weight {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
    return f"{type(layer).__name__}{shape}"
