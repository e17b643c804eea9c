"""Measurements: spectra, landscapes, dynamics; `model or weights -> result dataclass`."""

from lowdim.diagnose.core.subspace import compression_bound, quantize_subspace
from lowdim.diagnose.core.weights import Weights, weights_of
from lowdim.diagnose.intruders.measure import IntruderResult, LayerIntruders, intruder_dimensions, scale_intruders
from lowdim.diagnose.intruders.reduce import Reduction, reduce_intruders, scale_intruders_lora

__all__ = [
    "IntruderResult",
    "LayerIntruders",
    "Reduction",
    "Weights",
    "compression_bound",
    "intruder_dimensions",
    "quantize_subspace",
    "reduce_intruders",
    "scale_intruders",
    "scale_intruders_lora",
    "weights_of",
]
