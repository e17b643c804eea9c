"""Numerics that several systems share: pure functions of tensors; nothing here knows a model."""

from lowdim.linalg.cost import Cost, chain_cost
from lowdim.linalg.draw import draw_normal, draw_uniform
from lowdim.linalg.leading import has_numbers, leading_vectors
from lowdim.linalg.lowrank import add_low_rank, add_product, compress_factors, low_rank_norm, low_rank_product
from lowdim.linalg.monarch import monarch_dense, monarch_multiply, monarch_project
from lowdim.linalg.quantize import dequantize_blockwise, dynamic_codebook, quantize_blockwise
from lowdim.linalg.random import derive_seed, stream
from lowdim.linalg.sharded import gather, is_sharded, local, match, replicate
from lowdim.linalg.sketch import CountSketch
from lowdim.linalg.svd import canonical_signs, captured_energy, compute_dtype, range_finder, svd, truncated_svd
from lowdim.linalg.tucker import mode_products, tucker, tucker_reconstruct, unfold

__all__ = [
    "Cost",
    "CountSketch",
    "add_low_rank",
    "add_product",
    "canonical_signs",
    "captured_energy",
    "chain_cost",
    "compress_factors",
    "compute_dtype",
    "dequantize_blockwise",
    "derive_seed",
    "draw_normal",
    "draw_uniform",
    "dynamic_codebook",
    "gather",
    "has_numbers",
    "is_sharded",
    "leading_vectors",
    "local",
    "low_rank_norm",
    "low_rank_product",
    "match",
    "mode_products",
    "monarch_dense",
    "monarch_multiply",
    "monarch_project",
    "quantize_blockwise",
    "range_finder",
    "replicate",
    "stream",
    "svd",
    "truncated_svd",
    "tucker",
    "tucker_reconstruct",
    "unfold",
]
