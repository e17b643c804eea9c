"""Intruder dimensions: measuring them, and scaling them down."""

from lowdim.diagnose.intruders.measure import IntruderResult, LayerIntruders, intruder_dimensions, scale_intruders
from lowdim.diagnose.intruders.reduce import Reduction, reduce_intruders, scale_intruders_lora

__all__ = [
    "IntruderResult",
    "LayerIntruders",
    "Reduction",
    "intruder_dimensions",
    "reduce_intruders",
    "scale_intruders",
    "scale_intruders_lora",
]
