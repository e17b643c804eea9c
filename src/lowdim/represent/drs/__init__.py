"""Dual randomized smoothing: certified radii from two halves of the pixels."""

from lowdim.represent.drs.bounds import (
    ABSTAIN,
    clopper_pearson_lower,
    dual_radius,
    dual_smoothing_radius,
    smallest_n,
    smoothing_radius,
)
from lowdim.represent.drs.certificates import Certificate, Certificates
from lowdim.represent.drs.halves import checkerboard, fill_masked
from lowdim.represent.drs.smoothing import DualRandomizedSmoothing, RandomizedSmoothing

__all__ = [
    "ABSTAIN",
    "Certificate",
    "Certificates",
    "DualRandomizedSmoothing",
    "RandomizedSmoothing",
    "checkerboard",
    "clopper_pearson_lower",
    "dual_radius",
    "dual_smoothing_radius",
    "fill_masked",
    "smallest_n",
    "smoothing_radius",
]
