"""PST: weights are taken away while a model is fine-tuned through few trained numbers."""

from lowdim.compress.pst.config import PSTConfig
from lowdim.compress.pst.layer import PSTLinear
from lowdim.compress.pst.pruning import pst

__all__ = ["PSTConfig", "PSTLinear", "pst"]
