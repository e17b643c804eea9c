"""The few modules that more than one family swaps in, and how files rebuild them."""

from lowdim.modules.interpolative import InterpolativeLinear
from lowdim.modules.low_rank import LowRankLinear
from lowdim.modules.masked import MaskedLinear
from lowdim.modules.rebuildable import Rebuildable, describe_layers, layer_class, place_blanks
from lowdim.modules.structured import StructuredLinear

__all__ = [
    "InterpolativeLinear",
    "LowRankLinear",
    "MaskedLinear",
    "Rebuildable",
    "StructuredLinear",
    "describe_layers",
    "layer_class",
    "place_blanks",
]
