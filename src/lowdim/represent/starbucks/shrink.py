"""Cut a SentenceTransformer to its first layers and dimensions, out of sentence-transformers' own modules only."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lowdim.errors import check_choice, check_int
from lowdim.represent.starbucks.encoder import encoder_of, layer_list, sentence_model, width_of

__all__ = ["shrink_encoder"]


def shrink_encoder(model: Any, layers: int, dim: int, *, head: str = "truncate") -> Any:
    """A copy of a SentenceTransformer with the first `layers` layers, whose embeddings have `dim` dimensions.

    Formula: the embedding is `normalize(e[:dim])`, e pooled from the states after layer `layers`; with `"truncate"` without the
    normalisation.

    Args:
        model: a `SentenceTransformer` whose first module is a Transformer; it is not changed.
        layers: kept layers, 1 … N.
        dim: kept dimensions, 1 … the size of its embeddings.
        head: `"truncate"` sets `truncate_dim`, which sentence-transformers reads. `"dense"` ends the model with a Dense of
            weight `[I 0]` and a Normalize, for tools that do not read it (text-embeddings-inference, ONNX).

    Returns:
        A `SentenceTransformer`. `save_pretrained(folder)`, and `SentenceTransformer(folder)` loads it without
        `trust_remote_code`.

    Raises:
        ValueError: layers or dimensions out of range, an unknown head.
        TypeError: another model, or one whose layers are in no list. MissingExtraError: sentence-transformers is not installed.

    Example:
        >>> from lowdim.represent import shrink_encoder
        >>> from lowdim.testing.small_encoder import small_encoder
        >>> small = shrink_encoder(small_encoder(layers=3, width=16), 2, 4)
        >>> small.encode(["the cat sat"]).shape, len(small[0].auto_model.encoder.layer)
        ((1, 4), 2)

    A vector cut by `"truncate"` is shorter than 1: cosine does not care, a dot product does. Use `"dense"`, or
    `encode(…, normalize_embeddings=True)`. An encoder that was not trained to be cut loses much: see `size_table`.

    Source: Zhuang et al., arXiv 2410.13230.
    """
    plain = sentence_model(model, "shrink_encoder")
    check_choice("head", head, ("truncate", "dense"))
    encoder = encoder_of(plain)
    count = len(layer_list(encoder)[2])
    width = plain.get_embedding_dimension() or width_of(plain)
    check_int("layers", layers, 1, count)
    check_int("dim", dim, 1, width)
    holder, name, blocks = layer_list(encoder)
    setattr(holder, name, blocks[:layers])  # the layers that go are not copied
    try:
        small = copy.deepcopy(plain)
    finally:
        setattr(holder, name, blocks)
    _fit_config(encoder_of(small).config, count, layers)
    if head == "truncate":
        small.truncate_dim = dim
    else:
        small.truncate_dim = None
        _end_with_dense(small, width_of(plain), dim)
    return small


def _fit_config(config: Any, count: int, layers: int) -> None:
    """Write the number of layers, and cut the lists that have an entry for each layer."""
    config.num_hidden_layers = layers
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == count:
            setattr(config, name, value[:layers])


def _end_with_dense(model: Any, width: int, dim: int) -> None:
    """`[I 0]`, then length 1; a Normalize that stood last would only scale what is scaled again."""
    from sentence_transformers.base.modules import Dense, Normalize

    if isinstance(model[-1], Normalize):
        del model[-1]
    reference = next(model.parameters())
    weight = torch.eye(dim, width, dtype=reference.dtype, device=reference.device)
    for module in (Dense(width, dim, bias=False, activation_function=None, init_weight=weight), Normalize()):
        model.append(module.to(reference.device))
