"""The few modules that more than one family swaps in, and how files rebuild them."""

from lowdim.modules.interpolative import InterpolativeLinear
from lowdim.modules.low_rank import LowRankLinear
from lowdim.modules.masked import MaskedLinear
from lowdim.modules.packed_linear import PackedLinear, pack_linear
from lowdim.modules.pruned_linear import PrunedLinear, magnitude_prune, pruned_bytes
from lowdim.modules.quantized_linear import (
    QuantizedLinear,
    base_layers,
    more_when_plain,
    quantize_base,
    quantize_like,
    quantized_scheme,
)
from lowdim.modules.rebuildable import Rebuildable, describe_layers, layer_class, place_blanks, remove_added
from lowdim.modules.schemes import SCHEMES, Scheme, scheme_named
from lowdim.modules.structured import RebuildableLinear, StructuredLinear

__all__ = [
    "SCHEMES",
    "InterpolativeLinear",
    "LowRankLinear",
    "MaskedLinear",
    "PackedLinear",
    "PrunedLinear",
    "QuantizedLinear",
    "Rebuildable",
    "RebuildableLinear",
    "Scheme",
    "StructuredLinear",
    "base_layers",
    "describe_layers",
    "layer_class",
    "magnitude_prune",
    "more_when_plain",
    "pack_linear",
    "place_blanks",
    "pruned_bytes",
    "quantize_base",
    "quantize_like",
    "quantized_scheme",
    "remove_added",
    "scheme_named",
]
