"""Numerics that several systems share: pure functions of tensors; nothing here knows a model."""

from lowdim.linalg.cost import Cost, chain_cost
from lowdim.linalg.lowrank import add_low_rank, low_rank_norm, low_rank_product
from lowdim.linalg.random import derive_seed, stream
from lowdim.linalg.svd import canonical_signs, captured_energy, compute_dtype, range_finder, svd, truncated_svd

__all__ = [
    "Cost",
    "add_low_rank",
    "canonical_signs",
    "captured_energy",
    "chain_cost",
    "compute_dtype",
    "derive_seed",
    "low_rank_norm",
    "low_rank_product",
    "range_finder",
    "stream",
    "svd",
    "truncated_svd",
]
