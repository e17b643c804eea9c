"""Systems that make the weight itself low-dimensional, from the start of training."""

from lowdim.layers.monarch import Monarch
from lowdim.layers.swap import densify, swap_linear
from lowdim.modules import LowRankLinear

LowRank = LowRankLinear

__all__ = ["LowRank", "LowRankLinear", "Monarch", "densify", "swap_linear"]
