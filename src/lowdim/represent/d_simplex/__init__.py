"""d-Simplex: features that stay where they are when the model is replaced, and what a replacement does to an index."""

from lowdim.represent.d_simplex.classifier import DSimplexClassifier, simplex_vertices
from lowdim.represent.d_simplex.compatibility import (
    average_accuracy,
    average_compatibility,
    compatibility_inequalities,
    identification_accuracy,
)
from lowdim.represent.d_simplex.losses import HOCLoss, StationaryLoss
from lowdim.represent.d_simplex.replacement import ReplacementReport, replacement_report

__all__ = [
    "DSimplexClassifier",
    "HOCLoss",
    "ReplacementReport",
    "StationaryLoss",
    "average_accuracy",
    "average_compatibility",
    "compatibility_inequalities",
    "identification_accuracy",
    "replacement_report",
    "simplex_vertices",
]
