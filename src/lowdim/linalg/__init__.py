"""Numerics that several systems share: pure functions of tensors; nothing here knows a model."""

from lowdim.linalg.affine import dequantize_affine, pack_nibbles, quantize_affine, store_affine, unpack_nibbles
from lowdim.linalg.balance import balance_factors, balance_factors_
from lowdim.linalg.bits import pack_bits, unpack_bits
from lowdim.linalg.context import context_svd
from lowdim.linalg.cost import Cost, chain_cost
from lowdim.linalg.dct import dct, dct_columns, dct_matrix
from lowdim.linalg.draw import draw_normal, draw_uniform
from lowdim.linalg.fastfood import (
    FastfoodDraws,
    fastfood,
    fastfood_draws,
    fastfood_size,
    fastfood_transpose,
    hadamard_transform,
)
from lowdim.linalg.ldu import ldu, ldu_steps
from lowdim.linalg.leading import has_numbers, leading_vectors
from lowdim.linalg.lowrank import add_low_rank, add_product, compress_factors, low_rank_norm, low_rank_product
from lowdim.linalg.masks import largest_mask, nm_mask, smallest_mask
from lowdim.linalg.monarch import monarch_dense, monarch_multiply, monarch_project
from lowdim.linalg.quantize import dequantize_blockwise, dynamic_codebook, quantize_blockwise
from lowdim.linalg.random import derive_seed, real_numbers, stream, stream_on
from lowdim.linalg.random_rows import combine_rows, random_rows
from lowdim.linalg.scaled_sum import scaled_sum
from lowdim.linalg.sharded import (
    broadcast,
    gather,
    is_sharded,
    local,
    many_processes,
    match,
    mean_over_processes,
    owner,
    replicate,
)
from lowdim.linalg.sketch import CountSketch
from lowdim.linalg.svd import (
    balanced_factors,
    canonical_signs,
    captured_energy,
    compute_dtype,
    range_finder,
    svd,
    truncated_svd,
)
from lowdim.linalg.tucker import mode_products, tucker, tucker_reconstruct, unfold
from lowdim.linalg.wide import wide, widest

__all__ = [
    "Cost",
    "CountSketch",
    "FastfoodDraws",
    "add_low_rank",
    "add_product",
    "balance_factors",
    "balance_factors_",
    "balanced_factors",
    "broadcast",
    "canonical_signs",
    "captured_energy",
    "chain_cost",
    "combine_rows",
    "compress_factors",
    "compute_dtype",
    "context_svd",
    "dct",
    "dct_columns",
    "dct_matrix",
    "dequantize_affine",
    "dequantize_blockwise",
    "derive_seed",
    "draw_normal",
    "draw_uniform",
    "dynamic_codebook",
    "fastfood",
    "fastfood_draws",
    "fastfood_size",
    "fastfood_transpose",
    "gather",
    "hadamard_transform",
    "has_numbers",
    "is_sharded",
    "largest_mask",
    "ldu",
    "ldu_steps",
    "leading_vectors",
    "local",
    "low_rank_norm",
    "low_rank_product",
    "many_processes",
    "match",
    "mean_over_processes",
    "mode_products",
    "monarch_dense",
    "monarch_multiply",
    "monarch_project",
    "nm_mask",
    "owner",
    "pack_bits",
    "pack_nibbles",
    "quantize_affine",
    "quantize_blockwise",
    "random_rows",
    "range_finder",
    "real_numbers",
    "replicate",
    "scaled_sum",
    "smallest_mask",
    "store_affine",
    "stream",
    "stream_on",
    "svd",
    "truncated_svd",
    "tucker",
    "tucker_reconstruct",
    "unfold",
    "unpack_bits",
    "unpack_nibbles",
    "wide",
    "widest",
]
