"""A SentenceTransformer's encoder: its layers, the norm after them, and the states after each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lowdim.errors import MissingExtraError
from lowdim.surgery import unwrap

__all__ = ["encoder_of", "final_norm", "layer_list", "recorded_states", "sentence_model", "width_of"]

#: What transformers calls the norm that follows the last layer.
_NORMS = ("final_norm", "final_layer_norm", "final_layernorm", "norm", "ln_f", "layernorm", "post_layernorm")


def sentence_model(model: Any, purpose: str) -> Any:
    """The SentenceTransformer itself, out of the wrappers of compiled and data-parallel models.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        TypeError: another model, or one whose first module is not a transformer with layers.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Transformer
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", "embed", purpose) from error
    plain = unwrap(model)
    if not isinstance(plain, SentenceTransformer):
        raise TypeError(f"{purpose} needs a SentenceTransformer; got {type(plain).__name__}")
    if not isinstance(plain[0], Transformer):
        raise TypeError(
            f"{purpose} needs a SentenceTransformer whose first module is a Transformer; got {type(plain[0]).__name__}"
        )
    return plain


def encoder_of(model: Any) -> Any:
    """The model of transformers inside a SentenceTransformer."""
    return model[0].auto_model


def width_of(model: Any) -> int:
    """The size of its sentence embeddings before any cut."""
    sizes = [module.get_embedding_dimension() for module in model if hasattr(module, "get_embedding_dimension")]
    return next(size for size in reversed(sizes) if size is not None)


def layer_list(encoder: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that holds the layers, the list's name in it, and the list: as many blocks as the configuration says.

    Raises:
        TypeError: it has no such list.
    """
    count = encoder.config.num_hidden_layers  # type: ignore[union-attr]
    for module in encoder.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name, child
    raise TypeError(f"{type(encoder).__name__} has no list of its {count} layers (a ModuleList of that length)")


def final_norm(encoder: nn.Module) -> nn.Module | None:
    """The norm between the last layer and the output, which inner states have not passed; None where there is none."""
    holder, _, _ = layer_list(encoder)
    for owner in dict.fromkeys((holder, encoder)):
        for name, child in owner.named_children():
            if name in _NORMS and "norm" in type(child).__name__.lower():
                return child
    return None


@contextmanager
def recorded_states(model: Any) -> Iterator[_Recorder]:
    """Inside, a pass of the SentenceTransformer keeps the states of all layers; afterwards it is as it was, also on errors."""
    recorder = _Recorder(model)
    transformer, config = model[0], encoder_of(model).config
    before = config.output_hidden_states
    own = "forward" in vars(transformer)
    recorder.forward = transformer.forward
    transformer.forward = recorder
    config.output_hidden_states = True
    try:
        yield recorder
    finally:
        config.output_hidden_states = before
        if own:
            transformer.forward = recorder.forward
        else:
            del transformer.forward


class _Recorder:
    """Stands for the transformer's forward method: the whole pass first, then the same states again, from another layer.

    Attributes:
        layer: whose states come out, 1 … N; None for a new pass.
    """

    forward: Any

    def __init__(self, model: Any):
        self.layer: int | None = None
        self._norm = final_norm(encoder_of(model))
        self._output = model[0].module_output_name

    def __call__(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if self.layer is None:
            out = self.forward(features, **kwargs)
            inner = out["all_layer_embeddings"][1:-1]  # after layers 1 … N - 1; the output has passed the norm
            states = inner if self._norm is None else [self._norm(state) for state in inner]
            out["all_layer_embeddings"] = [*states, out[self._output]]
            return out
        return {**features, self._output: features["all_layer_embeddings"][self.layer - 1]}
