"""Numerics that several systems share: pure functions of tensors; nothing here knows a model."""

from lowdim.linalg.affine import (
    dequantize_affine,
    dequantize_nibbles,
    pack_nibbles,
    quantize_affine,
    store_affine,
    unpack_nibbles,
)
from lowdim.linalg.ams_sketch import AMSSketch
from lowdim.linalg.arrays import as_given, as_tensor
from lowdim.linalg.balance import balance_factors, balance_factors_
from lowdim.linalg.bits import pack_bits, unpack_bits
from lowdim.linalg.context import context_svd
from lowdim.linalg.cost import Cost, chain_cost
from lowdim.linalg.dct import dct, dct_columns, dct_matrix
from lowdim.linalg.delta import delta_product, unit_rows
from lowdim.linalg.dense_sketches import SRHT, GaussianSketch, PooledGaussian, make_sketch
from lowdim.linalg.draw import draw_normal, draw_uniform
from lowdim.linalg.fastfood import (
    FastfoodDraws,
    fastfood,
    fastfood_draws,
    fastfood_size,
    fastfood_transpose,
    hadamard_transform,
)
from lowdim.linalg.features import exp_features
from lowdim.linalg.lanczos import Lanczos, lanczos
from lowdim.linalg.ldu import ldu, ldu_steps
from lowdim.linalg.leading import has_numbers, leading_vectors
from lowdim.linalg.lowrank import add_low_rank, add_product, compress_factors, low_rank_norm, low_rank_product
from lowdim.linalg.masks import largest_mask, nm_mask, smallest_mask
from lowdim.linalg.monarch import monarch_dense, monarch_multiply, monarch_project
from lowdim.linalg.operators import Operator, as_operator
from lowdim.linalg.orthogonal import cayley, cayley_inverse, cayley_signs, householder_product, householder_vectors
from lowdim.linalg.pieces import counting_pieces, slices
from lowdim.linalg.quantize import dequantize_blockwise, dynamic_codebook, quantize_blockwise
from lowdim.linalg.random import derive_seed, real_numbers, seeded, stream, stream_on
from lowdim.linalg.random_rows import combine_rows, random_rows
from lowdim.linalg.remember import Memory, recall, remembered
from lowdim.linalg.scaled_sum import scaled_sum
from lowdim.linalg.sharded import (
    broadcast,
    gather,
    is_sharded,
    local,
    many_processes,
    match,
    mean_over_processes,
    one_writes,
    owner,
    replicate,
)
from lowdim.linalg.sketch import CountSketch, Sketch
from lowdim.linalg.spd import (
    bw_distance2,
    bw_exp,
    bw_geodesic,
    bw_log,
    bw_transport,
    lyapunov,
    spd_exp,
    spd_log,
    spd_power,
    symmetric_abs,
)
from lowdim.linalg.state_space import (
    DiscreteModes,
    power_states,
    power_sum,
    s4d_discrete,
    s4d_init,
    s4d_kernel,
)
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
from lowdim.linalg.wide import wide, widest, without_autocast

__all__ = [
    "SRHT",
    "AMSSketch",
    "Cost",
    "CountSketch",
    "DiscreteModes",
    "FastfoodDraws",
    "GaussianSketch",
    "Lanczos",
    "Memory",
    "Operator",
    "PooledGaussian",
    "Sketch",
    "add_low_rank",
    "add_product",
    "as_given",
    "as_operator",
    "as_tensor",
    "balance_factors",
    "balance_factors_",
    "balanced_factors",
    "broadcast",
    "bw_distance2",
    "bw_exp",
    "bw_geodesic",
    "bw_log",
    "bw_transport",
    "canonical_signs",
    "captured_energy",
    "cayley",
    "cayley_inverse",
    "cayley_signs",
    "chain_cost",
    "combine_rows",
    "compress_factors",
    "compute_dtype",
    "context_svd",
    "counting_pieces",
    "dct",
    "dct_columns",
    "dct_matrix",
    "delta_product",
    "dequantize_affine",
    "dequantize_blockwise",
    "dequantize_nibbles",
    "derive_seed",
    "draw_normal",
    "draw_uniform",
    "dynamic_codebook",
    "exp_features",
    "fastfood",
    "fastfood_draws",
    "fastfood_size",
    "fastfood_transpose",
    "gather",
    "hadamard_transform",
    "has_numbers",
    "householder_product",
    "householder_vectors",
    "is_sharded",
    "lanczos",
    "largest_mask",
    "ldu",
    "ldu_steps",
    "leading_vectors",
    "local",
    "low_rank_norm",
    "low_rank_product",
    "lyapunov",
    "make_sketch",
    "many_processes",
    "match",
    "mean_over_processes",
    "mode_products",
    "monarch_dense",
    "monarch_multiply",
    "monarch_project",
    "nm_mask",
    "one_writes",
    "owner",
    "pack_bits",
    "pack_nibbles",
    "power_states",
    "power_sum",
    "quantize_affine",
    "quantize_blockwise",
    "random_rows",
    "range_finder",
    "real_numbers",
    "recall",
    "remembered",
    "replicate",
    "s4d_discrete",
    "s4d_init",
    "s4d_kernel",
    "scaled_sum",
    "seeded",
    "slices",
    "smallest_mask",
    "spd_exp",
    "spd_log",
    "spd_power",
    "store_affine",
    "stream",
    "stream_on",
    "svd",
    "symmetric_abs",
    "truncated_svd",
    "tucker",
    "tucker_reconstruct",
    "unfold",
    "unit_rows",
    "unpack_bits",
    "unpack_nibbles",
    "wide",
    "widest",
    "without_autocast",
]
