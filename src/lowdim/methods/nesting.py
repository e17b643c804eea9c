"""The sizes (layers, dimensions) that an embedding is trained at besides the whole."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["nested_sizes"]

_HALVINGS = 3  # of the width, for Matryoshka


def nested_sizes(nested: str, layers: int, width: int, given: Sequence[tuple[int, int]] = ()) -> tuple[tuple[int, int], ...]:
    """The sizes of a name of `lowdim.catalogue.NESTED` for a model; the whole model is the last.

    Formula: Matryoshka has all layers and the width, its half, quarter and eighth; Starbucks has up to six sizes, whose layers
    grow evenly and whose dimensions double.

    Args:
        given: sizes in the place of these.

    Raises:
        ValueError: sizes of another kind: those of Matryoshka have all layers, those of Starbucks more and more.

    Example:
        >>> from lowdim.methods.nesting import nested_sizes
        >>> nested_sizes("matryoshka", 6, 384)
        ((6, 48), (6, 96), (6, 192), (6, 384))

    Source: arXiv 2205.13147 and 2410.13230.
    """
    if given:
        alike = {size[0] for size in given} == {layers}
        if alike != (nested == "matryoshka"):
            wanted = f"all {layers} layers in each" if nested == "matryoshka" else "layers that grow"
            raise ValueError(f"sizes of {nested} must have {wanted}; got {list(map(list, given))}")
        return tuple(given)
    if nested == "matryoshka":
        return tuple((layers, width >> i) for i in range(_HALVINGS, -1, -1) if width >> i)
    from lowdim.represent.starbucks.pairs import default_pairs

    return default_pairs(layers, width)
