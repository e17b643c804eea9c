"""LoRD: one-shot low-rank decomposition from a layer's output features."""

from lowdim.compress.lord.config import LoRDConfig, lord_rank
from lowdim.compress.lord.factors import lord_factors
from lowdim.compress.lord.method import lord
from lowdim.compress.lord.statistics import lord_spectra

__all__ = ["LoRDConfig", "lord", "lord_factors", "lord_rank", "lord_spectra"]
