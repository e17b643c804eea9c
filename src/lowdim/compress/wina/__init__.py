"""WINA: each linear layer reads only those inputs whose size times the norm of their weights is largest; nothing is trained."""

from lowdim.compress.wina.allocation import greedy_sparsity
from lowdim.compress.wina.linear import WINALinear
from lowdim.compress.wina.masks import wina_mask, wina_threshold
from lowdim.compress.wina.sparsify import WINAConfig, wina, wina_report

__all__ = ["WINAConfig", "WINALinear", "greedy_sparsity", "wina", "wina_mask", "wina_report", "wina_threshold"]
